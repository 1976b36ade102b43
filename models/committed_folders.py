"""Folders whose files belong together: committed whole, and opened only as they were committed.

An adapter without its head or without what was merged into the base is another model. The files of such a
folder are written to a sibling; a manifest with their SHA-256 comes last; then the sibling takes the folder's
name. A process that is killed leaves the old folder or the new one, under that name or beside it, where
``current_folder`` finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from models.errors import UserError
from models.files import errors_named, sync, write_json
from models.untrusted import checked_name, parse_json, read_bytes

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 1_000_000


def _name_of_a_file(name: str) -> str:
    if Path(name).name != checked_name(name):
        raise ValueError(f"{name!r} is no name of a file in this folder")
    return name


class _Manifest(TypedDict):
    """``manifest.json``: the files with their SHA-256, and what the run says of them."""

    files: dict[Annotated[str, AfterValidator(_name_of_a_file)], Annotated[str, Field(max_length=64)]]
    notes: dict[str, Any]


_MANIFEST = TypeAdapter(_Manifest)


@contextlib.contextmanager
def committed_folder(
    folder: Path, names: Collection[str], *, notes: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to write files to; it takes the place of ``folder`` when the block ends well.

    Files of the old folder that are neither in its manifest nor among ``names`` are somebody else's: they
    stay.

    Args:
        folder: The folder to commit, there or not; its parents are made.
        names: The files that such a folder may have.
        notes: What the manifest says beside the files, JSON values.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    fresh, old = _fresh(folder), _old(folder)
    with errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _settle(folder, names)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        try:
            yield fresh
            write_json(fresh / MANIFEST_FILE, _manifest(fresh, notes or {}))
            sync(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        sync(folder.parent)
        _settle(folder, names)


def current_folder(folder: Path) -> Path:
    """Return where the files of a committed folder are: beside it where a process was killed on the way."""
    if folder.exists():
        return folder
    if (_fresh(folder) / MANIFEST_FILE).is_file():
        return _fresh(folder)
    return _old(folder) if _old(folder).is_dir() else folder


def check_committed(
    folder: Path,
    names: Collection[str],
    *,
    remedy: str = "copy the whole folder again, or remove manifest.json if the change was meant",
) -> dict[str, Any]:
    """Make sure that a folder holds the files that it was committed with; return the manifest's notes.

    A folder without a manifest, as other programs write them, passes without notes.

    Args:
        folder: As ``current_folder`` returned it.
        names: The files that are read there if they are there.
        remedy: What to do where it does not; ends the message.

    Raises:
        UserError: a file is missing, is another one, or has come in; it is named.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return {}
    manifest = _read_manifest(folder / MANIFEST_FILE, remedy)
    files: dict[str, str] = manifest["files"]
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is damaged: {name} is missing, which {MANIFEST_FILE} lists; {remedy}")
        if sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder} is damaged: {name} is not the file that {MANIFEST_FILE} lists; {remedy}"
            )
    for name in names:
        if name not in files and (folder / name).exists():
            raise UserError(f"{folder}: {name} is not in {MANIFEST_FILE}; remove it, or {remedy}")
    return manifest["notes"]


def _fresh(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _manifest(folder: Path, notes: Mapping[str, Any]) -> dict[str, Any]:
    """The files of a folder, each on the disk, and the notes."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = sha256_of(path)
    return {"files": files, "notes": dict(notes)}


def _settle(folder: Path, names: Collection[str]) -> None:
    """End what a replacement began: a folder that lost its name gets it back, then the old one goes."""
    found, old = current_folder(folder), _old(folder)
    if found != folder:
        os.replace(found, folder)
    if not old.is_dir():
        return
    listed = {MANIFEST_FILE, *names}
    with contextlib.suppress(UserError):
        if (old / MANIFEST_FILE).is_file():
            listed |= _read_manifest(old / MANIFEST_FILE, "")["files"].keys()
    for path in old.iterdir():
        if path.name not in listed and not (folder / path.name).exists():
            os.replace(path, folder / path.name)
    shutil.rmtree(old)


def _read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """Read a manifest: file names of this folder with their SHA-256, and notes."""
    try:
        return parse_json(read_bytes(path, MAX_MANIFEST_BYTES), path, _MANIFEST)
    except UserError as error:
        raise UserError(f"{error}; the folder is damaged: {remedy}") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

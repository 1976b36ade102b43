"""The place that a run writes to: whether it can, whether it may, and whether it is alone there.

All of it is asked before data and model are loaded, and again, under the folder's lock, before anything is
written. What a run replaces is what a run wrote: files of other names, and links, are never removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from models.errors import UserError
from models.files import errors_named, sync
from models.untrusted import read_json

ENVIRONMENT_FILE, LOCK_FILE = "environment.json", "run.lock"
_FIRST = (LOCK_FILE, f".{ENVIRONMENT_FILE}.part")
"""What a run leaves that is killed before its folder says whose it is."""
_WEIGHTS = (
    "manifest.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "head.safetensors",
    "base_delta.safetensors",
    "model.safetensors",
)
_PICTURES = ("confusion_matrix", "class_performance", "recall_by_k", "answers")
_ENDINGS = ("png", "svg", "pdf")
_EVALUATION = (
    "evaluation_report.txt",
    "evaluation_results.json",
    "predictions.csv",
    *(f"{name}.{end}" for name in _PICTURES for end in _ENDINGS),
)
_CHECKPOINT = ("manifest.json", "state.safetensors", "server.safetensors")
_A_COMMIT = "checkpoint/commit_*"
WRITTEN = (
    *("config.yaml", ENVIRONMENT_FILE, LOCK_FILE, "partition.json", "metrics.jsonl", "communication.csv"),
    *("plugins.json", "summary.json", "report.html", "events.out.tfevents.*"),
    *(
        f"plots/{kind}_*.{ending}"
        for kind in ("metric_by", "bytes_by", "client", "aggregation", "class")
        for ending in _ENDINGS
    ),
    *("run.log", "lost.csv", "checkpoint/clients_*.safetensors"),
    *(f"checkpoint/{name}" for name in _CHECKPOINT),
    *(f"{_A_COMMIT}/{name}" for name in _CHECKPOINT),
    *(f"{folder}/{name}" for folder in ("adapter", "adapter_best") for name in _WEIGHTS),
    *(f"checkpoint-epoch-*/{name}" for name in _WEIGHTS),
    *(f"evaluation_{split}/{name}" for split in ("test", "validation") for name in _EVALUATION),
)
"""Patterns of what runs, reports and evaluations leave in a run's folder: all that --overwrite removes."""

_REPLACE = "pass --overwrite to replace it, or set output.name=OTHER"
_PROBE_BYTES, _MAX_NAME_BYTES, _MAX_NAMED = 65_536, 255, 5


def run_path(root: str, name: str) -> Path:
    """Return the folder of a run.

    Args:
        root: ``output.root``.
        name: ``output.name``, a name or path below it.

    Raises:
        UserError: The name is empty, leads out of the root or through a link below it.
    """
    path = Path(name)
    if not root or not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"output.root={ascii(root)} with output.name={ascii(name)} is no place for a run: give a folder "
            "(. for this one) and a name below it, without '..' and a leading '/'"
        )
    for above in path.parents[:-1]:
        if os.path.islink(Path(root) / above):
            raise UserError(
                f"{Path(root) / above} is a link: a run is not written through one; set output.name=OTHER, "
                "or output.root to where the link leads"
            )
    return Path(root) / path


def beside(run: Path) -> Path:
    """Return the folder that a run's folder is in, also where the run is named by ``.`` or ``..``."""
    return run.parent if run.name not in ("", "..") else Path(os.path.abspath(run)).parent


def check_place(path: Path, remedy: str = "set output.root and output.name to another place") -> None:
    """Make sure that a file or folder can be written; nothing stays behind.

    Args:
        path: What will be written, there or not; so may be the folders above it.
        remedy: What to do otherwise; ends the message.

    Raises:
        UserError: The name cannot be a file's, something above is no folder, or nothing can be written there.
    """
    shown = ascii(str(path)) if not str(path).isprintable() else str(path)
    try:
        parts = [part.encode() for part in path.parts]
    except UnicodeEncodeError as error:
        raise UserError(f"{shown} has characters that no file's name may have; {remedy}") from error
    if any(b"\0" in part or len(part) > _MAX_NAME_BYTES for part in parts):
        raise UserError(
            f"{shown[:60]}… cannot be a file's name (longer than {_MAX_NAME_BYTES} bytes, or a NUL in it); "
            f"{remedy}"
        )
    try:
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if there == path and not path.is_dir():
            there = path.absolute().parent
        if not there.is_dir():
            raise UserError(f"{shown} cannot be made: {there} is no folder; {remedy}")
        with tempfile.TemporaryDirectory(dir=there, prefix=".fedlora-") as probe:
            file = Path(probe) / "probe"
            file.write_bytes(bytes(_PROBE_BYTES))
            sync(file)
    except OSError as error:
        raise UserError(f"{shown} cannot be written ({error.strerror or error}); {remedy}") from error


def check_free(path: Path, *, overwrite: bool, other: str = _REPLACE) -> None:
    """Make sure that a run may be written to ``path``, without touching it.

    Args:
        path: The folder.
        overwrite: What an earlier run left there may go.
        other: What to do where there is one.

    Raises:
        UserError: It cannot be written, is in use, exists and may not be replaced, or is not a run's alone.
    """
    check_place(path)
    if path.is_symlink():
        raise UserError(f"{path} is a link: a run is not written through one; set output.name=OTHER")
    if not path.exists():
        return
    if path.is_dir() and (path / LOCK_FILE).is_file():
        os.close(_locked(path))
    if not overwrite:
        if can_be_resumed(path):
            other = f"continue it with: fedlora resume {shlex.quote(str(path))}; {other}"
        raise UserError(f"{path} already exists: {other}")
    check_replaceable(path)


def can_be_resumed(path: Path) -> bool:
    """Return whether a folder holds a run with a commit that did not come to its end."""
    return any(path.glob(f"{_A_COMMIT}/manifest.json")) and not (path / "summary.json").exists()


def check_replaceable(path: Path) -> None:
    """Make sure that all that is in a folder was left there by a run.

    Raises:
        UserError: It is not a run folder, or something else is in it.
    """
    if path.is_dir() and all(entry.name in _FIRST for entry in path.iterdir()):
        return
    if not _is_run(path):
        raise UserError(
            f"{path} is not a run folder (it has no {ENVIRONMENT_FILE} of a run): it is not overwritten"
        )
    foreign = [name for name, is_ours in _entries(path) if not is_ours]
    if foreign:
        more = f" and {len(foreign) - _MAX_NAMED} more" if len(foreign) > _MAX_NAMED else ""
        raise UserError(
            f"{path} holds what no run wrote: {', '.join(foreign[:_MAX_NAMED])}{more}. Move that elsewhere, "
            "or set output.name=OTHER"
        )


def claim(path: Path, *, overwrite: bool) -> int:
    """Make a folder this run's alone: locked, and empty but for the lock.

    Args:
        path: The folder.
        overwrite: Remove what an earlier run left there.

    Returns:
        The lock, for ``release``; it also ends with the process, however that ends.

    Raises:
        UserError: As ``check_free``.
    """
    check_free(path, overwrite=overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror or error})") from error
    try:
        if not overwrite and any(entry.name != LOCK_FILE for entry in path.iterdir()):
            raise UserError(f"{path} was made by another run meanwhile: set output.name=OTHER")
        check_replaceable(path)
        _remove_run(path)
    except BaseException:
        os.close(lock)
        raise
    return lock


def reclaim(path: Path) -> int:
    """Lock the folder of a run that is to go on; all that it left stays.

    Returns:
        The lock, for ``release``.

    Raises:
        UserError: No run made it, or it is in use.
    """
    if path.is_symlink() or not _is_run(path):
        raise UserError(
            f"{path} is not a run folder (it has no {ENVIRONMENT_FILE} of a run): "
            "give the folder that a run wrote"
        )
    with errors_named(path):
        return _locked(path, f"wait for its end; how far it is: fedlora status {shlex.quote(str(path))}")


def release(path: Path, lock: int) -> None:
    """Give up a folder that ``claim`` gave."""
    try:
        (path / LOCK_FILE).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _locked(path: Path, remedy: str = "wait for its end, or set output.name=OTHER") -> int:
    """Lock a folder by a file in it that names this process.

    The system frees the lock when its process ends, so that one a dead process left behind is no obstacle.
    """
    file = path / LOCK_FILE
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise UserError(f"{path} is in use by a run (process {holder}): {remedy}") from error
        if _is_open_as(lock, file):
            break
        os.close(lock)  # its holder has removed it since
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _is_open_as(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except FileNotFoundError:
        return False


def _is_run(path: Path) -> bool:
    """Whether a folder says that a run of ours made it."""
    try:
        tree = read_json(path / ENVIRONMENT_FILE)
    except UserError:
        return False
    return isinstance(tree, dict) and "fedlora" in tree


def _entries(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield what is below a run's folder, files before their folders, and whether a run may have left it."""
    for place, folders, files in os.walk(path, topdown=False):
        for name in sorted(files):
            file = Path(place) / name
            relative = file.relative_to(path).as_posix()
            yield relative, file.is_file() and not file.is_symlink() and _is_written(relative)
        for name in sorted(folders):
            folder = Path(place) / name
            relative = folder.relative_to(path).as_posix()
            yield relative, not folder.is_symlink() and _is_written(relative, is_folder=True)


def _is_written(relative: str, *, is_folder: bool = False) -> bool:
    parts = PurePosixPath(_settled_name(relative)).parts
    return any(
        (len(parts) < len(known) if is_folder else len(parts) == len(known))
        and all(map(fnmatchcase, parts, known))
        for known in (PurePosixPath(pattern).parts for pattern in WRITTEN)
    )


def _settled_name(relative: str) -> str:
    """The path without the marks of files that were being written when a process was killed."""
    parts = (re.sub(r"^\.(.+)\.(part|old)$", r"\1", part) for part in PurePosixPath(relative).parts)
    return "/".join(parts)


def _remove_run(path: Path) -> None:
    """Remove the files that a run left, one by one, last the one that says so; the lock stays."""
    last = [ENVIRONMENT_FILE] if (path / ENVIRONMENT_FILE).exists() else []
    names = [relative for relative, _ in _entries(path) if relative not in (LOCK_FILE, ENVIRONMENT_FILE)]
    try:
        for relative in [*names, *last]:
            entry = path / relative
            if entry.is_dir() and not entry.is_symlink():
                entry.rmdir()
            else:
                entry.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be replaced ({error.strerror or error}: {error.filename})") from error

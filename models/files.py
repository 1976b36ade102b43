"""Files written whole or not at all: a run that is killed leaves the old file, never half of the new one.

Used wherever anything is written: run folders, ledgers, reports, checkpoints, what commands leave. A file is
on the disk before it takes its name, so that a loss of power leaves no empty one either.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any

from models.errors import NoRoomError, UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


@contextlib.contextmanager
def written_whole(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary file to write to; it takes the place of ``path`` when the block ends well.

    Args:
        path: The file.
        num_bytes: How long it will be, for the message where there is no room.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    with errors_named(path, num_bytes):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_named(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the system's errors of a block that writes ``path`` into a UserError that names it.

    Raises:
        NoRoomError: The disk is full; names the folder, and the bytes that were wanted if they are known.
        UserError: Another error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            wanted = "" if num_bytes is None else f"; {num_bytes} bytes were wanted"
            raise NoRoomError(
                f"{path.parent} has no room for {path.name} ({error.strerror}{wanted})"
            ) from error
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


def sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk before anything else is done."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    r"""Write a text file in UTF-8; what UTF-8 has no form for (half a surrogate pair) becomes ``\udc80``.

    Raises:
        UserError: the file cannot be written.
    """
    content = text.encode(errors="backslashreplace")
    with written_whole(path, len(content)) as temporary:
        temporary.write_bytes(content)


def append_whole(path: Path, text: str) -> None:
    """Append to a file in one write; one that falls short is taken back.

    Raises:
        OSError: there was no room.
    """
    data = text.encode(errors="backslashreplace")
    with path.open("ab", buffering=0) as file:
        length = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(
                    errno.ENOSPC, f"no room for {len(data)} more bytes; the file is as it was before"
                )
        except OSError:
            file.truncate(length)
            raise


def json_text(value: Any, **options: Any) -> str:
    """Write a value as JSON, which has no NaN and no infinity: they become null.

    Args:
        value: Of mappings, sequences, numbers, texts, None.
        **options: Of ``json.dumps``.
    """
    return json.dumps(_with_nulls(value), allow_nan=False, **options)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    is_number = isinstance(value, Real) and not isinstance(value, int)
    return None if is_number and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with sorted keys; null stands for what is not a number.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, json_text(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class BestEffort:
    """A block whose failure is told and does not end what it belongs to.

    Args:
        what: Is being written, for the message.
        remedy: How it can be had later.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        """Remember the words."""
        self.what, self.remedy = what, remedy
        self.failed = False

    def __enter__(self) -> BestEffort:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Tell of a failure and go on; an interrupt or the end of the program is none."""
        self.failed = kind is not None and issubclass(kind, Exception)
        if self.failed:
            log.warning(
                "%s failed (%s: %s)%s", self.what, getattr(kind, "__name__", kind), error, self.remedy
            )
        return self.failed

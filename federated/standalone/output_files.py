"""Files that commands write for their user: whole or not at all, and never over another without being told.

Stands after the rounds, behind ``fedlora predict`` and ``fedlora encode``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from models.errors import UserError


def check_output(path: Path, *, overwrite: bool) -> None:
    """Make sure that a file may be written, before the work that fills it starts.

    Raises:
        UserError: its folder does not exist, or it exists and may not be replaced.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first, or write {path.name} elsewhere")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists: pass --overwrite to replace it, or choose another name")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; it takes the place of ``path`` when the block ends well.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

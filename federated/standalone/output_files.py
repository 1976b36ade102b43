"""Files that commands write for their user: never over another without being told.

Stands after the rounds, behind ``fedlora predict`` and ``fedlora encode``.
"""

from __future__ import annotations

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

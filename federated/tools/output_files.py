"""Files that commands write for their user: never over another without being told."""

from __future__ import annotations

from pathlib import Path

from federated.results.run_place import check_place
from models.errors import UserError


def check_output(path: Path, *, overwrite: bool) -> None:
    """Make sure that a file may be written, before the work that fills it starts.

    Raises:
        UserError: it cannot be written, its folder does not exist, or it exists and may not be replaced.
    """
    check_place(path, "choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first, or write {path.name} elsewhere")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or pipe, which a file cannot take the place of; choose another")
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists: pass --overwrite to replace it, or choose another name")

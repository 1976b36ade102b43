"""Where the shipped configurations are, and the file of a configuration given by name or path."""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import UserError, shortened


def config_folder() -> Path:
    """Return the folder of the shipped configurations (inside a package when installed from a wheel)."""
    root = Path(__file__).parents[1]
    packaged = root / "federated" / "configs"
    return packaged if packaged.is_dir() else root / "configs"


def shipped_names() -> list[str]:
    """Return the names that ``find_config`` knows."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def find_config(name_or_path: str | Path) -> Path:
    """Return the file of a configuration given by path or by shipped name.

    Raises:
        UserError: There is neither such a file nor such a name.
    """
    path = Path(name_or_path)
    if os.path.isfile(path):  # False, too, for what cannot be a path
        return path
    shipped = config_folder() / f"{Path(name_or_path).name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and os.path.isfile(shipped):
        return shipped
    raise UserError(
        f"no configuration {shortened(name_or_path)}: give a YAML file or one of the shipped names "
        f"{', '.join(shipped_names())}"
    )

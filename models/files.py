"""Files written whole or not at all: a run that is killed leaves the old file, never half of the new one.

Used wherever anything is written: run folders, ledgers, reports, checkpoints, what commands leave.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

from models.errors import UserError


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


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8.

    Raises:
        UserError: the file cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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

"""Importing torch and the data libraries without looking for garbage in them; options of several commands."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Precision(StrEnum):
    """Precision of forward passes."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


PluginsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        help="Python file that registers aggregators, codecs, data sources, tasks …; repeat for several.",
    ),
]


@contextlib.contextmanager
def modules_that_stay() -> Iterator[None]:
    """Import inside; what was imported is never searched for garbage, neither now nor when the program ends.

    Python would do so again and again while half a million objects arrive, and once more at the very end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

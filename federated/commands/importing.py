"""Importing torch and the data libraries without looking for garbage in them; options of several commands."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import click
import typer

from federated.config.config_files import load_config
from federated.config.plugins import load_plugins
from federated.config.schema import ExperimentConfig
from models.progress import is_quiet


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
    What takes the first seconds is said before it starts.
    """
    if "torch" not in sys.modules and not is_quiet():
        context = click.get_current_context(silent=True)
        typer.echo(
            f"{context.command_path if context else 'fedlora'}: loading torch and its libraries …", err=True
        )
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def read_config(
    config: str, overrides: Sequence[str] | None, plugins: Sequence[Path] | None, *, name_suffix: str = ""
) -> ExperimentConfig:
    """Read what a command was given before torch is imported, so that a wrong key is told at once.

    Args:
        config: A file or a shipped name.
        overrides: ``KEY=VALUE`` texts.
        plugins: Files that may bring names; they are loaded first.
        name_suffix: As of ``load_config``.

    Raises:
        UserError: As ``load_config`` and ``load_plugins``.
    """
    if plugins:
        with modules_that_stay():
            load_plugins(plugins)
    return load_config(config, overrides or [], name_suffix=name_suffix)

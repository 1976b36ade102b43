"""``-v`` and ``--quiet``: the same two options on every command, which no command's own code sees."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click
import typer
from typer.core import TyperCommand, TyperOption

from models.progress import set_quiet

_OURS = ("federated", "lora", "models")


class CommandWithVerbosity(TyperCommand):
    """A command that takes ``-v`` and ``--quiet`` beside its own options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Add the two options."""
        super().__init__(*args, **kwargs)
        self.params += [
            TyperOption(
                param_decls=["-v", "--verbose"],
                count=True,
                expose_value=False,
                is_eager=True,
                callback=_set_verbose,
                help="Say more of what is done; -vv: what the libraries say too.",
            ),
            TyperOption(
                param_decls=["-q", "--quiet"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_set_quiet,
                help="Show results and errors alone.",
            ),
        ]


def add_verbosity(app: typer.Typer) -> None:
    """Give every command of an application, and of its groups, the two options."""
    for command in app.registered_commands:
        command.cls = CommandWithVerbosity
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_verbosity(group.typer_instance)


def usual_verbosity() -> None:
    """Show progress and warnings, as without either option; bars of libraries in a terminal alone."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    set_quiet(False)
    _show_from(logging.NOTSET)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _set_verbose(_context: click.Context, _option: click.Parameter, count: int) -> None:
    for name in _OURS if count == 1 else (None,) if count else ():
        logging.getLogger(name).setLevel(logging.INFO)


def _set_quiet(_context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        set_quiet(True)
        _show_from(logging.ERROR)
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _show_from(level: int) -> None:
    """Let standard error show records of this level and above; files of a log keep theirs."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(level)

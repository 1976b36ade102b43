"""The command ``fedlora export``; ``federated.cli`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from federated.commands.importing import PluginsOption, modules_that_stay
from federated.config.plugins import load_plugins


def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, or of an adapter.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write.")],
    *,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, adapters merged, for transformers.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    plugin: PluginsOption = None,
) -> None:
    """Write a trained model for others: its adapter for PEFT, or with --merge all of it for transformers.

    The folder's README.md has the figures, the settings and the code that loads it.

    Example: fedlora export runs/quickstart my_clip --merge
    """
    with modules_that_stay():
        from federated.tools.export import export_model

        load_plugins(plugin or ())
    written = export_model(source, folder, merge=merge, overwrite=overwrite)
    for path in sorted(written.iterdir()):
        typer.echo(str(path))

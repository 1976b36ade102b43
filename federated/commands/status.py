"""The command ``fedlora status``; ``federated.cli`` registers it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", help="Tell of each round until the run no longer runs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line each time.")] = False,
) -> None:
    """Print how far a run is: round, metric, bytes, seconds, failed clients, and whether it runs.

    It reads the run's files alone, so it works in another terminal and on another machine.

    Example: fedlora status runs/quickstart --follow
    """
    from federated.results.run_status import follow as each_of
    from federated.results.run_status import in_words, read_status

    console = Console()
    for found in each_of(run_folder) if follow else [read_status(run_folder)]:
        if as_json:
            typer.echo(found.to_json())
            continue
        for line in in_words(found):
            console.print(line, highlight=False, soft_wrap=True)

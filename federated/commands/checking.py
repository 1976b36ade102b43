"""The command ``fedlora doctor``; ``federated.cli`` registers it."""

from __future__ import annotations

import typer
from rich.console import Console

from federated.commands.importing import modules_that_stay
from models.errors import UserError


def doctor() -> None:
    """Print versions and devices, and check in seconds whether the parts work here; exit code 1 if not.

    Example: fedlora doctor
    """
    try:
        with modules_that_stay():
            from federated.results.console import print_table
            from federated.results.tables import TextTable
            from federated.tools.doctor import examine
    except ImportError as error:
        raise UserError(f"a package is missing or damaged ({error}): install fedlora again") from error

    console, found = Console(), examine()
    for title, findings in found.items():
        rows = tuple((each.name, "ok" if each.ok else "FAILS", each.detail) for each in findings)
        print_table(console, TextTable(("what", "", "found"), rows, frozenset({0, 1, 2})), title)
    failures = [each.name for findings in found.values() for each in findings if not each.ok]
    typer.echo("all is well" if not failures else f"{len(failures)} fail: {', '.join(failures)}")
    if failures:
        raise typer.Exit(1)

"""The command ``fedlora doctor``; ``federated.cli`` registers it."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.console import Console

from federated.commands.importing import modules_that_stay
from federated.commands.json_output import JsonOption, print_json
from models.errors import UserError


def doctor(*, as_json: JsonOption = False) -> None:
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
    failures = [each.name for findings in found.values() for each in findings if not each.ok]
    if as_json:
        print_json({title: [asdict(each) for each in findings] for title, findings in found.items()})
    else:
        for title, findings in found.items():
            rows = tuple((each.name, "ok" if each.ok else "FAILS", each.detail) for each in findings)
            print_table(console, TextTable(("what", "", "found"), rows, frozenset({0, 1, 2})), title)
        typer.echo("all is well" if not failures else f"{len(failures)} fail: {', '.join(failures)}")
    if failures:
        raise typer.Exit(1)

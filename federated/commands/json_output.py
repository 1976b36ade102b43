"""The option ``--json``: a command's result as JSON on standard output, and nothing else there."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from models.files import json_text

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
"""For every command that prints a table; what is printed has the values, not their text."""


def print_json(value: Any) -> None:
    """Print a result of mappings, sequences, numbers and texts; what is not finite becomes null."""
    typer.echo(json_text(value, indent=2, ensure_ascii=False, default=str))

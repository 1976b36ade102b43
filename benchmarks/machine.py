"""Which machine a benchmark ran on, and where its table goes: every result names both."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from federated.results.run_folder import cpu_name
from models.files import write_json, write_text

Row = Mapping[str, str]
"""A line of a table: column -> text."""

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def describe_machine() -> str:
    """Return one line: processor, cores, threads, Python and torch."""
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def with_earlier(name: str, rows: Sequence[Row]) -> list[Row]:
    """Return the rows, and before them those that an earlier run of the benchmark left of other workloads."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        return list(rows)
    measured = {row["workload"] for row in rows}
    earlier = json.loads(file.read_text(encoding="utf-8"))["rows"]
    kept = [row for row in earlier if row["workload"] not in measured]
    return [{column: row[column] for column in rows[0]} for row in [*kept, *rows]]


def write_results(name: str, command: str, rows: Sequence[Mapping[str, Any]], *, notes: str = "") -> str:
    """Write ``docs/results/<name>.json`` and ``.md``; return the Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = f"`{command}` on {describe_machine()}.\n\n{markdown_table(rows)}\n"
    text += f"\n{notes}\n" if notes else ""
    write_text(RESULTS / f"{name}.md", text)
    content = {"command": command, "machine": describe_machine(), "rows": json.loads(json.dumps(list(rows)))}
    write_json(RESULTS / f"{name}.json", content)
    return text

"""Runs side by side: what each reached, what it sent for it, and one picture of metric against bytes.

"MB to reach" is the wire traffic until the headline metric first reached a common target; without a target it
is the best value that every run reached, so that each run has an answer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from federated.results import plots
from federated.results.compare_notes import bytes_note, comparison_notes
from federated.results.plot_style import save_png
from federated.results.records import RunRecord, read_run
from federated.results.run_kind import FEDERATED
from federated.results.tables import TextTable
from federated.results.wording import (
    MISSING,
    format_bytes,
    format_count,
    format_megabytes,
    format_metric,
    format_seconds,
    metric_label,
)
from models.errors import UserError
from models.files import BestEffort, errors_named, json_text, write_text

COST_COLUMNS = ("MB up", "MB down", "parameters sent", "time", "peak memory")
"""Columns of a comparison that have a table of their own in the terminal."""


@dataclass(frozen=True)
class RunRow:
    """One run in a comparison. A value that the run did not record is None.

    Attributes:
        name: the folder's name, with its parent's where two runs share it.
        kind: federated, personal (the clients' own models, on their rows) or central.
        metric: key of the headline metric.
        zero_shot: its value before training.
        final: after the last round.
        best: over all rounds.
        rounds: rounds run; epochs of a central run.
        exchanged_parameters: values that one transfer of the state carries.
        uplink_wire_bytes: sent by the clients, all rounds.
        downlink_wire_bytes: sent by the server, all rounds.
        target: the value that ``wire_bytes_to_target`` refers to.
        wire_bytes_to_target: sent, both ways, until the metric first was at least ``target``.
        seconds: duration on the machine it ran on.
        peak_memory_bytes: largest memory use.
    """

    name: str
    kind: str
    metric: str
    zero_shot: float | None
    final: float | None
    best: float | None
    rounds: int
    exchanged_parameters: int | None
    uplink_wire_bytes: int
    downlink_wire_bytes: int
    target: float | None
    wire_bytes_to_target: int | None
    seconds: float | None
    peak_memory_bytes: int | None

    @property
    def label(self) -> str:
        """The name, with the kind where that is not federated."""
        return self.name if self.kind == FEDERATED.name else f"{self.name} ({self.kind})"

    @property
    def wire_bytes(self) -> int:
        """Sent in all, both ways."""
        return self.uplink_wire_bytes + self.downlink_wire_bytes


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        rows: one a run.
        notes: what a reader of the rows must know, a sentence each.
    """

    rows: list[RunRow]
    notes: list[str]


def compare_runs(run_dirs: Sequence[str | Path], *, target: float | None = None) -> Comparison:
    """Return one row a run, in the order given, and in what the runs differ.

    Args:
        run_dirs: run folders with the same headline metric.
        target: value of the headline metric for ``wire_bytes_to_target``; by default the best value that
            every run reached.

    Raises:
        UserError: no folder is given, one is no run folder, or the headline metrics differ.
    """
    return _compare(_read(run_dirs), target)


def write_comparison(
    run_dirs: Sequence[str | Path], out_dir: str | Path, *, target: float | None = None
) -> Path:
    """Write ``comparison.md``, ``.json``, ``.csv`` and ``.png`` into ``out_dir``; return the Markdown's path.

    Raises:
        UserError: as ``compare_runs``.
    """
    runs = _read(run_dirs)
    comparison = _compare(runs, target)
    rows = comparison.rows
    folder = Path(out_dir)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    curves = []
    for row, run in zip(rows, runs, strict=True):
        try:
            curves.append(plots.curve_of(row.label, run.metrics, run.metric, run.ledger))
        except plots.MissingData:
            continue
    text = to_markdown(rows) + "".join(f"\n{_escape(note)}\n" for note in comparison.notes)
    if curves:
        with BestEffort("drawing comparison.png"):
            save_png(plots.metric_by_bytes_of_runs(curves, rows[0].metric), folder / "comparison.png")
            text += "\n![metric against bytes sent](comparison.png)\n"
    write_text(folder / "comparison.json", to_json(rows))
    write_text(folder / "comparison.csv", to_csv(rows))
    path = folder / "comparison.md"
    write_text(path, text)
    return path


def comparison_table(rows: Sequence[RunRow]) -> TextTable:
    """Return one row a run; columns that no run recorded are left out."""
    metric, target = rows[0].metric, rows[0].target
    columns = {
        "run": [row.label for row in rows],
        f"{metric_label(metric)} before": [format_metric(metric, row.zero_shot) for row in rows],
        "final": [format_metric(metric, row.final) for row in rows],
        "best": [format_metric(metric, row.best) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        "MB sent": [format_megabytes(row.wire_bytes) for row in rows],
        f"MB to reach {format_metric(metric, target)}": [
            format_megabytes(row.wire_bytes_to_target) for row in rows
        ],
        "MB up": [format_megabytes(row.uplink_wire_bytes) for row in rows],
        "MB down": [format_megabytes(row.downlink_wire_bytes) for row in rows],
        "parameters sent": [format_count(row.exchanged_parameters) for row in rows],
        "time": [format_seconds(row.seconds) for row in rows],
        "peak memory": [format_bytes(row.peak_memory_bytes) for row in rows],
    }
    shown = {head: cells for head, cells in columns.items() if any(cell != MISSING for cell in cells)}
    return TextTable(tuple(shown), tuple(zip(*shown.values(), strict=True)), words=frozenset({0}))


def terminal_tables(rows: Sequence[RunRow]) -> dict[str, TextTable]:
    """Return ``comparison_table`` in two parts that fit a terminal: title -> table."""
    table = comparison_table(rows)
    reached = [head for head in table.columns if head != "run" and head not in COST_COLUMNS]
    return {"Runs": table.without(*COST_COLUMNS), "What they took": table.without(*reached)}


def to_markdown(rows: Sequence[RunRow]) -> str:
    """Return ``comparison_table`` in Markdown."""
    table = comparison_table(rows)
    lines = [table.columns, ("---", *["---:"] * (len(table.columns) - 1))]
    lines += [tuple(_escape(cell) for cell in row) for row in table.rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def to_json(rows: Sequence[RunRow]) -> str:
    """Return the rows as a JSON list of objects with ``RunRow``'s keys; bytes and shares are not rounded."""
    return json_text([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n"


def to_csv(rows: Sequence[RunRow]) -> str:
    """Return the rows as CSV with ``RunRow``'s fields as columns; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(RunRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return buffer.getvalue()


def _read(run_dirs: Sequence[str | Path]) -> list[RunRecord]:
    if not run_dirs:
        raise UserError("no runs to compare: give at least one run folder")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    metrics = sorted({run.metric for run in runs})
    if len(metrics) > 1:
        listed = ", ".join(f"{run.directory}: {run.metric}" for run in runs)
        raise UserError(
            f"runs with different headline metrics do not compare ({listed}): give runs of one task"
        )
    return runs


def _compare(runs: Sequence[RunRecord], target: float | None) -> Comparison:
    bests, names = [run.headline["best"] for run in runs], _names(runs)
    if target is None and all(best is not None for best in bests):
        target = min(bests)
    rows = [_row(run, name, target) for run, name in zip(runs, names, strict=True)]
    notes = comparison_notes(runs, names)
    if any(row.wire_bytes for row in rows):
        reached = any(row.wire_bytes_to_target is not None for row in rows)
        notes.append(bytes_note(format_metric(runs[0].metric, target) if reached else None))
    return Comparison(rows, notes)


def _row(run: RunRecord, name: str, target: float | None) -> RunRow:
    return RunRow(
        name=name,
        kind=run.kind.name,
        metric=run.metric,
        **run.headline | {"seconds": run.headline["seconds"] or None},
        exchanged_parameters=(run.summary.get("parameters") or {}).get("exchanged"),
        uplink_wire_bytes=run.ledger.total(direction="uplink").wire_bytes,
        downlink_wire_bytes=run.ledger.total(direction="downlink").wire_bytes,
        target=target,
        wire_bytes_to_target=_bytes_to_reach(run, target),
        peak_memory_bytes=run.summary.get("peak_memory_bytes"),
    )


def _bytes_to_reach(run: RunRecord, target: float | None) -> int | None:
    if target is None:
        return None
    try:
        curve = plots.curve_of(run.name, run.metrics, run.metric, run.ledger)
    except plots.MissingData:
        return None
    reached = (sent for sent, value in zip(curve.wire_bytes, curve.values, strict=True) if value >= target)
    return next(reached, None)


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Name each run by its folder, with the parent folder where that alone is ambiguous."""
    names = [run.name for run in runs]
    full = [f"{run.directory.resolve().parent.name}/{run.name}" for run in runs]
    return [long if names.count(short) > 1 else short for short, long in zip(names, full, strict=True)]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")

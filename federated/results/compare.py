"""Runs side by side: what each reached, what it sent for it, and one picture of metric against bytes.

"MB to reach" is the wire traffic until the headline metric first reached a common target, "rounds to reach"
the rounds; without a target it is the best value that every run reached, so that each run has an answer.
A folder that is no run, or is damaged, is left out and named.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from federated.results import plots
from federated.results.compare_notes import bytes_note, comparison_notes
from federated.results.plot_style import save_figure
from federated.results.records import RunRecord, read_run
from federated.results.round_record import curve_lines
from federated.results.run_kind import FEDERATED
from federated.results.run_outcome import parse_target
from federated.results.run_settings import ALPHA, differing_settings, method_of, settings_of
from federated.results.tables import TextTable, escaped, to_markdown
from federated.results.time_plot import TIME, metric_by_time
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

SETTING_COLUMNS = ("method", "alpha", "seed")
COST_COLUMNS = ("MB up", "MB down", "parameters sent", "time", "simulated time", "peak memory")
"""Columns of a comparison that have a table of their own in the terminal, with the keys that differ."""


@dataclass(frozen=True)
class RunRow:
    """One run in a comparison. A value that the run did not record is None.

    Attributes:
        name: the folder's name, with its parent's where two runs share it.
        kind: federated, personal (the clients' own models, on their rows) or central.
        finished: whether the run came to its end.
        method: how it learns: the aggregator, what is added to it, what trains if that is no adapter.
        alpha: of a Dirichlet split.
        seed: of the run.
        metric: key of the headline metric.
        zero_shot: its value before training.
        final: after the last round.
        best: over all rounds.
        rounds: rounds run; epochs of a central run.
        exchanged_parameters: values that one transfer of the state carries.
        uplink_wire_bytes: sent by the clients, all rounds.
        downlink_wire_bytes: sent by the server, all rounds.
        target: the value that ``wire_bytes_to_target`` refers to.
        rounds_to_target: rounds until the metric first was at least ``target``.
        wire_bytes_to_target: sent, both ways, until then.
        seconds: duration on the machine it ran on.
        simulated_seconds: duration by the simulated clock.
        peak_memory_bytes: largest memory use.
        settings: every other key of the configuration in which the compared runs differ.
    """

    name: str
    kind: str
    finished: bool
    method: str | None
    alpha: float | None
    seed: int | None
    metric: str
    zero_shot: float | None
    final: float | None
    best: float | None
    rounds: int
    exchanged_parameters: int | None
    uplink_wire_bytes: int
    downlink_wire_bytes: int
    target: float | None
    rounds_to_target: int | None
    wire_bytes_to_target: int | None
    seconds: float | None
    simulated_seconds: float | None
    peak_memory_bytes: int | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, with the kind where that is not federated, and whether the run is unfinished."""
        marks = [self.kind] * (self.kind != FEDERATED.name) + ["unfinished"] * (not self.finished)
        return f"{self.name} ({', '.join(marks)})" if marks else self.name

    @property
    def record(self) -> dict[str, Any]:
        """The row as one flat mapping: the attributes, then the settings by their dotted keys."""
        known = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "settings"}
        return known | self.settings

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
        left_out: why each folder that is not among the rows is left out.
        runs: what was read, in the rows' order.
    """

    rows: list[RunRow]
    notes: list[str]
    left_out: list[str]
    runs: list[RunRecord] = field(repr=False)


def compare_runs(run_dirs: Sequence[str | Path], *, target: float | str | None = None) -> Comparison:
    """Return one row a run, in the order given, and in what the runs differ.

    Args:
        run_dirs: run folders. One that cannot be read, or has another headline metric than most, is left out.
        target: value of the headline metric for ``wire_bytes_to_target``, as ``parse_target`` reads it; by
            default the best value that every run reached.

    Raises:
        UserError: no folder is given, none can be compared, or the target is no value.
    """
    runs, left_out = _read(run_dirs)
    bests, names = [run.headline["best"] for run in runs], _names(runs)
    goal = None if target is None else parse_target(target, runs[0].metric)
    if goal is None and all(best is not None for best in bests):
        goal = min(bests)
    rows = [
        _row(run, name, goal, settings)
        for run, name, settings in zip(runs, names, differing_settings(runs), strict=True)
    ]
    notes = comparison_notes(runs, names)
    if unfinished := [row.name for row in rows if not row.finished]:
        notes.append(f"Unfinished, so that figures are as far as the run went: {', '.join(unfinished)}.")
    if any(row.wire_bytes for row in rows):
        reached = any(row.wire_bytes_to_target is not None for row in rows)
        notes.append(bytes_note(format_metric(runs[0].metric, goal) if reached else None))
    return Comparison(rows, notes, left_out, runs)


def write_comparison(comparison: Comparison, out_dir: str | Path) -> Path:
    """Write ``comparison.md``, ``.json``, ``.csv`` and the picture into ``out_dir``.

    Returns:
        The path of the Markdown.
    """
    rows, folder = comparison.rows, Path(out_dir)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    curves = []
    for row, run in zip(rows, comparison.runs, strict=True):
        try:
            curves.append(plots.curve_of(row.label, run.metrics, run.metric, run.ledger))
        except plots.MissingData:
            continue
    text = to_markdown(comparison_table(rows)) + "".join(f"\n{escaped(note)}\n" for note in comparison.notes)
    text += "".join(f"\nLeft out: {escaped(reason)}\n" for reason in comparison.left_out)
    if curves:
        with BestEffort("drawing the comparison"):
            save_figure(plots.metric_by_bytes_of_runs(curves, rows[0].metric), folder, "comparison")
            text += "\n![metric against bytes sent](comparison.png)\n"
    if any(row.simulated_seconds is not None for row in rows):
        lines = {row.label: run.metrics for row, run in zip(rows, comparison.runs, strict=True)}
        with BestEffort("drawing the comparison by simulated time"):
            save_figure(metric_by_time(lines, rows[0].metric), folder, "comparison_time")
            text += "\n![metric against simulated time](comparison_time.png)\n"
    write_text(folder / "comparison.json", to_json(rows))
    write_text(folder / "comparison.csv", to_csv(rows))
    path = folder / "comparison.md"
    write_text(path, text)
    return path


def comparison_table(rows: Sequence[RunRow]) -> TextTable:
    """Return one row a run; columns that no run recorded are left out."""
    metric, target = rows[0].metric, rows[0].target
    goal = format_metric(metric, target)
    columns = {
        "run": [row.label for row in rows],
        "method": [row.method or MISSING for row in rows],
        "alpha": [_shown(row.alpha) for row in rows],
        "seed": [_shown(row.seed) for row in rows],
        f"{metric_label(metric)} before": [format_metric(metric, row.zero_shot) for row in rows],
        "final": [format_metric(metric, row.final) for row in rows],
        "best": [format_metric(metric, row.best) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        f"rounds to reach {goal}": [_shown(row.rounds_to_target) for row in rows],
        "MB sent": [format_megabytes(row.wire_bytes) for row in rows],
        f"MB to reach {goal}": [format_megabytes(row.wire_bytes_to_target) for row in rows],
        "MB up": [format_megabytes(row.uplink_wire_bytes) for row in rows],
        "MB down": [format_megabytes(row.downlink_wire_bytes) for row in rows],
        "parameters sent": [format_count(row.exchanged_parameters) for row in rows],
        "time": [format_seconds(row.seconds) for row in rows],
        "simulated time": [format_seconds(row.simulated_seconds) for row in rows],
        "peak memory": [format_bytes(row.peak_memory_bytes) for row in rows],
        **{key: [_shown(row.settings[key]) for row in rows] for key in rows[0].settings},
    }
    shown = {head: cells for head, cells in columns.items() if any(cell != MISSING for cell in cells)}
    words = frozenset(place for place, head in enumerate(shown) if head in ("run", "method"))
    narrow = (f"{metric_label(metric)} before", "best")
    return TextTable(tuple(shown), tuple(zip(*shown.values(), strict=True)), words=words, optional=narrow)


def terminal_tables(rows: Sequence[RunRow]) -> dict[str, TextTable]:
    """Return ``comparison_table`` in parts that fit a terminal: title -> table."""
    table, differing = comparison_table(rows), tuple(rows[0].settings)
    reached = [h for h in table.columns if h not in ("run", *SETTING_COLUMNS, *COST_COLUMNS, *differing)]
    tables = {
        "Runs": table.without(*COST_COLUMNS, *differing),
        "What they took": table.without(*SETTING_COLUMNS, *reached, *differing),
    }
    if differing:
        settings = table.without(*SETTING_COLUMNS, *reached, *COST_COLUMNS)
        # a heading may be broken behind a dot
        columns = tuple(head.replace(".", ". ") for head in settings.columns)
        tables["What else sets them apart"] = replace(settings, columns=columns)
    return tables


def _shown(value: Any) -> str:
    """Write a setting or a count; None is what a run does not have."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def to_json(rows: Sequence[RunRow]) -> str:
    """Return the rows as a JSON list of ``RunRow.record``; bytes and shares are not rounded."""
    return json_text([row.record for row in rows], indent=2, ensure_ascii=False) + "\n"


def to_csv(rows: Sequence[RunRow]) -> str:
    """Return the rows as CSV with the keys of ``RunRow.record`` as columns; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0].record), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.record for row in rows)
    return buffer.getvalue()


def _read(run_dirs: Sequence[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs of the headline metric that most have, and why each other folder is left out."""
    if not run_dirs:
        raise UserError("no runs to compare: give at least one run folder")
    runs, left_out = [], []
    for run_dir in run_dirs:
        try:
            run = read_run(run_dir)
            _ = run.config, run.headline  # read at their first use
            runs.append(run)
        except UserError as error:
            left_out.append(str(error))
    metric, _ = Counter(run.metric for run in runs).most_common(1)[0] if runs else ("", 0)
    left_out += [
        f"{run.directory}: its headline metric is {run.metric}, that of the others {metric}; compare runs of "
        "one task"
        for run in runs
        if run.metric != metric
    ]
    if not runs:
        raise UserError("no run to compare:\n  " + "\n  ".join(left_out))
    return [run for run in runs if run.metric == metric], left_out


def _row(run: RunRecord, name: str, target: float | None, settings: dict[str, Any]) -> RunRow:
    values = settings_of(run)
    rounds_to_target, bytes_to_target = _to_reach(run, target)
    return RunRow(
        name=name,
        kind=run.kind.name,
        finished=run.finished,
        method=method_of(run),
        alpha=values.get(ALPHA),
        seed=values.get("seed"),
        metric=run.metric,
        **run.headline | {"seconds": run.headline["seconds"] or None},
        exchanged_parameters=(run.summary.get("parameters") or {}).get("exchanged"),
        uplink_wire_bytes=run.ledger.total(direction="uplink").wire_bytes,
        downlink_wire_bytes=run.ledger.total(direction="downlink").wire_bytes,
        target=target,
        rounds_to_target=rounds_to_target,
        wire_bytes_to_target=bytes_to_target,
        simulated_seconds=run.metrics[-1].get(TIME) if run.metrics else None,
        peak_memory_bytes=run.summary.get("peak_memory_bytes"),
        settings=settings,
    )


def _to_reach(run: RunRecord, target: float | None) -> tuple[int | None, int | None]:
    """Return the rounds and the wire bytes until the headline metric first was at least a target."""
    if target is None:
        return None, None
    try:
        rounds, values = plots.series(curve_lines(run.metrics), run.metric)
        reached = next((place for place, value in enumerate(values) if value >= target), None)
        if reached is None:
            return None, None
        curve = plots.curve_of(run.name, run.metrics, run.metric, run.ledger) if len(run.ledger) else None
    except plots.MissingData:
        return None, None
    return rounds[reached], None if curve is None else curve.wire_bytes[reached]


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Name each run by its folder, with the parent folder where that alone is ambiguous."""
    names = [run.name for run in runs]
    full = [f"{run.directory.resolve().parent.name}/{run.name}" for run in runs]
    return [long if names.count(short) > 1 else short for short, long in zip(names, full, strict=True)]

"""What a run shows in the terminal: bars while it runs, a line a round, and tables at the end.

The server calls ``round_started`` when the cohort is known, ``client_done`` as replies arrive and
``round_done`` with the round's line of ``metrics.jsonl``. Where the output is no terminal (a file, CI), the
bars are left out and the lines stay. Only this file and the command line print.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from federated.communication.ledger import Ledger
from federated.communication.savings import FULL_MODEL
from federated.results.round_record import SCORED_BY, wire_bytes
from federated.results.run_kind import PERSONAL, RunKind, kind_of
from federated.results.tables import TextTable, failure_table, round_table, saving_table
from federated.results.wording import (
    format_bytes,
    format_metric,
    format_saving,
    format_seconds,
    metric_label,
    saving,
)
from models.progress import watched_by

MAX_COLUMNS = 1000  # of a table that is not cut
MIN_WORDS = 12  # columns that a folded word keeps
MAX_FAILURES_SHOWN = 5  # of one round, in its line; the table at the end has them all


def _bars_with_notes(console: Console) -> Progress:
    """Return the bars of a run: name, bar, count, times and a note; none where the output is no terminal."""
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.quiet,
    )


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Print what is cached and what is not, a line each."""
    for note in notes:
        console.print(f"cache: {note}", style="dim", highlight=False, soft_wrap=True)


class BarsDisplay:
    """What shows work that goes on for long: a context manager around bars.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        """Prepare the bars; nothing is shown before ``with``."""
        self.console = console
        self._metric = "accuracy"
        self._progress = _bars_with_notes(console)
        self._work: TaskID | None = None
        self._entered = contextlib.ExitStack()
        self._depth = 0

    def __enter__(self) -> Self:
        """Show the bars, and be told of work in this process; once, however often it is entered."""
        if self._depth == 0:
            self._entered.callback(self._progress.stop)
            self._progress.start()
            self._entered.enter_context(watched_by(self.work_done))
        self._depth += 1
        return self

    def work_done(self, what: str, done: int, total: int | None) -> None:
        """Move the bar of the work that goes on just now: loading, an evaluation, a client's steps."""
        if self._work is None:
            self._work = self._progress.add_task(what, total=total, note="")
        if done == 0:
            self._progress.reset(self._work, description=what, total=total)
        self._progress.update(self._work, completed=done, visible=done != total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away, also after an error or an interrupt; the lines stay."""
        self._depth -= 1
        if self._depth == 0:
            self._entered.close()


class RunDisplay(BarsDisplay):
    """Shows a run: a context manager that the server tells what happens.

    Args:
        console: where to print; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Prepare the bars; nothing is shown before ``with``."""
        super().__init__(console or Console())
        self._num_rounds: int | None = None
        self._wire_bytes = 0
        self._failed = 0
        self._rounds: TaskID = self._progress.add_task("rounds", total=None, note="")
        self._clients: TaskID = self._progress.add_task("clients", total=None, note="", visible=False)

    def run_started(
        self,
        num_rounds: int,
        *,
        headline_metric: str = "accuracy",
        notes: Sequence[str] = (),
    ) -> None:
        """Say how many rounds there are, which metric leads, and what is cached.

        Args:
            num_rounds: the last round's number.
            headline_metric: key of the metric in the lines of ``round_done``.
            notes: one for each cache, printed.
        """
        self._num_rounds, self._metric, self._wire_bytes = num_rounds, headline_metric, 0
        print_notes(self.console, notes)
        self._progress.update(self._rounds, total=num_rounds)

    def rounds_before(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Say after which round the run goes on; what was sent before counts."""
        done = lines[-1]["server_round"]
        self._wire_bytes = sum(map(wire_bytes, lines))
        self.console.print(f"resumed after round {done}", highlight=False, soft_wrap=True)
        self._progress.update(self._rounds, completed=done)

    def round_started(self, server_round: int, cohort_size: int, phase: str = "train") -> None:
        """Start counting the replies of a round's cohort; ``phase`` names what the clients do."""
        self._failed = 0
        self._progress.reset(self._clients, total=cohort_size, description=phase, visible=True, note="")
        self._progress.update(self._rounds, description=f"round {server_round}")

    def client_done(self, client_id: int, status: str) -> None:
        """Count one client's reply; ``status`` is ``ok`` or ``failed``."""
        if status != "ok":
            self._failed += 1
            self._progress.update(self._clients, note=f"{self._failed} failed, last: client {client_id}")
        self._progress.advance(self._clients)

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """Print a round's line, and move the bar of rounds."""
        self._wire_bytes += wire_bytes(metrics)
        server_round = metrics["server_round"]
        self.console.print(self._line(metrics), highlight=False, soft_wrap=True)
        value = metrics.get(self._metric)
        shown = (
            f"{metric_label(self._metric)} {format_metric(self._metric, value)}  "
            if value is not None
            else ""
        )
        self._progress.update(
            self._rounds, completed=server_round, note=f"{shown}{format_bytes(self._wire_bytes)} sent"
        )
        self._progress.update(self._clients, visible=False)

    def _line(self, metrics: Mapping[str, Any]) -> Text:
        of = f"/{self._num_rounds}" if self._num_rounds is not None else ""
        width = len(str(self._num_rounds or ""))
        line = Text(f"round {metrics['server_round']:>{width}}{of}", style="bold")
        parts = []
        for key in (self._metric, "train_loss"):
            if metrics.get(key) is not None:
                rows = " (clients' rows)" if key == self._metric and SCORED_BY in metrics else ""
                parts.append((f"{metric_label(key)} {format_metric(key, metrics[key])}{rows}", ""))
        cohort, failed = metrics.get("cohort"), metrics.get("failed") or []
        if cohort:
            parts.append((f"{len(cohort)} clients", ""))
        if failed:
            parts.append((f"{len(failed)} failed", "red"))
        parts.append((f"{format_bytes(self._wire_bytes)} sent", ""))
        if metrics.get("seconds") is not None:
            parts.append((format_seconds(metrics["seconds"]), ""))
        for text, style in parts:
            line.append("  ").append(text, style=style or "not bold")
        for failure in failed[:MAX_FAILURES_SHOWN]:
            reason = str(failure.get("reason", "no reason given")).strip().splitlines() or [""]
            line.append(f"\n  client {failure['client_id']}: {reason[0]}", style="not bold red")
        if len(failed) > MAX_FAILURES_SHOWN:
            line.append(f"\n  and {len(failed) - MAX_FAILURES_SHOWN} more", style="not bold red")
        return line


def print_results(
    console: Console,
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    ledger: Ledger | None = None,
) -> None:
    """Print the tables of a finished run: rounds, failed clients, what was sent and saved.

    Args:
        console: where to print.
        metrics: the lines of ``metrics.jsonl``.
        summary: the content of ``summary.json``.
        ledger: the transfers; without them bytes come from ``metrics``.
    """
    metric = str(summary.get("headline_metric", "accuracy"))
    print_table(console, round_table(metrics, metric, ledger), "Rounds")
    kind = kind_of(metrics)
    if kind is PERSONAL:
        print_note(console, f"{kind.table_note}\n")
    failures = failure_table(metrics, ledger)
    if failures.rows:
        print_table(console, failures, "Failed clients")
    communication = summary.get("communication") or {}
    rows = communication.get("comparison") or []
    if rows:
        print_table(console, saving_table(rows), f"What travels (saved: against {FULL_MODEL})")
    for line in _closing_lines(metric, summary, kind, rows):
        print_note(console, line)


def print_note(console: Console, note: str | Text) -> None:
    """Print a sentence, its words wrapped at the console's width; nothing in it is read as markup."""
    console.print(Text(note) if isinstance(note, str) else note, highlight=False)


def print_where(console: Console, folder: Path) -> None:
    """Say where a run's folder is, and its report if it has one."""
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(f"report:     {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _closing_lines(
    metric: str, summary: Mapping[str, Any], kind: RunKind, rows: Sequence[Mapping[str, Any]]
) -> Iterator[Text]:
    """Yield what was reached and sent, on which rows, and what was saved."""
    label, before = metric_label(metric), format_metric(metric, summary.get("zero_shot"))
    line = Text(f"{label} " if kind is PERSONAL else f"{label} {before} → ")
    line.append(format_metric(metric, summary.get("final")), style="bold")
    sent = (summary.get("communication") or {}).get("total_wire_bytes")
    if sent is not None:
        line.append(f", {format_bytes(sent)} sent")
    if (simulated := summary.get("simulated_seconds")) is not None:
        line.append(f", {format_seconds(simulated)} of simulated time")
    yield line
    if stopped := summary.get("stopped"):
        yield Text(str(stopped))
    if kind is PERSONAL:
        yield Text(f"that is {kind.model}; {kind.before}: {before}")
    if rows:
        percent, sent_more = saving(rows[0]["saving"])
        against = f"more sent than {FULL_MODEL}" if sent_more else f"saved against {FULL_MODEL}"
        with_base = format_saving(rows[0]["saving_with_base"])
        yield Text(f"{percent} {against} ({with_base} with the base model counted)")


def print_table(console: Console, content: TextTable, title: str) -> None:
    """Print a table of text, as wide as the console at most where that cuts no number.

    Columns that may be left out go first, then long words are folded. A table of too many numbers runs over
    the console's edge. Nothing in the table is read as markup.
    """
    table = _laid_out(content, title)
    for head in content.optional:
        if _width(console, table).maximum <= console.width:
            break
        content = content.without(head)
        table = _laid_out(content, title)
    too_wide = _width(console, table).minimum - console.width
    if too_wide > 0 and content.words:
        longest = {number: _longest_in_column(content, number) for number in content.words}
        widest = max(longest, key=longest.__getitem__)
        table.columns[widest].max_width = max(MIN_WORDS, longest[widest] - too_wide)
    needed = _width(console, table).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False, overflow="ignore", no_wrap=True)
    console.print()


def _laid_out(content: TextTable, title: str) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(content.columns):
        words = number in content.words
        widest = max((len(row[number]) for row in content.rows), default=0)
        header = column if words else "\n".join(textwrap.wrap(column, max(widest, _longest_word(column) + 1)))
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(
            Text(header),
            justify=justify,
            vertical="top",
            overflow="fold",
            no_wrap=not words,
            min_width=None if words else max(widest, *map(len, header.split("\n"))),
        )
    for row in content.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _width(console: Console, table: Table) -> Measurement:
    return Measurement.get(console, console.options.update(width=MAX_COLUMNS), table)


def _longest_in_column(content: TextTable, number: int) -> int:
    return max(max((len(word) for word in row[number].split()), default=0) for row in content.rows)


def _longest_word(text: str) -> int:
    return max((len(word) for word in re.split(r"[\s-]", text)), default=0)

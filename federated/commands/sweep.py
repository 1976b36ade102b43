"""The command ``fedlora sweep``: many runs, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from federated.commands.importing import PluginsOption, modules_that_stay
from federated.config.plugins import load_plugins
from models.progress import is_quiet

if TYPE_CHECKING:
    from federated.results.records import RunRecord
    from federated.results.tables import TextTable
    from federated.tools.study_plan import PlannedRun

_KEY_VALUES = "KEY=[VALUE,VALUE]"


def sweep(  # noqa: PLR0913 - options of a command
    source: Annotated[
        str,
        typer.Argument(metavar="STUDY|CONFIG", help="A study or a configuration: its file or shipped name."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for all runs, such as federation.rounds=3."),
    ] = None,
    *,
    grid: Annotated[
        list[str] | None, typer.Option(metavar=_KEY_VALUES, help="Every combination of these values; repeat.")
    ] = None,
    zipped: Annotated[
        list[str] | None,
        typer.Option("--zip", metavar=_KEY_VALUES, help="Values that go together, in their order; repeat."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(metavar=_KEY_VALUES, help="Each variant chooses of these on the validation split."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|[SEED,SEED]", help="How many seeds, from 0 on, or which.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="What the others are compared with, such as fedavg.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Cost-to-Target: the metric to reach, such as 0.65 or 65%.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Quality-under-Budget: what may be sent, such as 5MB.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace finished runs that have other settings now.")
    ] = False,
    plugin: PluginsOption = None,
) -> None:
    r"""Run a study: variants by seeds, and a table with intervals. What is finished stays; start it again.

    Example: fedlora sweep quickstart --grid aggregation.name=\[fedavg,ffa] --seeds 5 --jobs 2
    """
    with modules_that_stay():
        from federated.results.lasting_console import lasting_console
        from federated.results.study_page import write_page, write_tables
        from federated.tools.study_plan import plan_study
        from federated.tools.sweep_runs import run_study

        load_plugins(plugin or ())
    given = {
        "baseline": baseline,
        "target": target,
        "budget": budget,
        **_combinations(grid, zipped, tune, seeds),
    }
    study = plan_study(source, overrides or [], **{key: v for key, v in given.items() if v not in (None, {})})
    console = lasting_console()
    with SweepDisplay(console) as display:
        results = run_study(study, display, jobs=jobs, overwrite=overwrite)
    tables, notes = write_tables(results, study.folder, target=study.file.target, budget=study.file.budget)
    _print_tables(console, tables, notes)
    page = write_page(results, study.folder, tables, notes)
    console.print(f"study: {page}", highlight=False, soft_wrap=True)
    if is_quiet():
        typer.echo(str(page))
    for name, reason in results.failures.items():
        line = Text(f"failed: {name}: {reason}", style="red")
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    if results.failures:
        raise typer.Exit(1)


def _combinations(
    grid: Sequence[str] | None, zipped: Sequence[str] | None, tune: str | None, seeds: str | None
) -> dict[str, Any]:
    """Return what the options say of a study's runs, by key of the study."""
    from federated.config.study_file import key_and_values
    from models.untrusted import parse_yaml

    return {
        "grid": dict(key_and_values(text, "--grid") for text in grid or ()),
        "zip": dict(key_and_values(text, "--zip") for text in zipped or ()),
        "tune": None
        if tune is None
        else dict(zip(("key", "values"), key_and_values(tune, "--tune"), strict=True)),
        "seeds": None if seeds is None else parse_yaml(seeds, "the value of --seeds"),
    }


def _print_tables(console: Console, tables: Mapping[str, TextTable], notes: Sequence[str]) -> None:
    from federated.results.console import print_note, print_table

    console.print()
    for title, table in tables.items():
        print_table(console, table, title)
    for note in notes:
        print_note(console, note)


class SweepDisplay:
    """Shows a study: a line for each run and, in a terminal, a bar for all.

    The bar is drawn when something happens and not by a thread, for runs are forked from this process.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        """Prepare the bar; nothing is shown before ``with``."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._progress.add_task("runs", total=None, note="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._progress.stop()

    def runs_planned(self, num_runs: int, what: str) -> None:
        """Begin a bar."""
        self._progress.reset(self._task, total=num_runs, description=what)

    def tick(self, running: Sequence[str]) -> None:
        """Name what runs."""
        self._progress.update(self._task, note=", ".join(running))
        self._progress.refresh()

    def run_done(self, run: PlannedRun, record: RunRecord, *, kept: bool) -> None:
        """Print a run's line."""
        from federated.results.wording import format_bytes, format_metric, format_seconds, metric_label

        headline, sent = record.headline, record.ledger.total().wire_bytes
        parts = [
            f"{metric_label(record.metric)} {format_metric(record.metric, headline['final'])}",
            f"{format_bytes(sent)} sent",
            "finished before" if kept else format_seconds(headline["seconds"]),
        ]
        self._line(run.name, "  ".join(parts), "not bold")

    def run_failed(self, run: PlannedRun, reason: str) -> None:
        """Print why a run failed."""
        self._line(run.name, f"failed: {reason}", "not bold red")

    def value_chosen(self, variant: str, key: str, value: Any) -> None:
        """Print what a variant chose."""
        self.console.print(f"{variant}: chose {key}={value}", highlight=False, soft_wrap=True)

    def _line(self, name: str, text: str, style: str) -> None:
        line = Text(name, style="bold").append(f"  {text}", style=style)
        self.console.print(line, highlight=False, soft_wrap=True)
        self._progress.advance(self._task)

"""The command ``fedlora``: its version, run, resume, fork, show-config, info, report.

Everything a person types ends up here; the other commands (``federated.commands``) are registered below.
Commands only read arguments, call one function of the package and print. Bad input ends with one message
and exit code 2.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from federated.commands import checking, data, exporting, inference, status, sweep, train_and_evaluate
from federated.commands.importing import PluginsOption, modules_that_stay, read_config
from federated.commands.json_output import JsonOption, print_json
from federated.commands.verbosity import add_verbosity, usual_verbosity
from federated.config.plugins import load_plugins, plugins_at_fault
from models.errors import ROUND_FAILURE, NoRoomError, UserError, printable
from models.files import NO_ROOM
from models.interrupts import StopRequested, stoppable
from models.progress import is_quiet

if TYPE_CHECKING:
    from federated.results.console import RunDisplay

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name such as quickstart.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides such as federation.rounds=3 client.batch_size=16."
    ),
]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedlora {importlib.metadata.version('fedlora')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """Federated fine-tuning of CLIP-class models in which only LoRA adapters travel."""


_TELL_OF_FAILURES = ("federated.methods.checks", "federated.engines.inprocess", "federated.rounds.strategy")
"""Loggers that warn of clients whose answers cannot be used; those records have ``ROUND_FAILURE``."""


@app.command()
def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run folder of the same name.")
    ] = False,
    plugin: PluginsOption = None,
) -> None:
    """Run a federated fine-tuning and write its folder.

    Example: fedlora run quickstart federation.rounds=3 output.name=short
    """
    loaded = read_config(config, overrides, plugin)
    with modules_that_stay():
        from federated.engines.simulation import run_experiment
        from federated.results.run_place import run_path
    path = run_path(loaded.output.root, loaded.output.name or "run")
    _play(path, lambda display: run_experiment(loaded, overwrite=overwrite, display=display))


@app.command()
def resume(
    run_folder: RunArgument, overrides: OverridesArgument = None, *, plugin: PluginsOption = None
) -> None:
    """Go on with a run that was stopped or killed, or with more rounds; it ends as if it had never stopped.

    Example: fedlora resume runs/quickstart

    Example: fedlora resume runs/quickstart federation.rounds=20
    """
    with modules_that_stay():
        from federated.engines.simulation import resume_experiment

        load_plugins(plugin or ())
    _play(run_folder, lambda display: resume_experiment(run_folder, overrides or [], display=display))


@app.command()
def fork(
    run_folder: RunArgument,
    overrides: OverridesArgument = None,
    *,
    at: Annotated[int, typer.Option("--at", min=0, metavar="ROUND", help="The last round that both share.")],
    name: Annotated[str, typer.Option("--name", help="Name of the branch's folder, beside the run's.")],
    plugin: PluginsOption = None,
) -> None:
    """Branch a run after a round: another run that goes on from there with other settings.

    Example: fedlora fork runs/quickstart --at 3 --name slower client.learning_rate=1e-4
    """
    with modules_that_stay():
        from federated.engines.simulation import fork_experiment
        from federated.results.run_place import beside

        load_plugins(plugin or ())
    _play(
        beside(run_folder) / name,
        lambda display: fork_experiment(run_folder, at, name, overrides or [], display=display),
    )


@app.command("show-config")
def show_config(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="As for run; without it the shipped ones are listed."),
    ] = None,
    overrides: OverridesArgument = None,
    *,
    as_json: JsonOption = False,
    plugin: PluginsOption = None,
) -> None:
    """Print the resolved configuration, defaults included; without CONFIG, which configurations are shipped.

    Example: fedlora show-config quickstart lora.r=4
    """
    from federated.config.config_files import dump_config, load_config, shipped_descriptions
    from federated.results.console import print_table
    from federated.results.tables import TextTable

    load_plugins(plugin or ())
    if config is None:
        rows = tuple(shipped_descriptions().items())
        if as_json:
            print_json([{"config": name, "description": words} for name, words in rows])
            return
        table = TextTable(("CONFIG", "what it is"), rows, frozenset({0, 1}))
        print_table(Console(), table, "Shipped configurations")
        return
    loaded = load_config(config, overrides or [])
    if as_json:
        print_json(loaded.model_dump(mode="json"))
        return
    typer.echo(dump_config(loaded), nl=False)


@app.command()
def info(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    as_json: JsonOption = False,
    plugin: PluginsOption = None,
) -> None:
    """Print parameter counts and the bytes that a run will send, round by round, without training.

    Example: fedlora info clip_lora model.pretrained=false

    Example: fedlora info quickstart aggregation.name=flora federation.rounds=20 --json
    """
    loaded = read_config(config, overrides, plugin)
    with modules_that_stay():
        from federated.results.console import print_note, print_table
        from federated.tools.inspection import closing_note, describe_run, description_tables
    description = describe_run(loaded)
    if as_json:
        print_json(description.record)
        return
    console = Console()
    for title, table in description_tables(description):
        print_table(console, table, title)
    print_note(console, closing_note(description))


@app.command()
def report(run_folder: RunArgument) -> None:
    """Write report.html and plots/ of a run again, from its files.

    Example: fedlora report runs/quickstart
    """
    from federated.results.report import write_report

    typer.echo(write_report(run_folder))


app.command()(train_and_evaluate.train)
app.command()(train_and_evaluate.evaluate)
app.command()(status.status)
app.command()(checking.doctor)
app.command()(sweep.sweep)
inference.register(app)
app.command()(exporting.export)
app.add_typer(data.app, name="data")
add_verbosity(app)


def _play(folder: Path, rounds: Callable[[RunDisplay], Path]) -> None:
    """Show a run that is played, and what came of it; a signal or a full disk leaves what can be resumed.

    Args:
        folder: Of the run.
        rounds: Plays it, or what is left of it.

    Raises:
        UserError: As ``rounds`` does, or no update could be used in any round.
    """
    from federated.results.console import RunDisplay, print_results, print_where
    from federated.results.lasting_console import lasting_console
    from federated.results.records import read_run
    from federated.results.run_log import logged
    from federated.results.run_place import can_be_resumed

    console = lasting_console()
    try:
        with stoppable(), _failures_shown_once(), RunDisplay(console) as display:
            rounds(display)
    except StopRequested as stop:
        quoted = shlex.quote(str(folder))
        remedy = "no round was done: start it again"
        if (folder / "summary.json").is_file():
            remedy = f"it is complete; its report can be drawn with: fedlora report {quoted}"
        if can_be_resumed(folder):
            remedy = f"continue with: fedlora resume {quoted}"
        with logged(folder) if folder.is_dir() else contextlib.nullcontext():
            console.print(f"stopped by {stop.name}; {remedy}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(stop.exit_code) from stop
    except NoRoomError as error:
        if not can_be_resumed(folder):
            raise
        remedy = f"free some, then: fedlora resume {shlex.quote(str(folder))}"
        raise NoRoomError(f"{error}. The last commit is whole: {remedy}") from error
    with logged(folder):
        record = read_run(folder)
        print_results(console, record.metrics, record.summary, record.ledger)
        print_where(console, folder)
        if is_quiet():
            typer.echo(str(folder))
        _print_skipped(console, record.metrics, folder)


@contextlib.contextmanager
def _failures_shown_once() -> Iterator[None]:
    """Keep failed clients out of the log inside the block: the display names them, round by round."""

    def is_not_displayed(record: logging.LogRecord) -> bool:
        return not hasattr(record, ROUND_FAILURE)

    loggers = [logging.getLogger(name) for name in _TELL_OF_FAILURES]
    for each in loggers:
        each.addFilter(is_not_displayed)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(is_not_displayed)


def _print_skipped(console: Console, metrics: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Say how many rounds were skipped, and why the first was.

    Raises:
        UserError: All of them were.
    """
    skipped = [line for line in metrics if line.get("skipped")]
    if not skipped:
        return
    num_rounds = metrics[-1]["server_round"]
    failure, server_round = skipped[0]["failed"][0], skipped[0]["server_round"]
    reason = str(failure["reason"]).strip().partition("\n")[0]
    cause = f"round {server_round}, client {failure['client_id']}: {reason}"
    if len(skipped) == num_rounds:
        raise UserError(
            f"no update could be used in any round, so the model is as it was before training. {cause}. "
            f"{folder / 'metrics.jsonl'} has the other clients' reasons"
        )
    message = f"{len(skipped)} of {num_rounds} rounds were skipped, as no update could be used. {cause}"
    console.print(Text(message, style="red"), highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; ends with exit code 2 on bad input, with 1 where a disk is full."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal cannot show ends nothing
            stream.reconfigure(errors="replace")
    usual_verbosity()
    try:
        with plugins_at_fault():
            app(args=None if arguments is None else list(arguments), prog_name="fedlora")
    except (UserError, OSError) as error:  # of the latter: a name that is too long, a full disk, ...
        message = Text.assemble(("error:", "bold red"), f" {printable(str(error))}")
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        is_full = isinstance(error, NoRoomError) or getattr(error, "errno", None) in NO_ROOM
        sys.exit(1 if is_full else 2)


if __name__ == "__main__":
    main()

"""The commands ``fedlora train`` and ``fedlora evaluate``; ``federated.cli`` registers them.

They read arguments, call one function of the package and print, as every command does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from federated.commands.importing import PluginsOption, Precision, modules_that_stay, read_config
from federated.commands.json_output import JsonOption, print_json
from federated.config.plugins import load_plugins
from federated.results.console import BarsDisplay, print_notes, print_where
from federated.results.lasting_console import lasting_console
from federated.results.wording import format_metric, format_seconds, metric_label
from models.progress import is_quiet, progress_bar

OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides such as train.epochs=3 client.learning_rate=1e-4."
    ),
]


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name such as quickstart.")
    ],
    overrides: OverridesArgument = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run folder of the same name.")
    ] = False,
    plugin: PluginsOption = None,
) -> None:
    """Train centrally: one client with all the data, the upper bound of a federated run.

    The folder is NAME-central unless the configuration names it (output.name).

    Example: fedlora train quickstart train.epochs=5 train.early_stopping.patience=2
    """
    loaded = read_config(config, overrides, plugin, name_suffix="-central")
    with modules_that_stay():
        from federated.tools.central import train_centrally
    console = lasting_console()
    with EpochDisplay(console) as display:
        folder = train_centrally(loaded, overwrite=overwrite, display=display)
    console.print(closing_line(folder), highlight=False, soft_wrap=True)
    print_where(console, folder)
    if is_quiet():
        typer.echo(str(folder))


def evaluate(  # noqa: PLR0913 - the command's options
    source: Annotated[
        str, typer.Argument(metavar="RUN|CONFIG", help="The folder of a run, or a configuration.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="What may differ: evaluation.batch_size=50 data.max_test_samples=500 model.device=cuda …",
        ),
    ] = None,
    *,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Evaluate with this adapter instead of the run's.")
    ] = None,
    any_base: Annotated[
        bool,
        typer.Option("--any-base", help="Use an adapter on a base model that is not known to be its own."),
    ] = False,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write; RUN/evaluation_SPLIT by default.")
    ] = None,
    as_json: JsonOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation.")] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of the forward passes: bf16 and fp16 are half (autocast).")
    ] = Precision.fp32,
    plugin: PluginsOption = None,
) -> None:
    """Evaluate a trained model: per-class report, confusion matrix, or recalls for retrieval.

    A configuration without --adapter is evaluated untrained (zero-shot).

    Example: fedlora evaluate runs/quickstart

    Example: fedlora evaluate runs/quickstart evaluation.batch_size=50 --output figures --json

    Example: fedlora evaluate quickstart --adapter runs/quickstart/adapter_best --output best
    """
    with modules_that_stay():
        from federated.communication.run_files import read_run_file
        from federated.tools.evaluation import RESULTS_FILE, evaluate_source

        load_plugins(plugin or ())
    with progress_bar("images") as report_progress:
        folder, report = evaluate_source(
            source,
            overrides or [],
            adapter=adapter,
            any_base=any_base,
            split=split,
            output=output,
            overwrite=overwrite,
            precision=precision.value,
            report=report_progress,
        )
    if as_json:
        print_json({"folder": str(folder), **read_run_file(folder / RESULTS_FILE)})
        return
    typer.echo(report)
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".svg", ".pdf"):  # beside each PNG
            typer.echo(str(path))


class EpochDisplay(BarsDisplay):
    """Shows a central training: bars in a terminal, and a line an epoch everywhere.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        """Prepare the bars; nothing is shown before ``with``."""
        super().__init__(console)
        self._num_epochs = 0
        self._steps = self._progress.add_task("steps", total=None, note="")

    def training_started(
        self, num_epochs: int, num_steps: int, *, headline_metric: str, notes: Sequence[str] = ()
    ) -> None:
        """Say how long it takes, which metric leads, and what is cached."""
        self._num_epochs, self._metric = num_epochs, headline_metric
        print_notes(self.console, notes)
        self._progress.update(self._steps, total=num_steps)

    def step_done(self, loss: float) -> None:
        """Move the bar by a step."""
        self._progress.update(self._steps, advance=1, note=f"loss {format_metric('loss', loss)}")

    def epoch_done(self, metrics: Mapping[str, Any]) -> None:
        """Print an epoch's line."""
        epoch = metrics["server_round"]
        line = Text(f"epoch {epoch:>{len(str(self._num_epochs))}}/{self._num_epochs}", style="bold")
        label = metric_label(self._metric)
        for key, words in (
            (self._metric, label),
            (f"validation_{self._metric}", f"validation {label}"),
            ("train_loss", "train loss"),
        ):
            if metrics.get(key) is not None:
                line.append(f"  {words} {format_metric(key, metrics[key])}", style="not bold")
        line.append(f"  {format_seconds(metrics['seconds'])}", style="not bold")
        self.console.print(line, highlight=False, soft_wrap=True)
        self._progress.update(self._steps, description=f"epoch {epoch}")


def closing_line(folder: Path) -> Text:
    """Return the last line of a central training: before, after, and which epoch was kept."""
    from federated.results.records import read_run

    record = read_run(folder)
    metric, headline, training = record.metric, record.headline, record.summary["training"]
    line = Text(f"{metric_label(metric)} {format_metric(metric, headline['zero_shot'])} → ")
    line.append(format_metric(metric, headline["final"]), style="bold")
    line.append(f" (weights of epoch {training['kept_epoch']}")
    line.append(f", stopped early after {headline['rounds']})" if training["stopped_early"] else ")")
    return line

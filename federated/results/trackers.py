"""Trackers of experiments as callbacks of a run: Weights & Biases, MLflow; TensorBoard is the run folder's.

Their own environment variables (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME``) say where they write, whether they are offline, and under which project. A tracker
that fails during a run is warned of once and left out: the run folder has every value.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from federated.config.config_files import dotted
from federated.results.callbacks import Callback
from models.errors import UserError, install_command
from models.files import BestEffort

PROJECT = "fedlora"
"""Project, or experiment, where the environment names none."""
_MOST_PARAMETERS = 100  # that MLflow takes at once
_MOST_CHARACTERS = 500  # of a parameter's value there


class Tracker(Protocol):
    """What keeps the values of one run somewhere else."""

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        """Keep a round's numbers."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Finish the run there; without a summary it did not come to its end."""


class WandbTracker:
    """A run of Weights & Biases.

    Args:
        wandb: The package.
        name: Of the run.
        settings: Dotted key -> value.
    """

    def __init__(self, wandb: Any, name: str, settings: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(project=project, name=name, config=dict(settings))

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        """Keep a round's numbers."""
        self._run.log(dict(values), step=server_round)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Keep the summary and finish the run."""
        self._run.summary.update(_numbers(summary or {}))
        self._run.finish(exit_code=1 if summary is None else 0)


class MlflowTracker:
    """A run of MLflow.

    Args:
        mlflow: The package.
        name: Of the run.
        settings: Dotted key -> value.
    """

    def __init__(self, mlflow: Any, name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None)
        parameters = [(key, str(value)[:_MOST_CHARACTERS]) for key, value in settings.items()]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            mlflow.log_params(dict(parameters[first : first + _MOST_PARAMETERS]))

    def log(self, values: Mapping[str, float], server_round: int) -> None:
        """Keep a round's numbers."""
        self._mlflow.log_metrics(dict(values), step=server_round)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Keep the summary, its keys beginning with ``summary_``, and finish the run."""
        numbers = {f"summary_{key}": value for key, value in _numbers(summary or {}).items()}
        if numbers:
            self._mlflow.log_metrics(numbers)
        self._mlflow.end_run(status="FAILED" if summary is None else "FINISHED")


TRACKERS: Mapping[str, Callable[[Any, str, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
"""Name, which package and extra have too -> what makes a tracker of the package, a name and settings."""


class _Following:
    """Tells a tracker of a run, best effort; a ``Callback``."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._summary: Mapping[str, Any] | None = None
        self._tracker: Tracker | None = None
        with self._attempt("starting"):
            self._tracker = make()

    def round_started(self, server_round: int, num_clients: int) -> None:
        """Do nothing: trackers keep values."""

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            attempt = self._attempt("writing to")
            with attempt:
                self._tracker.log(_numbers(metrics), metrics["server_round"])
            if attempt.failed:
                self._tracker = None

    def run_done(self, summary: Mapping[str, Any]) -> None:
        self._summary = summary

    def close(self) -> None:
        if self._tracker is not None:
            with self._attempt("closing"):
                self._tracker.close(self._summary)

    def _attempt(self, doing: str) -> BestEffort:
        return BestEffort(f"{doing} {self._name}", "; the run folder has every value")


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that the packages of trackers are there, before a run starts.

    Raises:
        UserError: One is not installed; says how to install it.
    """
    for name in names:
        if name in TRACKERS:
            _package(name)


@contextlib.contextmanager
def tracked(names: Sequence[str], run_folder: Path, config: Mapping[str, Any]) -> Iterator[list[Callback]]:
    """Yield what follows a run for its trackers; they are closed at the end of the block.

    Args:
        names: ``output.trackers``; those of ``TRACKERS`` count.
        run_folder: The run's; its name is the run's name there.
        config: The configuration as a tree.

    Raises:
        UserError: The package of one is not installed.
    """
    settings = dict(dotted(config))
    with contextlib.ExitStack() as stack:
        followers: list[Callback] = []
        for name in names:
            if name in TRACKERS:
                make = functools.partial(TRACKERS[name], _package(name), run_folder.name, settings)
                following = _Following(name, make)
                followers.append(stack.enter_context(contextlib.closing(following)))
        yield followers


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"output.trackers names {name}, and the package {error.name} is not installed: "
            f"{install_command(name)}; or leave {name} out"
        ) from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "server_round"
    }

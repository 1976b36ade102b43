"""Runs from Python: ``run`` starts one, ``resume`` goes on with one, ``open_run`` reads one back."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from federated.config.config_files import dotted, load_config, parse_config
from federated.config.plugins import load_plugins
from federated.config.schema import ExperimentConfig
from federated.results.callbacks import Callback
from federated.results.records import RunRecord, read_run
from federated.results.wording import format_bytes, format_metric

if TYPE_CHECKING:
    from federated.results.console import RunDisplay
    from models.federated_model import FederatedModel


@dataclass(frozen=True)
class RunResult:
    """A run's folder as Python objects; a notebook shows it as its report does.

    Attributes:
        folder: The run folder.
    """

    folder: Path

    @cached_property
    def record(self) -> RunRecord:
        """Every file of the run folder, parsed."""
        return read_run(self.folder)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty while the run is not finished."""
        return self.record.summary

    @property
    def config(self) -> ExperimentConfig:
        """The run's resolved configuration."""
        return load_config(self.folder / "config.yaml")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a round, from round 0, before training: the metrics, the bytes and the seconds of each."""
        rows = [
            {key: value for key, value in line.items() if not isinstance(value, list | dict)}
            | {"cohort_size": len(line.get("cohort", ())), "num_failed": len(line.get("failed", ()))}
            for line in self.record.metrics
        ]
        return pd.DataFrame(rows).set_index("server_round")

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row for each round and client that took part: what the client reported."""
        rows = [
            {"server_round": line["server_round"], "client_id": int(client_id), **values}
            for line in self.record.metrics
            for client_id, values in line.get("clients", {}).items()
        ]
        return pd.DataFrame(rows)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """One row a transfer, as in ``communication.csv``."""
        return pd.DataFrame([asdict(row) for row in self.record.ledger.rows])

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's format."""
        return self.folder / "adapter"

    @cached_property
    def model(self) -> FederatedModel:
        """The trained model, ready to predict and to evaluate."""
        from federated.tools.trained_models import model_of_run

        return model_of_run(self.folder, self.adapter)

    def __repr__(self) -> str:
        """Say where it is and what came out."""
        return f"RunResult({self.folder}: {self._headline()})"

    def _repr_html_(self) -> str:
        """Show what the report shows: headline figures, pictures, tables."""
        from federated.results.notebook_view import run_html

        return run_html(self.record)

    def _headline(self) -> str:
        """Return the metric before and after, and the bytes sent."""
        record, headline = self.record, self.record.headline
        values = [format_metric(record.metric, headline[key]) for key in ("zero_shot", "final")]
        sent = format_bytes(record.ledger.total().wire_bytes)
        ending = "" if record.finished else ", not finished"
        rounds = f"{headline['rounds']} round{'' if headline['rounds'] == 1 else 's'}"
        return f"{record.metric} {values[0]} → {values[1]} in {rounds}, {sent} sent{ending}"


def run(
    config: str | Path | Mapping[str, Any] | ExperimentConfig = "quickstart",
    *,
    overwrite: bool = False,
    show_progress: bool = True,
    plugins: Sequence[str | Path] = (),
    callbacks: Sequence[Callback] = (),
    **sections: Any,
) -> RunResult:
    """Run a federated fine-tuning in this process and return what it left.

    Args:
        config: The name of a shipped configuration, a YAML file, a mapping of sections, or a configuration.
        overwrite: Replace an earlier run's folder of the same name.
        show_progress: Show bars and a line a round.
        plugins: Python files that register what the configuration names; they stay loaded in this process.
        callbacks: Told when rounds start, when they are done, and of the end.
        **sections: What differs from ``config``, by section: ``client={"learning_rate": 1e-3}, seed=1``.

    Returns:
        The run: its metrics and ledger as pandas frames, its adapter, its model.

    Raises:
        UserError: The configuration, a plugin, the data or the model is unusable, or the folder exists.
    """
    from federated.engines.simulation import run_experiment

    load_plugins(plugins)
    loaded = config_from(config, **sections)
    with _display(show_progress) as display:
        folder = run_experiment(loaded, overwrite=overwrite, display=display, callbacks=callbacks)
    return RunResult(folder)


def resume(folder: str | Path, *, show_progress: bool = True, **sections: Any) -> RunResult:
    """Go on with a run that was stopped or killed, or with more rounds; it ends as if it had never stopped.

    Args:
        folder: The run folder.
        show_progress: As in ``run``.
        **sections: Keys that may differ from here on, by section: ``federation={"rounds": 20}``.

    Raises:
        UserError: Nothing can be resumed there, a key may not change, or data or weights are others.
    """
    from federated.engines.simulation import resume_experiment

    overrides = [f"{key}={json.dumps(value)}" for key, value in dotted(sections)]
    with _display(show_progress) as display:
        return RunResult(resume_experiment(Path(folder), overrides, display=display))


@contextlib.contextmanager
def _display(show: bool) -> Iterator[RunDisplay | None]:
    """Yield what shows progress, on for as long as the block lasts; None where nothing is shown."""
    if not show:
        yield None
        return
    from federated.results.console import RunDisplay
    from federated.results.lasting_console import lasting_console

    with RunDisplay(lasting_console()) as display:
        yield display


def open_run(folder: str | Path) -> RunResult:
    """Return an earlier run, finished or not.

    Raises:
        UserError: The folder is no run folder, or one of its files cannot be read.
    """
    result = RunResult(Path(folder))
    _ = result.record  # a folder that cannot be read is refused here
    return result


def config_from(
    config: str | Path | Mapping[str, Any] | ExperimentConfig, **sections: Any
) -> ExperimentConfig:
    """Return a configuration with some sections' keys replaced.

    Args:
        config: As in ``run``.
        **sections: As in ``run``; an empty mapping replaces the section's mapping.

    Raises:
        UserError: There is no such configuration, section or key, or a value does not fit.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in dotted(sections)]
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    tree = (
        config.model_dump(mode="json")
        if isinstance(config, ExperimentConfig)
        else copy.deepcopy(dict(config))
    )
    return parse_config(tree, source="the configuration given", overrides=overrides)

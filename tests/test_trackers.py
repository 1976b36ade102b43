"""Trackers keep what metrics.jsonl has; callbacks are told of each round once; neither costs a run files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import federated
from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from federated.results.callbacks import Followers
from federated.results.trackers import tracked
from federated.tools.central import train_centrally
from models.errors import UserError
from tests.small_run import SMALL, small_config

TINY = ("federation.rounds=2", "partition.num_clients=2", "client.local_steps=1", "output.report=false")


class FakeWandb:
    """What of W&B the tracker uses, remembered."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def init(self, **arguments: Any) -> FakeWandb:
        self.started = arguments
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeMlflow:
    """What of MLflow the tracker uses, remembered, with its limits."""

    def __init__(self) -> None:
        self.experiment = self.run_name = self.status = ""
        self.parameters: dict[str, str] = {}
        self.logged: list[tuple[int | None, dict[str, float]]] = []

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def active_run(self) -> None:
        return None

    def start_run(self, run_name: str, nested: bool) -> None:
        assert not nested
        self.run_name = run_name

    def log_params(self, values: Mapping[str, str]) -> None:
        assert len(values) <= 100
        assert all(len(value) <= 500 for value in values.values())
        self.parameters |= values

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(values)))

    def end_run(self, status: str) -> None:
        self.status = status


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    found = SimpleNamespace(wandb=FakeWandb(), mlflow=FakeMlflow())
    for name, package in vars(found).items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of a round."""
    return {k: v for k, v in line.items() if isinstance(v, int | float) and k != "server_round"}


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_trackers_hold_every_number_of_every_round(packages: SimpleNamespace, tmp_path: Path) -> None:
    config = small_config(tmp_path, overrides=[*TINY, "output.trackers=[wandb, mlflow]"])
    run = run_experiment(config)
    expected = [(line["server_round"], numbers(line)) for line in rounds(run)]
    assert packages.wandb.logged == expected
    assert packages.mlflow.logged[: len(expected)] == expected
    assert packages.wandb.started["project"] == packages.mlflow.experiment == "fedlora"
    assert packages.wandb.started["name"] == packages.mlflow.run_name == "quickstart"
    assert packages.wandb.started["config"]["client.local_steps"] == 1
    assert packages.mlflow.parameters["client.local_steps"] == "1"
    final = json.loads((run / "summary.json").read_text())["final"]
    assert packages.wandb.summary["final"] == packages.mlflow.logged[-1][1]["summary_final"] == final
    assert (packages.wandb.exit_code, packages.mlflow.status) == (0, "FINISHED")
    assert not list(run.glob("events.out.*"))  # tensorboard was not named


def test_projects_are_named_by_the_environment(
    packages: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "yours")
    with tracked(("wandb", "mlflow"), tmp_path, {}):
        pass
    assert (packages.wandb.started["project"], packages.mlflow.experiment) == ("mine", "yours")
    assert (packages.wandb.exit_code, packages.mlflow.status) == (1, "FAILED")  # no summary came


def test_a_missing_package_is_named_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"trackers names wandb.*not installed: pip install .*\[wandb\]"):
        run_experiment(small_config(tmp_path, overrides=["output.trackers=[wandb]"]))
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused_by_the_configuration() -> None:
    with pytest.raises(UserError, match=r"output\.trackers.*tensorboard"):
        load_config("quickstart", ["output.trackers=[comet]"])


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_and_left_out(
    at: str, packages: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    setattr(packages.wandb, at, fail)
    with caplog.at_level(logging.WARNING), tracked(("wandb",), tmp_path, {}) as followers:
        for server_round in range(3):
            followers[0].round_done({"server_round": server_round, "accuracy": 0.5})
    assert len([record for record in caplog.records if "no network" in record.getMessage()]) == 1


def test_central_training_is_tracked_too(packages: SimpleNamespace, tmp_path: Path) -> None:
    few = [
        *SMALL,
        f"output.root={tmp_path}",
        "train.steps=2",
        "output.trackers=[wandb]",
        "output.report=false",
    ]
    run = train_centrally(load_config("quickstart", few, name_suffix="-central"))
    assert packages.wandb.logged == [(line["server_round"], numbers(line)) for line in rounds(run)]
    assert packages.wandb.exit_code == 0


# ---- callbacks


class Diary:
    """A user's callback."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.lines: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def round_started(self, server_round: int, num_clients: int) -> None:
        self.started.append((server_round, num_clients))

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        self.lines.append(dict(metrics))

    def run_done(self, summary: Mapping[str, Any]) -> None:
        self.summary = dict(summary)


def test_a_callback_is_told_of_each_round_once_and_of_the_end(tmp_path: Path) -> None:
    diary = Diary()
    config = small_config(tmp_path, overrides=TINY)
    result = federated.run(config, show_progress=False, callbacks=[diary])
    assert diary.started == [(1, 2), (2, 2)]  # clients' evaluation is no second start
    assert json.loads(json.dumps(diary.lines)) == rounds(result.folder)
    assert json.loads(json.dumps(diary.summary)) == result.summary


def test_what_a_callback_raises_ends_the_run(tmp_path: Path) -> None:
    class Stop(Diary):
        def round_done(self, metrics: Mapping[str, Any]) -> None:
            if metrics["server_round"] == 1:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_experiment(small_config(tmp_path, overrides=TINY), callbacks=[Stop()])
    assert len(rounds(tmp_path / "quickstart")) == 2


def test_the_display_is_told_first_and_of_every_broadcast() -> None:
    told: list[str] = []
    display = SimpleNamespace(
        round_started=lambda *args: told.append(f"display {args[2]}"),
        round_done=lambda line: told.append("display"),
    )
    callback = SimpleNamespace(
        round_started=lambda *args: told.append("callback"), round_done=lambda line: told.append("callback")
    )
    followers = Followers(display, [callback])  # type: ignore[arg-type]
    followers.round_started(1, 2, "train")
    followers.round_started(1, 2, "evaluate")
    followers.round_done({})
    assert told == ["display train", "callback", "display evaluate", "display", "callback"]

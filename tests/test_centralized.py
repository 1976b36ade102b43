"""Claims about central training: what it writes, what it keeps, when it stops, and that it repeats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import federated.rounds.batches
import federated.tools.central
from federated.cli import main
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.simulation import limited_threads, run_experiment
from federated.results.compare import compare_runs
from federated.results.run_folder import RunFolder
from federated.rounds.early_stopping import BestSoFar
from federated.rounds.local_training import Assignment, train_locally
from federated.rounds.run import Run, build_run
from federated.tools.central import central_config, train_centrally
from models.errors import UserError

SMALL = (
    "train.epochs=2",
    "client.batch_size=16",
    "data.max_train_samples=128",
    "data.max_validation_samples=60",
    "data.max_test_samples=60",
)


def small_config(folder: Path, *overrides: str) -> ExperimentConfig:
    return load_config("quickstart", [*SMALL, f"output.root={folder}", *overrides])


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures, which take longer than these trainings."""
    monkeypatch.setattr("federated.results.report.write_report", lambda path: path)


@pytest.fixture(scope="module")
def central(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_centrally(small_config(tmp_path_factory.mktemp("runs")))


def test_the_folder_is_that_of_a_run(central: Path) -> None:
    names = {path.name for path in central.iterdir()}
    promised = {"config.yaml", "environment.json", "summary.json", "metrics.jsonl", "communication.csv"}
    assert promised | {"partition.json", "checkpoint", "adapter", "report.html", "plots"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [path for path in central.rglob("*") if ".part" in path.name]


def test_there_is_a_line_an_epoch_and_training_raises_accuracy(central: Path) -> None:
    lines, summary = lines_of(central), summary_of(central)
    assert [line["server_round"] for line in lines] == [0, 1, 2]
    assert [line["steps"] for line in lines] == [0, 8, 16]
    assert all({"accuracy", "loss", "validation_accuracy", "validation_loss"} <= set(line) for line in lines)
    assert summary["zero_shot"] == lines[0]["accuracy"]
    assert summary["final"] == lines[summary["training"]["kept_epoch"]]["accuracy"]
    assert summary["final"] > summary["zero_shot"] + 0.1
    assert summary["parameters"]["exchanged"] == 0
    right = sum(row["accuracy"] * row["num_examples"] for row in summary["per_class"])
    assert right / sum(row["num_examples"] for row in summary["per_class"]) == pytest.approx(summary["final"])


@pytest.mark.usefixtures("without_report")
def test_a_central_run_stands_beside_a_federated_one(central: Path, tmp_path: Path) -> None:
    overrides = ["federation.rounds=1", "partition={name: iid, num_clients: 2}", "client.local_steps=2"]
    rows = compare_runs([central, run_experiment(small_config(tmp_path, *overrides))]).rows
    assert [row.metric for row in rows] == ["accuracy", "accuracy"]
    assert rows[0].zero_shot == rows[1].zero_shot
    assert rows[0].uplink_wire_bytes == 0 < rows[1].uplink_wire_bytes
    assert rows[0].exchanged_parameters == 0
    assert [row.kind for row in rows] == ["central", "federated"]


@pytest.mark.usefixtures("without_report")
def test_the_saved_configuration_repeats_the_run_byte_for_byte(central: Path, tmp_path: Path) -> None:
    again = train_centrally(load_config(central / "config.yaml", [f"output.root={tmp_path}"]))
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/head.safetensors",
        "checkpoint/state.safetensors",
    ):
        assert (again / name).read_bytes() == (central / name).read_bytes(), name
    assert [{**line, "seconds": 0} for line in lines_of(again)] == [
        {**line, "seconds": 0} for line in lines_of(central)
    ]


@pytest.mark.usefixtures("without_report")
def test_another_seed_gives_another_run(central: Path, tmp_path: Path) -> None:
    other = train_centrally(small_config(tmp_path, "seed=1", "train.steps=8"))
    assert lines_of(other)[1]["train_loss"] != lines_of(central)[1]["train_loss"]


@pytest.mark.usefixtures("without_report")
def test_an_epoch_in_one_place_is_a_single_client_s_local_training(tmp_path: Path) -> None:
    config = small_config(tmp_path, "train.epochs=1", "client.local_steps=8", "train.keep_best=false")
    run = train_centrally(config)
    experiment = build_run(central_config(config))
    assert np.array_equal(experiment.shards[0].train, np.arange(128))
    with limited_threads(config.engine.threads):
        alone = train_locally(experiment, Assignment(client_id=0, server_round=1), experiment.wire_state())
    trained = load_file(run / "checkpoint" / "state.safetensors")
    assert trained.keys() == alone.state.keys()
    assert all(torch.equal(trained[name], alone.state[name]) for name in trained)


@pytest.mark.usefixtures("without_report")
def test_steps_take_the_place_of_epochs_and_cut_the_last_one_short(tmp_path: Path) -> None:
    run = train_centrally(small_config(tmp_path, "train.steps=11", "train.evaluate_every=2"))
    lines = lines_of(run)
    assert [line["steps"] for line in lines] == [0, 8, 11]
    assert ["accuracy" in line for line in lines] == [True, False, True]
    assert summary_of(run)["training"]["steps"] == 11


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, without_report: None) -> list[dict[str, float]]:
    """Validation metrics, one evaluation after the other, in place of real ones; training does nothing."""
    script: list[dict[str, float]] = []
    upcoming: list[Iterator[dict[str, float]]] = []

    def evaluate_rows(run: Run, split: str, rows: Any = None) -> dict[str, float]:
        if split == "test":
            return {"accuracy": 0.5, "loss": 1.0, "num_examples": 1.0}
        if not upcoming:
            upcoming.append(iter(script))
        return {**next(upcoming[0]), "num_examples": 1.0}

    for module in (federated.rounds.batches, federated.tools.central):
        monkeypatch.setattr(module, "evaluate_rows", evaluate_rows)
    return script


def test_the_best_validation_epoch_is_kept_and_patience_ends_training(
    tmp_path: Path, scripted: list[dict[str, float]]
) -> None:
    scripted += [{"accuracy": a, "loss": 0.0} for a in (0.1, 0.4, 0.6, 0.5, 0.6, 0.9)]
    run = train_centrally(
        small_config(
            tmp_path, "train.epochs=9", "data.max_train_samples=32", "train.early_stopping.patience=2"
        )
    )
    training = summary_of(run)["training"]
    assert [line["server_round"] for line in lines_of(run)] == [
        0,
        1,
        2,
        3,
        4,
    ]  # the tie of epoch 4 is no gain
    assert (training["kept_epoch"], training["stopped_early"]) == (2, True)
    assert training["validation_accuracy"] == 0.6
    with safe_open(run / "checkpoint" / "state.safetensors", framework="pt") as file:
        assert file.metadata()["server_round"] == "2"
        head = file.get_tensor("head.weight")
    assert torch.equal(load_file(run / "adapter" / "head.safetensors")["head.weight"], head)


def test_another_metric_may_decide_and_a_loss_is_better_lower(
    tmp_path: Path, scripted: list[dict[str, float]]
) -> None:
    scripted += [{"accuracy": a, "loss": b} for a, b in ((0.1, 3.0), (0.9, 2.0), (0.2, 1.0), (0.3, 4.0))]
    overrides = ("train.epochs=3", "data.max_train_samples=32", "train.early_stopping.metric=loss")
    training = summary_of(train_centrally(small_config(tmp_path, *overrides)))["training"]
    assert (training["kept_epoch"], training["stopped_early"]) == (2, False)


def test_the_last_epoch_stays_where_the_best_is_not_to_be_kept(
    tmp_path: Path, scripted: list[dict[str, float]]
) -> None:
    scripted += [{"accuracy": a, "loss": 0.0} for a in (0.1, 0.9, 0.2)]
    overrides = ("train.epochs=2", "data.max_train_samples=32", "train.keep_best=false")
    assert summary_of(train_centrally(small_config(tmp_path, *overrides)))["training"]["kept_epoch"] == 2


def test_an_unknown_metric_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"early_stopping\.metric=f1.*accuracy, loss"):
        train_centrally(small_config(tmp_path, "train.early_stopping.metric=f1"))


def test_best_so_far_needs_more_than_the_minimum_change_to_reset_its_patience() -> None:
    follow = BestSoFar("accuracy", patience=2, minimum_change=0.1)
    assert [follow.update(epoch, value) for epoch, value in enumerate((0.5, 0.55, 0.58))] == [True] * 3
    assert follow.is_exhausted
    assert (follow.best, follow.best_epoch) == (0.58, 2)
    follow.update(3, 0.7)
    assert not follow.is_exhausted


def test_best_so_far_never_takes_a_nan_and_never_stops_without_patience() -> None:
    follow = BestSoFar("loss")
    assert not follow.update(0, float("nan"))
    assert follow.update(1, 2.0)
    assert not any(follow.update(epoch, 2.0 + epoch) for epoch in range(2, 20))
    assert not follow.is_exhausted


def test_a_source_without_validation_gives_up_a_part_of_train(tmp_path: Path) -> None:
    config = central_config(small_config(tmp_path, "data={source: digits, options: {test_fraction: 0.2}}"))
    experiment = build_run(config.model_copy(update={"model": config.model}))
    data = experiment.data
    assert data.validation is not None
    assert len(data.validation) == pytest.approx(0.1 * (len(data.train) + len(data.validation)), abs=1)
    assert config.data.validation_fraction == 0.1


def test_a_loss_that_is_no_number_stops_training_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.clip.FederatedCLIPModel.train_step", lambda *_: float("nan"))
    with pytest.raises(UserError, match=r"nan at step 1: lower client\.learning_rate"):
        train_centrally(small_config(tmp_path))


def test_an_existing_folder_is_refused_before_anything_is_loaded_and_replaced_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, "train.steps=1", "data.max_train_samples=32")
    RunFolder(tmp_path / "quickstart", config).close()
    with monkeypatch.context() as patch:
        patch.setattr("federated.tools.central.build_run", lambda config: pytest.fail("was loaded"))
        with pytest.raises(UserError, match="--overwrite"):
            train_centrally(config)
    assert (train_centrally(config, overwrite=True) / "summary.json").is_file()


def test_the_command_prints_plain_lines_and_does_not_share_the_federated_run_s_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "train.steps=2", "data.max_train_samples=64", f"output.root={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        main(["train", "quickstart", *arguments])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "epoch 0/1" in printed
    assert "epoch 1/1  accuracy" in printed
    assert "validation accuracy" in printed
    assert "\x1b" not in printed
    assert (tmp_path / "quickstart-central" / "report.html").is_file()
    with pytest.raises(SystemExit) as refused:
        main(["train", "quickstart", *arguments])
    assert refused.value.code == 2

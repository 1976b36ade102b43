"""TensorBoard shows a run's scalars in groups, the bytes so far, and its settings with what came of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from federated.engines.simulation import resume_experiment, run_experiment
from federated.results.event_tags import scalars, tag_of
from federated.tools.central import train_centrally
from tests.small_run import small_config


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ["output.report=false", "lora.r=4"]
    return run_experiment(small_config(tmp_path_factory.mktemp("runs"), overrides=overrides))


def values(run: Path, tag: str) -> list[float]:
    return [event.value for event in read(run).Scalars(tag)]


def test_tags_are_grouped_and_hold_the_lines_values(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tags = read(run).Tags()["scalars"]
    groups = {"evaluation", "training", "communication", "aggregation", "clients", "time"}
    assert {tag.partition("/")[0] for tag in tags} == groups
    assert values(run, "evaluation/accuracy") == pytest.approx([line["accuracy"] for line in lines])
    assert values(run, "training/loss") == pytest.approx([line["train_loss"] for line in lines[1:]])
    assert values(run, "clients/cohort") == [0, 3, 3]
    up = [line["uplink_wire_bytes"] / 1e6 for line in lines]
    assert values(run, "communication/uplink_megabytes") == pytest.approx(up)


def test_the_bytes_so_far_end_at_the_runs_total(run: Path) -> None:
    total = json.loads((run / "summary.json").read_text())["communication"]["total_wire_bytes"]
    so_far = values(run, "communication/total_megabytes")
    assert so_far == sorted(so_far)
    assert so_far[-1] == pytest.approx(total / 1e6)


def test_the_bytes_so_far_go_on_where_a_run_goes_on(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(run, folder)
    resume_experiment(folder, ["federation.rounds=3"])
    total = json.loads((folder / "summary.json").read_text())["communication"]["total_wire_bytes"]
    so_far = values(folder, "communication/total_megabytes")
    assert len(so_far) == 4
    assert so_far[-1] == pytest.approx(total / 1e6)


def test_settings_and_what_they_are_judged_by_are_there(run: Path) -> None:
    found = read(run).summary_metadata
    tags = {tag for tag in found if tag.startswith("_hparams_/")}
    assert tags == {f"_hparams_/{part}" for part in ("experiment", "session_start_info", "session_end_info")}
    start = plugin_data_pb2.HParamsPluginData.FromString(
        found["_hparams_/session_start_info"].plugin_data.content
    )
    settings = start.session_start_info.hparams
    assert settings["lora.r"].number_value == 4
    assert settings["aggregation.name"].string_value == "fedavg"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        found["_hparams_/experiment"].plugin_data.content
    )
    judged = {info.name.tag for info in experiment.experiment.metric_infos}
    assert {"evaluation/accuracy", "communication/total_megabytes"} <= judged


def test_a_central_training_has_validation_and_no_communication(tmp_path: Path) -> None:
    overrides = ["train.epochs=1", "output.report=false"]
    folder = train_centrally(small_config(tmp_path, overrides=overrides))
    tags = read(folder).Tags()["scalars"]
    assert {"validation/accuracy", "evaluation/accuracy", "training/steps"} <= set(tags)
    assert not any(tag.startswith("communication/") for tag in tags)


def test_what_was_sent_before_counts() -> None:
    line = {"server_round": 3, "uplink_wire_bytes": 1_000_000, "downlink_wire_bytes": 500_000}
    assert scalars(line, 4_000_000)["communication/total_megabytes"] == 5.5
    assert tag_of("image_to_text_recall_at_5") == "evaluation/image_to_text_recall_at_5"

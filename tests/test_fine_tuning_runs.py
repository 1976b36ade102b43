"""Claims about the fine-tuning strategies in a federation: each one runs, and its bytes are comparable."""

from __future__ import annotations

from pathlib import Path

import pytest

from federated.config.schema import ExperimentConfig
from federated.engines.simulation import run_experiment
from federated.results.records import RunRecord, read_run
from tests.small_run import small_config

OVERRIDES = {
    "full": ["model.type=clip", "model.fine_tuning=full"],
    "vision_and_projection": ["model.type=clip", "model.fine_tuning=vision_and_projection"],
    "text_and_projection": [
        "model.type=clip",
        "model.fine_tuning=text_and_projection",
        "task.name=zero_shot",
    ],
    "lora": ["lora.target_components=[vision, text]", "task.name=zero_shot"],
    "head_only": ["model.type=clip", "model.fine_tuning=head_only"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: read_run(run_experiment(_config(folder, name, overrides)))
        for name, overrides in OVERRIDES.items()
    }


def _config(folder: Path, name: str, overrides: list[str]) -> ExperimentConfig:
    model = ["model.type=clip_lora"] if name == "lora" else ["model.type=clip", f"model.fine_tuning={name}"]
    short = ["federation.rounds=1", "evaluation.clients=false", f"output.name={name}"]
    return small_config(folder, overrides=[*short, *model, *overrides])


@pytest.mark.slow
def test_every_strategy_federates_and_sends_what_it_trains(runs: dict[str, RunRecord]) -> None:
    num_clients, num_bytes = 3, 4
    for name, run in runs.items():
        parameters = run.summary["parameters"]
        assert parameters["exchanged"] == parameters["trainable"] > 0, name
        payload = run.ledger.total(direction="uplink").payload_bytes
        assert payload == pytest.approx(num_clients * num_bytes * parameters["exchanged"], rel=0.01), (
            name
        )  # three clients, fp32


@pytest.mark.slow
def test_strategies_are_ordered_by_what_they_send(runs: dict[str, RunRecord]) -> None:
    sent = {name: run.ledger.total().wire_bytes for name, run in runs.items()}
    assert sent["full"] > sent["vision_and_projection"] > sent["lora"] > sent["head_only"]
    assert sent["full"] > sent["text_and_projection"] > sent["lora"]

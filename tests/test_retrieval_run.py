"""Claims about the federated retrieval run: it learns a language that the model does not know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.data.sources import embedded
from federated.engines.simulation import run_experiment
from federated.rounds.run import build_run
from federated.tools.evaluation import evaluate_source
from lora.adapters import factor_pairs

SMALL = (
    "data.options={language: vi, vendors: [noto], test_vendors: [noto]}",
    "partition.num_clients=3",
    "federation.rounds=2",
    "client.local_steps=25",
    "client.batch_size=32",
    "evaluation.clients=false",
)


def small_config(folder: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    return load_config("retrieval_vi", [*SMALL, f"output.root={folder}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(small_config(tmp_path_factory.mktemp("runs")))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_recall_on_concepts_that_no_client_saw_rises_clearly(run: Path) -> None:
    lines = lines_of(run)
    for direction in ("image_to_text", "text_to_image"):
        before, after = lines[0][f"{direction}_recall_at_10"], lines[-1][f"{direction}_recall_at_10"]
        assert after > 2 * max(before, 0.035), (direction, before, after)  # guessing: 10 of 286
    assert lines[-1]["train_loss"] < lines[1]["train_loss"]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["headline_metric"] == "image_to_text_recall_at_5"
    assert summary["final"] > 2 * summary["zero_shot"]


def test_captions_are_vietnamese_and_no_test_concept_is_trained_on(tmp_path: Path) -> None:
    data = build_run(small_config(tmp_path)).data
    assert not set(data.train["concept"]) & set(data.test["concept"])
    names = embedded.captions("vi")
    assert all(names[row["concept"]] == row["caption"] for row in data.test.remove_columns("image"))
    assert len(set(data.test["concept"])) == len(data.test)  # every caption is once in the gallery


def test_one_override_trains_on_chinese_captions(tmp_path: Path) -> None:
    overrides = ["data.options.language=zh", "output.name=zh"]
    config = small_config(tmp_path, overrides)
    names = embedded.captions("zh")
    data = build_run(config).data
    assert all(names[row["concept"]] == row["caption"] for row in data.train.remove_columns("image"))
    lines = lines_of(run_experiment(config))
    assert lines[-1]["image_to_text_recall_at_10"] > 2 * max(lines[0]["image_to_text_recall_at_10"], 0.035)


def test_only_text_adapters_travel_and_images_keep_their_features(tmp_path: Path) -> None:
    experiment = build_run(small_config(tmp_path))
    names = experiment.model.exchanged_names
    assert len(factor_pairs(names)) == 2 * 6 + 1  # two blocks of six layers, and the projection
    assert all(name.startswith(("clip.text_model.", "clip.text_projection.")) for name in names)
    pixel_values = experiment.reader.test_images.pixel_values(range(4))
    with torch.no_grad():
        before = experiment.model.encode_image(pixel_values)
        experiment.model.set_state({n: torch.ones_like(t) for n, t in experiment.initial_state.items()})
        assert torch.equal(experiment.model.encode_image(pixel_values), before)


def test_evaluation_reports_recall_by_k_beside_guessing(run: Path) -> None:
    folder, report = evaluate_source(run)
    results = json.loads((folder / "evaluation_results.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert results["image_to_text_recall_at_5"] == pytest.approx(summary["final"], abs=1e-9)
    assert results["num_images"] == results["num_texts"] == results["num_examples"] == 286
    assert results["chance_recall"]["image_to_text"]["10"] == pytest.approx(10 / 286)
    assert "guessing" in report
    assert (folder / "recall_by_k.png").stat().st_size > 10_000

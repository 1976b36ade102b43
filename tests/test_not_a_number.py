"""What is not a number is never an answer: commands refuse it, runs write null, readers cope with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from federated.results.compare import compare_runs
from federated.results.records import read_run
from federated.results.report import write_report
from federated.results.round_record import best_value
from federated.tools.detailed_metrics import embed_pairs, predict_classes
from federated.tools.embeddings import embed_texts
from federated.tools.prediction import make_classifier
from federated.tools.search import nearest_rows
from federated.tools.trained_models import OpenedModel
from lora.adapter_files import read_adapter
from lora.adapter_saving import save_lora_adapters
from lora.config import LoRAConfig
from lora.injection import inject_lora
from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.files import json_text, write_json
from models.tasks import TASKS

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
DIVERGING = (
    "federation.rounds=1",
    "partition={name: iid, num_clients: 2}",
    "partition.local_test_fraction=0.5",
    "client.local_steps=1",
    "client.learning_rate=1e20",
    "aggregation.max_update_ratio=1e30",
    "data.max_train_samples=40",
    "data.max_test_samples=20",
    "evaluation.clients=true",
)


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def damaged(folder: Path, task: str, bad: float, where: str) -> FederatedCLIPModel:
    model = FederatedCLIPModel(
        str(folder), 3, class_names=("cat", "dog", "red car"), task=task, strategy="lora"
    )
    with torch.no_grad():
        dict(model.named_parameters())[where].view(-1)[0] = bad
    return model


def batches(model: FederatedCLIPModel) -> Iterator[dict[str, Tensor]]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenize(["a cat", "a dog", "a red car"])
    yield {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2]), **tokens}


@BAD
@pytest.mark.parametrize(
    ("task", "where"),
    [
        ("classification", "head.weight"),
        ("classification", "clip.visual_projection.weight"),
        ("zero_shot", "clip.text_projection.weight"),
        ("retrieval", "clip.visual_projection.weight"),
        ("retrieval", "clip.text_projection.weight"),
    ],
)
def test_an_evaluation_of_values_that_are_no_numbers_has_no_metric(
    task: str, where: str, bad: float, small_clip_folder: Path
) -> None:
    model = damaged(small_clip_folder, task, bad, where)
    metrics = model.evaluate(batches(model))
    assert metrics.pop("num_examples") == 3
    assert all(math.isnan(metrics[name]) for name in metrics if name != "loss")
    assert not math.isfinite(metrics["loss"])
    details = embed_pairs if task == "retrieval" else predict_classes
    with pytest.raises(UserError, match="not finite"):
        details(model, batches(model))


def test_a_sound_model_has_metrics(small_clip_folder: Path) -> None:
    for task in (name for name, task in TASKS.items() if task.family == "clip"):
        model = FederatedCLIPModel(
            str(small_clip_folder), 3, class_names=("cat", "dog", "red car"), task=task
        )
        assert all(math.isfinite(value) for value in model.evaluate(batches(model)).values())


def test_prompts_texts_and_searches_that_are_no_numbers_are_refused(small_clip_folder: Path) -> None:
    model = damaged(small_clip_folder, "zero_shot", math.nan, "clip.text_projection.weight")
    embeddings = torch.eye(3)
    embeddings[1, 0] = math.nan
    uses: list[Callable[[], object]] = [
        lambda: make_classifier(OpenedModel(model)),
        lambda: embed_texts(model, ["a cat"]),
        lambda: nearest_rows(embeddings, torch.ones(3), 2),
    ]
    for use in uses:
        with pytest.raises(UserError, match="not finite"):
            use()


def test_json_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, (-math.inf, 1.5)],
        "c": np.float64("nan"),
        "d": True,
        "e": 10**400,
    }
    wanted = {"a": None, "b": [None, [None, 1.5]], "c": None, "d": True, "e": 10**400}
    assert strict(json_text(value)) == wanted
    write_json(tmp_path / "file.json", value)
    assert strict((tmp_path / "file.json").read_text()) == wanted
    assert json_text({"b": 0.1, "a": [1]}, sort_keys=True) == json.dumps({"b": 0.1, "a": [1]}, sort_keys=True)


def test_metrics_in_an_adapter_file_are_json(tmp_path: Path) -> None:
    model = FederatedCLIPModel("tiny", 2, task="zero_shot", strategy="lora")
    inject_lora(model, LoRAConfig(r=2))
    save_lora_adapters(model, tmp_path, metrics={"accuracy": math.nan})
    assert read_adapter(tmp_path).metadata["metrics"] == {"accuracy": None}


def test_the_best_value_is_a_number_where_there_is_one() -> None:
    lines = [{"accuracy": 0.5}, {}, {"accuracy": math.nan}]
    assert best_value(lines, "accuracy", default=0.1) == 0.5
    assert math.isnan(best_value(lines[1:], "accuracy", default=0.1))
    assert best_value([], "accuracy", default=0.1) == 0.1


def test_a_run_that_diverges_reports_no_accuracy_and_leaves_json(tmp_path: Path) -> None:
    run = run_experiment(load_config("quickstart", [*DIVERGING, f"output.root={tmp_path}"]))
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["accuracy"] > 0.1
    assert (lines[1]["accuracy"], lines[1]["loss"]) == (None, None)
    assert not any("accuracy" in client for client in lines[1]["clients"].values())
    assert all("its eval_loss is nan" in failure["reason"] for failure in lines[1]["failed"])
    summary = strict((run / "summary.json").read_text())
    assert (summary["final"], summary["best"]) == (None, summary["zero_shot"])
    record = read_run(run)
    assert (record.headline["final"], record.headline["best"]) == (None, lines[0]["accuracy"])
    write_report(run)
    assert compare_runs([run]).rows[0].final is None


def test_files_of_older_versions_with_nan_are_read(tmp_path: Path) -> None:
    rows = ({"server_round": 0, "accuracy": 0.5}, {"server_round": 1, "accuracy": math.nan})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_run(tmp_path)
    assert record.metrics[1]["accuracy"] is None
    assert (record.headline["final"], record.headline["best"]) == (None, 0.5)


def test_a_run_whose_clients_could_not_score_themselves_at_the_end_has_no_result(tmp_path: Path) -> None:
    overrides = [*DIVERGING, "aggregation.name=fedsa", f"output.root={tmp_path}", "output.report=false"]
    run = run_experiment(load_config("quickstart", overrides))
    summary = strict((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["zero_shot"] is not None
    assert summary["final"] is None
    assert summary["best"] is None

"""Federations of models that answer questions: every method, codec and command that other models have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.simulation import run_experiment
from federated.results.run_place import _is_written
from federated.rounds.run import build_run
from models.errors import UserError
from tests.command import fedlora

SMALL = (
    *("model={type: vqa_lora, options: {}}", "federation.cohort_size=null", "engine.workers=1"),
    *("data.max_train_samples=80", "data.max_test_samples=24", "partition.num_clients=2"),
    *(
        "partition={name: iid, local_test_fraction: 0.1}",
        "federation={rounds: 2}",
        "evaluation={every: 1, max_samples: null}",
    ),
    *("client={local_steps: 2, batch_size: 8, learning_rate: 3e-3}", "output.report=false"),
    *(
        "lora={r: 2, lora_alpha: 4, lora_dropout: 0.1, target_components: [text, vision]}",
        "lora.target_modules=null",
    ),
)
METHODS = ("fedavg", "ffa", "fedex", "flexlora", "fedsa")


def small(folder: Path, *overrides: str, name: str = "easy_vqa") -> ExperimentConfig:
    """A run of two clients and two rounds."""
    return load_config(name, ["partition.options={}", *SMALL, f"output.root={folder}", *overrides])


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_it(tmp_path: Path, method: str) -> None:
    decoder = ["model.options={decoder: lora}"] if method in ("fedex", "flexlora") else []
    folder = run_experiment(small(tmp_path, f"aggregation.name={method}", *decoder))
    lines = lines_of(folder)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "exact_match" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "topk:0.25:ef+int8"])
def test_codecs_and_fedprox_carry_it(tmp_path: Path, codec: str) -> None:
    lines = lines_of(
        run_experiment(small(tmp_path, f"communication.uplink={codec}", "client.proximal_mu=0.1"))
    )
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_workers_give_the_same_adapters_as_one_process(tmp_path: Path) -> None:
    one = run_experiment(small(tmp_path, "output.name=one"))
    two = run_experiment(small(tmp_path, "output.name=two", "engine.workers=2"))
    for file in ("adapter_model.safetensors", "head.safetensors"):
        first, second = (load_file(folder / "adapter" / file) for folder in (one, two))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(small(tmp_path_factory.mktemp("runs")))


def test_a_run_that_goes_on_ends_as_one_that_never_stopped(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_experiment(small(tmp_path, "federation.rounds=1"))
    status, _, error = fedlora(capsys, "resume", first, "federation.rounds=2")
    assert status == 0, error
    mine, theirs = (load_file(run / "adapter" / "head.safetensors") for run in (first, finished))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_evaluation_stands_beside_answers_that_look_at_no_picture(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed, error = fedlora(capsys, "evaluate", finished)
    assert status == 0, error
    assert all(word in printed for word in ("most frequent answer", "question only", "yes/no", "colour"))
    results = json.loads((finished / "evaluation_test" / "evaluation_results.json").read_text())
    assert results["exact_match"] == pytest.approx(lines_of(finished)[-1]["exact_match"])
    right = build_run(small(finished.parent)).data.test["answer"][:]
    assert sum(found["rows"] for found in results["by_type"].values()) == len(right)
    assert results["baselines"]["majority"]["exact_match"] == max(map(right.count, ("yes", "no"))) / len(
        right
    )
    assert (finished / "evaluation_test" / "confusion_matrix.png").is_file()
    for path in (finished / "evaluation_test").iterdir():
        assert _is_written(f"evaluation_test/{path.name}"), "--overwrite would refuse the folder"


def test_a_question_about_an_image_is_answered(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_run(small(finished.parent))
    row = run.data.test[0]
    file = finished / "asked.png"
    row["image"].save(file)
    question = ["--image", file, "--question", row["question"]]
    status, printed, error = fedlora(capsys, "predict", finished, *question)
    assert status == 0, error
    status, as_json, _ = fedlora(capsys, "predict", finished, *question, "--json")
    assert json.loads(as_json)["answer"] == printed.strip()
    status, _, error = fedlora(capsys, "predict", finished, *question, "--output", "a.csv")
    assert status == 2
    assert "--output" in error
    status, _, error = fedlora(capsys, "predict", finished, "--question", "what?")
    assert status == 2
    assert "--image" in error


def test_info_counts_what_travels(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["model.options={text_model: vinai/bartpho-syllable, head: generation}", "model.num_classes=3"]
    status, printed, error = fedlora(
        capsys, "info", "easy_vqa", "model.model_name=openai/clip-vit-base-patch32", *options,
        "lora={r: 16, lora_alpha: 32, target_components: [text]}", "lora.target_modules=null",
    )  # fmt: skip
    assert status == 0, error
    assert "1,179,648" in printed


def test_patches_of_a_frozen_tower_are_computed_once_and_change_nothing(tmp_path: Path) -> None:
    frozen = "lora={r: 2, lora_alpha: 4, target_components: [text]}"
    kept, plain = (
        build_run(small(tmp_path, frozen, f"cache.image_features={on}")).reader for on in ("true", "false")
    )
    rows = np.arange(24)
    first, second = kept.batch("test", rows), plain.batch("test", rows)
    assert "patches" in first
    assert "pixel_values" in second
    model = build_run(small(tmp_path, frozen)).model
    torch.testing.assert_close(model.evaluate(first), model.evaluate(second))
    torch.testing.assert_close(model(first), model(second))
    assert torch.equal(first["patches"], kept.batch("test", rows)["patches"])


def test_patches_of_a_tower_that_trains_are_not_kept(tmp_path: Path) -> None:
    for overrides in ([], ["model.type=vqa", "lora={}"]):
        reader = build_run(small(tmp_path, *overrides)).reader
        assert "pixel_values" in reader.training_batch(np.arange(4), np.random.default_rng(0))
        assert "every step" in reader.notes[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.options={unfreeze_encoder_layers: 1}"], "unfreeze_encoder_layers=0"),
        (["model.options={decodre: full}"], "did you mean 'decoder'"),
        (["model.options={head: guess}"], "model.options.head"),
        (["model.fine_tuning=half", "model.type=vqa"], "half"),
        (["data.source=digits"], "'question'"),
        (["client.augmentation={flip_probability: 0.5}"], "client.augmentation"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_run(small(tmp_path, *overrides))

"""Claims about detailed evaluation: it agrees with the run and with a naive oracle; what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from federated.cli import main
from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from federated.results.plot_style import save_figure
from federated.tools.central import train_centrally
from federated.tools.detailed_metrics import (
    Predictions,
    chance_recall,
    describe_classes,
    describe_retrieval,
    embed_pairs,
)
from federated.tools.evaluation import evaluate_source
from federated.tools.evaluation_plots import MAX_BARS, ClassFigures, class_performance, confusion_matrix
from models.errors import UserError
from models.metrics import retrieval_set

SMALL = ("data.max_train_samples=96", "data.max_validation_samples=60", "data.max_test_samples=80")
PICTURES = {
    f"{name}.{end}" for name in ("confusion_matrix", "class_performance") for end in ("png", "svg", "pdf")
}
FILES = {"evaluation_report.txt", "evaluation_results.json", *PICTURES}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def central(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return train_centrally(load_config("quickstart", [*SMALL, "train.epochs=2", f"output.root={root}"]))


@pytest.fixture(scope="module")
def federated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = (
        "federation.rounds=1",
        "partition={name: iid, num_clients: 2}",
        "client.local_steps=3",
        "aggregation.name=fedex",
        f"output.root={tmp_path_factory.mktemp('runs')}",
    )
    return run_experiment(load_config("quickstart", [*SMALL, *overrides]))


def test_an_evaluation_writes_its_files_and_finds_what_the_run_wrote_down(central: Path) -> None:
    folder, report = evaluate_source(central)
    assert folder == central / "evaluation_test"
    assert {path.name for path in folder.iterdir()} == FILES
    assert results_of(folder)["accuracy"] == pytest.approx(summary_of(central)["final"], abs=1e-9)
    assert "Ankle boot" in report
    assert "macro avg" in report
    for name in ("confusion_matrix.png", "class_performance.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(maxcolors=100_000) or []) > 10


def test_a_run_that_merged_into_the_base_is_evaluated_as_it_is_finished_or_not(
    federated_run: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(federated_run, unfinished)
    shutil.rmtree(unfinished / "adapter")
    (unfinished / "summary.json").unlink()
    folder, _ = evaluate_source(unfinished)
    assert results_of(folder)["accuracy"] == pytest.approx(summary_of(federated_run)["final"], abs=1e-9)


def test_a_configuration_is_evaluated_untrained_or_with_an_adapter(central: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, f"output.root={tmp_path}"]
    untrained, _ = evaluate_source("quickstart", overrides)
    assert untrained == tmp_path / "quickstart-evaluation_test"
    assert results_of(untrained)["accuracy"] == pytest.approx(summary_of(central)["zero_shot"], abs=1e-9)
    adapted, _ = evaluate_source(
        "quickstart", overrides, adapter=central / "adapter", output=tmp_path / "adapted"
    )
    assert results_of(adapted)["accuracy"] == pytest.approx(summary_of(central)["final"], abs=1e-9)


def test_a_run_is_not_evaluated_on_another_base_model(federated_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(federated_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("pretrained: true", "pretrained: false"))
    with pytest.raises(UserError, match="other weights"):
        evaluate_source(run, output=tmp_path / "refused")
    evaluate_source(run, output=tmp_path / "any", any_base=True)


def test_the_validation_split_is_the_one_that_training_chose_on(central: Path) -> None:
    folder, _ = evaluate_source(central, split="validation")
    found = results_of(folder)
    assert found["num_examples"] == 60
    assert found["accuracy"] == pytest.approx(
        summary_of(central)["training"]["validation_accuracy"], abs=1e-9
    )


def test_an_adapter_is_evaluated_whatever_method_the_configuration_names(
    central: Path, tmp_path: Path
) -> None:
    overrides = [*SMALL, "aggregation.name=fedsa", f"output.root={tmp_path}"]
    folder, _ = evaluate_source("quickstart", overrides, adapter=central / "adapter")
    assert results_of(folder)["accuracy"] == pytest.approx(summary_of(central)["final"], abs=2e-3)


def test_an_earlier_evaluation_is_kept_unless_told_otherwise(central: Path, tmp_path: Path) -> None:
    place = tmp_path / "evaluation"
    place.mkdir()
    (place / "evaluation_results.json").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="--overwrite"):
        evaluate_source(central, output=place)
    assert (place / "evaluation_results.json").read_text(encoding="utf-8") == "precious"
    evaluate_source(central, output=place, overwrite=True)
    assert results_of(place)["split"] == "test"


def test_a_damaged_or_missing_checkpoint_is_named(central: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(central, run, ignore=shutil.ignore_patterns("evaluation_*"))
    (run / "checkpoint" / "state.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"checkpoint is damaged.*--adapter"):
        evaluate_source(run)
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(UserError, match="nothing was trained yet"):
        evaluate_source(run)
    assert not (run / "evaluation_test").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_configuration"], "quickstart"),
        (["{folder}"], "not a run folder"),
        (["quickstart", "--split", "train"], "test, validation"),
        (["quickstart", "data.source=digits", "--split", "validation"], "data.validation_fraction"),
        (["quickstart", "--adapter", "{folder}/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_evaluated_ends_with_code_two_and_a_remedy(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *arguments, f"--output={tmp_path / 'out'}"])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_figures_are_those_of_a_naive_count() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    names = ["a", "b", "c", "d"]
    found = describe_classes(Predictions(labels, predicted, 1.0), names).results
    for number, row in enumerate(found["per_class"]):
        hits = sum(1 for t, p in zip(labels, predicted, strict=True) if t == p == number)
        precision, recall = hits / (predicted == number).sum(), hits / (labels == number).sum()
        assert row["name"] == names[number]
        assert row["support"] == (labels == number).sum()
        assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))
        assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    counts = np.array(found["confusion_matrix"]["rows_are_true_classes"])
    assert counts.sum(axis=1).tolist() == [row["support"] for row in found["per_class"]]
    assert np.trace(counts) / counts.sum() == pytest.approx(found["accuracy"])


def test_classes_that_a_small_split_does_not_have_do_not_lower_the_means() -> None:
    labels = np.array([0, 2, 2])
    found = describe_classes(Predictions(labels, labels, 0.0), ["a", "missing", "c"])
    assert [row["name"] for row in found.results["per_class"]] == ["a", "c"]
    assert found.results["macro_f1"] == 1.0
    assert "missing" not in found.report


def test_guessing_is_the_mean_over_all_orders_of_the_gallery() -> None:
    concepts = np.array([0, 0, 1, 2, 2, 2])
    orders = list(itertools.permutations(range(6)))
    num_right = np.array([(concepts == concept).sum() for concept in concepts])
    found = chance_recall(num_right, 6, [1, 2, 3, 6])
    for k, recall in found.items():
        hits = [
            concepts[query] in concepts[list(order[:k])] for order in orders for query in range(len(concepts))
        ]
        assert recall == pytest.approx(np.mean(hits))
    assert found[6] == 1.0


def test_retrieval_is_perfect_for_equal_embeddings_and_guessing_for_random_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(600, 64, generator=generator), dim=-1)
    others = torch.nn.functional.normalize(torch.randn(600, 64, generator=generator), dim=-1)
    metric = "image_to_text_recall_at_5"
    perfect = describe_retrieval(retrieval_set(images, images, {}), headline_metric=metric)
    assert perfect.results[metric] == 1.0
    assert isinstance(perfect.figures["recall_by_k"], Figure)
    random = describe_retrieval(retrieval_set(images, others, {}), headline_metric=metric).results
    chance = random["chance_recall"]["image_to_text"]["100"]
    assert random["image_to_text_recall_at_100"] == pytest.approx(chance, abs=0.05)
    values = [random[f"text_to_image_recall_at_{k}"] for k in (1, 2, 3, 5, 10, 20, 30, 50, 100)]
    assert values == sorted(values)


def test_pairs_without_concepts_show_something_of_their_own(small_clip_folder: Path) -> None:
    from models.clip import FederatedCLIPModel

    model = FederatedCLIPModel(str(small_clip_folder), 2, task="retrieval")
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), **model.tokenize(["cat", "dog", "red car"])}
    found = embed_pairs(model, [batch, batch])
    assert found.images.shape == found.texts.shape == (6, 24)
    assert torch.allclose(found.images.norm(dim=-1), torch.ones(6))
    assert np.array_equal(found.right.toarray(), np.eye(6))


@pytest.mark.parametrize("num_classes", [2, 100])
def test_pictures_hold_few_and_many_classes(num_classes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"class number {number} with a long name $x_{number}$" for number in range(num_classes)]
    counts = rng.integers(0, 9, (num_classes, num_classes)) + 20 * np.eye(num_classes, dtype=np.int64)
    rows = [ClassFigures(name, *rng.random(3).tolist(), support=9) for name in names]
    save_figure(confusion_matrix(counts, names), tmp_path, "confusion")
    figure = class_performance(rows)
    save_figure(figure, tmp_path, "classes")
    assert len(figure.axes[0].get_yticks()) == min(num_classes, MAX_BARS)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert max(picture.size) < 2500

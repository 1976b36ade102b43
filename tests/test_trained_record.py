"""Claims about using a trained model again: its classes, rows and seed are those of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from federated.config.config_files import load_config
from federated.data.dataset import FederatedData
from federated.engines.simulation import run_experiment
from federated.rounds.checkpoint import latest_checkpoint
from federated.rounds.trained_record import TrainedRecord, matched_classes
from federated.tools.evaluation import evaluate_source
from federated.tools.prediction import make_classifier, predict
from federated.tools.trained_models import open_model
from models.errors import UserError

COLOURS = {"cat": (220, 30, 30), "dog": (30, 30, 220), "frog": (30, 200, 30)}
SMALL = (
    "data.source=imagefolder",
    "model.num_classes=null",
    "partition={name: iid, num_clients: 2, options: {}}",
    "federation.rounds=2",
    "client.local_steps=4",
    "client.learning_rate=0.01",
    "output.report=false",
)


def draw(path: Path, colour: tuple[int, int, int], number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def pictures(root: Path, names: dict[str, str]) -> Path:
    """A folder whose classes are called otherwise: name there -> what is to be seen."""
    for split in ("train", "test"):
        for name, shown in names.items():
            for number in range(4):
                draw(root / split / name / f"{number}.png", COLOURS[shown], number + 10 * (split == "test"))
    return root


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    folder = pictures(root / "pets", {name: name for name in COLOURS})
    overrides = [*SMALL, f"data.path={folder}", f"output.root={root}", "output.name=run"]
    return run_experiment(load_config("quickstart", overrides))


def test_classes_that_the_run_does_not_know_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    other = pictures(tmp_path / "other", {"zebra": "cat", "dog": "dog", "frog": "frog"})
    with pytest.raises(UserError, match=r"zebra; it knows cat, dog, frog"):
        evaluate_source(run, [f"data.path={other}"], output=tmp_path / "out")
    overrides = [*SMALL, f"data.path={other}"]
    for folder in ("adapter", "adapter_best"):
        with pytest.raises(UserError, match="zebra"):
            evaluate_source("quickstart", overrides, adapter=run / folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_part_of_the_classes_is_scored_by_name_not_by_number(
    run: Path, tmp_path: Path, with_adapter: bool
) -> None:
    part = pictures(tmp_path / "part", {"dog": "dog", "frog": "frog"})  # numbers 0 and 1; the run's 1 and 2
    place = {"output": tmp_path / "out"}
    if with_adapter:
        evaluate_source("quickstart", [*SMALL, f"data.path={part}"], adapter=run / "adapter", **place)
    else:
        evaluate_source(run, [f"data.path={part}"], **place)
    opened = open_model(run / "adapter" if with_adapter else run)
    found = predict(opened, part / "test", make_classifier(opened))
    naive = np.mean([row.class_names[0] == row.path.parent.name for row in found.rows])
    assert naive > 0.6
    assert results(tmp_path / "out")["accuracy"] == pytest.approx(naive)
    assert results(tmp_path / "out")["num_examples"] == 8


def test_an_adapter_that_was_moved_still_names_its_classes(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "moved")
    (tmp_path / "moved" / "manifest.json").unlink()
    opened = open_model(tmp_path / "moved")
    image = tmp_path / "one.png"
    draw(image, COLOURS["dog"], 1)
    here, there = (
        predict(model, image, make_classifier(model)).rows[0] for model in (opened, open_model(run))
    )
    assert (here.class_names, here.probabilities) == (there.class_names, there.probabilities)
    other = pictures(tmp_path / "other", {"zebra": "cat", "dog": "dog", "frog": "frog"})
    with pytest.raises(UserError, match="zebra"):
        evaluate_source("quickstart", [*SMALL, f"data.path={other}"], adapter=tmp_path / "moved")


@pytest.mark.parametrize(
    "override", ["seed=1", "lora.r=4", "data.validation_fraction=0.2", "task.name=zero_shot"]
)
def test_what_would_make_a_run_another_one_is_refused_and_named(
    run: Path, override: str, tmp_path: Path
) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"Leave {key} out"):
        evaluate_source(run, [override], output=tmp_path / "out")
    evaluate_source(run, ["evaluation.batch_size=3"], output=tmp_path / "out")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one csv file without a split column, so that the seed draws the test rows."""
    root = tmp_path_factory.mktemp("drawn")
    lines = ["image,label"]
    for number in range(10):
        for name, colour in COLOURS.items():
            draw(root / "images" / f"{name}{number}.png", colour, number)
            lines.append(f"images/{name}{number}.png,{name}")
    (root / "all.csv").write_text("\n".join(lines) + "\n")
    overrides = [*SMALL, "data.source=csv", f"data.path={root / 'all.csv'}", f"output.root={root}"]
    return run_experiment(load_config("quickstart", [*overrides, "seed=3", "output.name=run"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], "seed=3"),
        (["seed=3", "data.options={test_fraction: 0.5}"], "data.options"),
        (["seed=3", "data.validation_fraction=0.3"], ""),
    ],
)
def test_rows_that_were_trained_on_are_not_scored_with_an_adapter(
    drawn: Path, overrides: list[str], words: str, tmp_path: Path
) -> None:
    source = [*SMALL, "data.source=csv", f"data.path={drawn.parent / 'all.csv'}", *overrides]
    split = "test" if words else "validation"
    with pytest.raises(UserError, match=words or "validation_fraction"):
        evaluate_source("quickstart", source, adapter=drawn / "adapter", split=split, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_came_in_after_the_training_are_not_drawn_among_those_trained_on(
    drawn: Path, tmp_path: Path
) -> None:
    table = drawn.parent / "all.csv"
    before = table.read_text()
    evaluate_source(drawn, output=tmp_path / "before")
    try:
        table.write_text(before + "images/cat0.png,cat\n" + "images/dog0.png,dog\n" * 4)
        with pytest.raises(UserError, match="have changed since"):
            evaluate_source(drawn, output=tmp_path / "after")
    finally:
        table.write_text(before)


def test_a_run_that_lost_the_names_of_its_classes_is_not_read_in_the_datas_order(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for folder in (copy / "adapter", latest_checkpoint(copy)):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["notes"] = {}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    other = pictures(tmp_path / "other", {"zebra": "cat", "dog": "dog", "frog": "frog"})
    with pytest.raises(UserError, match="zebra"):  # partition.json knows
        evaluate_source(copy, [f"data.path={other}"], output=tmp_path / "out")
    (copy / "partition.json").unlink()
    with pytest.raises(UserError, match=r"partition\.json.*classes"):
        evaluate_source(copy, output=tmp_path / "out")


def rows(labels: list[int], names: tuple[str, ...]) -> Dataset:
    features = Features({"label": ClassLabel(names=list(names)), "image": Value("string")})
    return Dataset.from_dict({"label": labels, "image": ["x"] * len(labels)}, features=features)


def test_classes_are_matched_by_name_and_only_prompts_take_others(caplog: pytest.LogCaptureFixture) -> None:
    names = ("frog", "cat")
    data = FederatedData(
        *(rows([0, 1, 1], names), None, rows([1, 0], names)),
        *(names, "label", "image", None, None, "test"),
    )
    record = TrainedRecord(Path("run"), class_names=("cat", "dog", "frog"))
    found = matched_classes(data, record, needed=True)
    assert found.class_names == record.class_names
    assert (list(found.train["label"]), list(found.test["label"])) == ([2, 0, 0], [0, 2])
    other = TrainedRecord(Path("run"), class_names=("cat", "dog"))
    with pytest.raises(UserError, match="frog; it knows cat, dog"):
        matched_classes(data, other, needed=True)
    assert matched_classes(data, other, needed=False) is data
    assert "others than run was trained on" in caplog.text


def test_classes_whose_names_differ_in_the_form_of_their_letters_are_the_same() -> None:
    names = ("cafe\u0301 ", "cat")  # as some file systems write "café"
    data = FederatedData(
        *(rows([0, 1, 1], names), None, rows([1, 0], names)),
        *(names, "label", "image", None, None, "test"),
    )
    record = TrainedRecord(Path("run"), class_names=("cat", "caf\u00e9"))
    found = matched_classes(data, record, needed=True)
    assert found.class_names == record.class_names
    assert (list(found.train["label"]), list(found.test["label"])) == ([1, 0, 0], [0, 1])

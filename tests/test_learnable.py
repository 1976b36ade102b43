"""Runs that could not learn anything are refused at the door: one message, exit code 2, no folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from command import fedlora
from PIL import Image

from federated.config.config_files import load_config, shipped_names
from federated.rounds.learnable import check_can_learn
from federated.rounds.run import Run, build_run
from models.errors import UserError
from models.prompts import names_that_read_alike

SMALL = (
    "lora.r=2",
    "federation.rounds=1",
    "partition={name: iid, num_clients: 3, local_test_fraction: 0.0}",
    "client.local_steps=1",
    "evaluation.clients=false",
    "output.report=false",
)
PHOTOS = ("quickstart", "data.max_train_samples=60", "data.max_test_samples=20", *SMALL)
PAIRS = ("retrieval_vi", "data.max_train_samples=60", "data.max_test_samples=20", *SMALL)
ZERO_SHOT = "task.name=zero_shot"


def built(*arguments: str) -> Run:
    return build_run(load_config(arguments[0], arguments[1:]))


def folder_of(root: Path, classes: Sequence[str], captions: bool = False) -> tuple[str, ...]:
    """Three training images and a test image of each class, and the overrides that read them."""
    for split, number in (("train", 3), ("test", 1)):
        for place, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8), (90 * i, 40 * place, 7 * len(split))).save(folder / f"{i}.png")
    data = f"data={{source: imagefolder, path: '{root}'}}"
    return ("quickstart", *SMALL, data, "model.num_classes=null", "client.batch_size=4")


def csv_of(root: Path, captions: Sequence[str], num_test: int = 4) -> tuple[str, ...]:
    """A training image for each caption, and the overrides that read them as pairs."""
    root.mkdir()
    for split, texts in (("train", captions), ("test", [f"test {i}" for i in range(num_test)])):
        lines = ["image,caption"]
        for i, text in enumerate(texts):
            Image.new("RGB", (8, 8), (20 * i, 90, 7 * len(split))).save(root / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{text}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ("retrieval_vi", *SMALL, f"data={{source: csv, path: '{root}'}}")


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*PHOTOS, "client.precision=fp16"], ["client.precision=fp16", "model.device is cpu", "bf16"]),
        ([*PAIRS, "client.batch_size=1"], ["client.batch_size=1", "client.batch_size=2"]),
        ([*PAIRS, "evaluation.batch_size=1"], ["evaluation.batch_size=1", "evaluation.batch_size=2"]),
        (
            [*PAIRS, "client.batch_size=2", "data.max_train_samples=57"],
            ["client.batch_size=2 leaves a batch of a single pair", "clients 0, 1, 2 have", "batch_size=3"],
        ),
        ([*PAIRS, "client.batch_size=8", "client.micro_batch_size=2"], ["client.micro_batch_size=2", "null"]),
        ([*PAIRS, "evaluation.max_samples=1"], ["single pair", "evaluation.max_samples"]),
        (
            [*PHOTOS, "lora.target_components=[text]", "task.train_head=false"],
            ["task.name=classification does not use the text tower", "task.train_head=true"],
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_run_that_cannot_learn_is_refused_with_the_remedy(arguments: list[str], words: list[str]) -> None:
    experiment = built(*arguments)
    with pytest.raises(UserError) as error:
        check_can_learn(experiment)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("command", ["run", "train"])
def test_one_message_exit_code_2_and_no_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    arguments = [*PHOTOS, "client.precision=fp16", f"output.root={runs}", "data.validation_fraction=0.2"]
    code, printed, errors = fedlora(capsys, command, *arguments)
    assert code == 2
    assert (printed + errors).count("client.precision=fp16") == 1
    assert "Traceback" not in errors
    assert not runs.exists()


@pytest.mark.parametrize("task", ["classification", "zero_shot"])
def test_data_of_one_class_is_no_task(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*folder_of(tmp_path / "one", ["cat"]), f"task.name={task}", "partition.num_clients=1")
    with pytest.raises(UserError, match=r"one class, 'cat'.*two classes or more"):
        check_can_learn(built(*arguments))
    code, _, errors = fedlora(capsys, "evaluate", *arguments, "--output", tmp_path / "evaluation")
    assert (code, "one class, 'cat'" in errors) == (2, True)  # every model would be 100 % right


def test_training_rows_of_one_class_of_several_are_no_task(tmp_path: Path) -> None:
    rows = {"train": "a.png,cat\nb.png,cat\nc.png,cat\n", "test": "d.png,cat\ne.png,dog\n"}
    for split, text in rows.items():
        (tmp_path / f"{split}.csv").write_text("image,label\n" + text, encoding="utf-8")
    for i, name in enumerate("abcde"):
        Image.new("RGB", (8, 8), (50 * i, 9, 9)).save(tmp_path / f"{name}.png")
    try:
        experiment = built(
            "quickstart", *SMALL, f"data={{source: csv, path: '{tmp_path}'}}", "model.num_classes=null"
        )
    except UserError:
        return  # the source refuses splits that differ in their classes
    with pytest.raises(UserError, match="have one class, 'cat'"):
        check_can_learn(experiment)


def test_classes_without_a_training_row_are_named_where_a_head_learns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = folder_of(tmp_path, ("cat", "dog", "frog"))
    for key, said in (("task.name=zero_shot", False), ("task.name=classification", True)):
        caplog.clear()
        check_can_learn(built(*arguments, "data.max_train_samples=2", "partition.num_clients=1", key))
        assert ("no client has a training row of" in caplog.text) == said


def test_a_client_with_one_pair_has_nothing_to_learn_from(tmp_path: Path) -> None:
    arguments = csv_of(tmp_path / "pairs", ["a cat", "a dog", "a car", "a tree"])
    with pytest.raises(UserError, match=r"client\w* [\d, ]+ha\w+ one picture in all training rows"):
        check_can_learn(built(*arguments))
    check_can_learn(built(*arguments, "partition.num_clients=2"))


def test_pairs_of_one_caption_are_no_task(tmp_path: Path) -> None:
    arguments = csv_of(tmp_path / "pairs", ["a cat"] * 6)
    with pytest.raises(UserError, match="all training rows have the same caption"):
        check_can_learn(built(*arguments, "partition.num_clients=1"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_of_one_picture_are_no_task(split: str, tmp_path: Path) -> None:
    arguments = csv_of(tmp_path / "pairs", [f"number {i}" for i in range(6)])
    for file in (tmp_path / "pairs").glob(f"{split}*.png"):
        Image.new("RGB", (8, 8), "red").save(file)
    reason = "all training rows have the same picture" if split == "train" else "tested on a single pair, pic"
    with pytest.raises(UserError, match=reason):
        check_can_learn(built(*arguments, "partition.num_clients=1"))


# ---- class names to the tokenizer


@pytest.mark.parametrize(
    "names",
    [("Cat", "cat", "dog"), ("very " * 90 + "old", "very " * 90 + "new", "dog")],
    ids=["case", "cut at the context length"],
)
def test_classes_that_read_alike_are_refused_without_a_head_and_named_with_one(
    names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = built(*PHOTOS, "data.max_train_samples=30", "task.templates=['{}']")
    experiment.model.federated_model.class_names = (*names, *experiment.data.class_names[3:])
    experiment.model.federated_model._class_tokens = None
    with caplog.at_level(logging.WARNING):
        check_can_learn(experiment)  # labels still tell them apart
    assert "read alike to the tokenizer" in caplog.text
    zero_shot = built(*PHOTOS, "data.max_train_samples=30", ZERO_SHOT)
    zero_shot.model.federated_model.class_names = (*names, *experiment.data.class_names[3:])
    caplog.clear()
    with pytest.raises(UserError, match=r"read alike to the tokenizer.*rename.*task\.templates"):
        check_can_learn(zero_shot)
    assert "read alike" not in caplog.text


def test_names_read_alike_when_the_tokens_of_all_their_prompts_are_equal() -> None:
    import torch

    ids = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 4], [1, 2], [1, 3]])  # two templates each
    assert names_that_read_alike({"input_ids": ids}, ("a", "b", "c")) == [("a", "c")]


# ---- what is not refused


@pytest.mark.parametrize("name", [name for name in shipped_names() if name != "clip_lora"])
def test_shipped_configurations_can_learn(name: str, caplog: pytest.LogCaptureFixture) -> None:
    check_can_learn(built(name))
    assert not [r for r in caplog.records if r.name == "federated.rounds.learnable"]


@pytest.mark.parametrize(
    "arguments",
    [
        [*PHOTOS, "client.batch_size=1"],
        [*PHOTOS, "client.batch_size=1000"],
        [*PHOTOS, "partition={name: pathological, num_clients: 10, options: {classes_per_client: 1}}"],
        [*PHOTOS, "lora.target_components=[text]"],
        [*PHOTOS, "federation.cohort_size=1"],
        [*PHOTOS, "client.precision=bf16"],
        [*PHOTOS, "task.train_head=false"],
        [*PAIRS, "client.batch_size=2"],
        [*PAIRS, "client.batch_size=3", "data.max_train_samples=57"],
        [*PAIRS, "client.batch_size=8", "client.micro_batch_size=8"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_unusual_runs_that_can_learn_are_let_in(arguments: list[str]) -> None:
    check_can_learn(built(*arguments))


def test_a_run_that_was_trained_in_fp16_is_evaluated_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*PHOTOS, "client.precision=fp16", "--output", tmp_path / "evaluation"]
    code, _, errors = fedlora(capsys, "evaluate", *arguments)
    assert code == 0, errors


def test_recall_that_cannot_miss_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = csv_of(tmp_path / "pairs", ["a cat", "a dog", "a car", "a tree"], num_test=4)
    check_can_learn(built(*arguments, "partition.num_clients=1"))
    assert "recall at 5 among 4 test pictures or captions is always 100 %" in caplog.text

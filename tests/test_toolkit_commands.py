"""What the documents name beside the LoRA interface: doctor, Predictor, half precision, patches, top-5."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from federated import Predictor
from federated.config.config_files import parse_config
from federated.results.run_place import check_free
from federated.rounds.build import training_settings
from federated.tools import doctor
from federated.tools.central import train_centrally
from federated.tools.detailed_metrics import describe_classes, predict_classes
from federated.tools.embedding_files import read_index
from lora import load_lora_adapters, quick_clip_lora
from models.clip import FederatedCLIPModel
from models.clip_loading import TINY_FOLDER, load_clip
from models.errors import UserError
from models.training import TrainingSettings, learning_rate_at
from tests.command import fedlora


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_doctor_finds_all_well_and_says_which_part_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, _ = fedlora(capsys, "doctor")
    assert code == 0, output
    assert all(part in output for part in ("torch", "cpu", "wrapper", "CLIP integration", "all is well"))
    monkeypatch.setattr(doctor, "quick_clip_lora", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    code, output, _ = fedlora(capsys, "doctor")
    assert code == 1
    assert "2 fail: no-such-package, factory" in output


def test_a_predictor_gives_the_same_for_files_and_for_images_in_memory(photos: Path) -> None:
    predictor = Predictor("tiny", ["a shoe", "a bag", "a coat"], batch_size=2)
    files = sorted(photos.iterdir())
    in_memory = predictor.predict_batch([Image.open(file) for file in files], top_k=2)
    in_folder = predictor.predict_folder(photos, top_k=2)
    assert [row.path for row in in_folder] == files
    for mine, theirs, file in zip(in_memory, in_folder, files, strict=True):
        assert mine.class_names == theirs.class_names == predictor.predict(file, 2).class_names
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    with pytest.raises(UserError, match="no images"):
        predictor.predict_batch([])


def test_predictions_go_into_a_text_file(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = photos.parent / "predictions.txt"
    code, _, error = fedlora(
        capsys, "predict", "tiny", str(photos), "--classes", "a shoe,a bag", "--output", str(target)
    )
    assert code == 0, error
    rows = [line.split("\t") for line in target.read_text().splitlines()]
    assert [row[:2] for row in rows[:2]] == [[str(photos / "0.png"), "1"], [str(photos / "0.png"), "2"]]
    assert float(rows[0][3]) + float(rows[1][3]) == pytest.approx(1, abs=1e-5)


def test_half_precision_changes_features_by_its_rounding_alone() -> None:
    model = FederatedCLIPModel("tiny", 3)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.encode_image(images)
    model.precision = "bf16"
    with torch.no_grad():
        rounded = model.encode_image(images)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.999


def test_half_precision_reaches_the_commands(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {}
    for precision in ("fp32", "bf16"):
        target = photos.parent / f"{precision}.npy"
        code, _, error = fedlora(
            capsys, "encode", "tiny", str(photos), "--precision", precision, "--output", str(target)
        )
        assert code == 0, error
        arrays[precision] = np.load(target)
    assert 0 < np.abs(arrays["fp32"] - arrays["bf16"]).max() < 0.02


def test_patches_are_the_hidden_states_of_the_vision_tower() -> None:
    model = FederatedCLIPModel("tiny", 3)
    clip = load_clip("tiny").clip
    assert isinstance(clip, CLIPModel)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = clip.vision_model(pixel_values=images, output_hidden_states=True).hidden_states
        for block in (-1, -2):
            patches = model.encode_image(images, patches=True, block=block)
            torch.testing.assert_close(patches, states[block][:, 1:])
    with pytest.raises(UserError, match="no block 9"):
        model.encode_image(images, patches=True, block=9)


def test_encoded_patches_are_written_and_not_searched(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = photos.parent / "patches.npy"
    code, _, error = fedlora(capsys, "encode", "tiny", str(photos), "--patches", "--output", str(target))
    assert code == 0, error
    assert np.load(target).shape == (3, 16, 128)
    with pytest.raises(UserError, match="cannot be searched"):
        read_index(target)


def test_top_5_accuracy_counts_the_five_best_where_there_are_more_classes() -> None:
    names = [f"class {number}" for number in range(7)]
    model = FederatedCLIPModel("tiny", 7)
    generator = torch.Generator().manual_seed(0)
    batch = {"image_features": torch.randn(40, 128, generator=generator), "labels": torch.arange(40) % 7}
    results = describe_classes(predict_classes(model, [batch]), names).results
    with torch.no_grad():
        order = model.logits(batch).argsort(dim=1, descending=True)
    expected = sum(int(label in row[:5]) for label, row in zip(batch["labels"], order, strict=True)) / 40
    assert results["top5_accuracy"] == pytest.approx(expected)
    few = FederatedCLIPModel("tiny", 5)
    batch["labels"] = batch["labels"] % 5
    assert "top5_accuracy" not in describe_classes(predict_classes(few, [batch]), names).results


def test_a_warmup_ratio_is_the_share_of_the_steps() -> None:
    by_ratio = TrainingSettings(warmup_ratio=0.3, schedule="cosine")
    by_steps = TrainingSettings(warmup_steps=6, schedule="cosine")
    rates = [[learning_rate_at(s, step, 20) for step in range(20)] for s in (by_ratio, by_steps)]
    assert rates[0] == rates[1]
    config = parse_config({"client": {"warmup_ratio": 0.3}}, source="test")
    assert training_settings(config).warmup_ratio == 0.3
    with pytest.raises(UserError, match="both say how long"):
        parse_config({"client": {"warmup_ratio": 0.3, "warmup_steps": 2}}, source="test")


def test_epochs_that_are_due_leave_an_adapter_each(tmp_path: Path) -> None:
    tree = {
        "model": {"model_name": "tiny"},
        "lora": {"r": 2, "target_components": ["vision"]},
        "data": {"source": "digits", "max_train_samples": 60, "max_test_samples": 20},
        "train": {"epochs": 4, "save_every": 2, "evaluate_every": 3},
        "output": {"root": str(tmp_path), "name": "run", "report": False},
    }
    folder = train_centrally(parse_config(tree, source="test"))
    assert sorted(path.name for path in folder.glob("checkpoint-epoch-*")) == [
        "checkpoint-epoch-2",
        "checkpoint-epoch-4",
    ]
    adapted = quick_clip_lora("tiny", 10, r=2, target_components=["vision"])
    assert load_lora_adapters(adapted, folder / "checkpoint-epoch-4").metadata["server_round"] == 4
    check_free(folder, overwrite=True)  # every file in it is one that a run leaves


def test_a_step_by_hand_takes_the_learning_rate_given() -> None:
    """Oracle: the first step of AdamW moves a value with a gradient by the learning rate."""
    model = quick_clip_lora("tiny", 3, r=2, lora_dropout=0, target_components=["vision"])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.federated_model.head.bias.detach().clone()
    model.train_step(images, torch.tensor([0, 1, 2, 0]), learning_rate=0.02)
    moved = (model.federated_model.head.bias.detach() - before).abs().max().item()
    assert math.isclose(moved, 0.02, rel_tol=1e-3)


def test_downloads_are_looked_for_in_the_folder_given(tmp_path: Path) -> None:
    kept = tmp_path / "models--somebody--small"
    shutil.copytree(TINY_FOLDER, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    names = ("a shoe", "a bag")
    model = FederatedCLIPModel("somebody/small", 2, class_names=names, cache_dir=str(tmp_path))
    same = FederatedCLIPModel("tiny", 2, class_names=names)
    assert torch.equal(model.class_embeddings(), same.class_embeddings())
    with pytest.raises(UserError, match="not in the local cache"):
        FederatedCLIPModel("somebody/small", 2)
    config = parse_config({"model": {"cache_dir": str(tmp_path)}}, source="test")
    assert config.model.cache_dir == str(tmp_path)


def test_models_and_states_show_themselves_in_one_line() -> None:
    model = quick_clip_lora("tiny", 3, r=2)
    for thing in (model, model.federated_model, model.get_state()):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 200
    assert "26 tensors" in repr(model.get_state())

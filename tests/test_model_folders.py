"""Model folders that lack a file, or hold one of another model: refused, and the file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPProcessor

from models.clip_loading import TINY_FOLDER, load_clip
from models.errors import UserError

Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "clip"))


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def with_values(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            section = content[key] if isinstance(value, dict) and key in content else content
            section.update(value if section is not content else {key: value})
        (folder / name).write_text(json.dumps(content))

    return change


def with_the_words_of_another_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    words = {"<|startoftext|>", "<|endoftext|>"}
    kept = [w for w in content["model"]["vocab"] if w not in words][:1000]
    content["model"]["vocab"] = {word: number for number, word in enumerate([*kept, *sorted(words)])}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), r"tokenizer\.json is missing"),
        (without("tokenizer.json"), r"tokenizer\.json is missing"),
        (with_the_words_of_another_tokenizer, r"has \d+ entries, the text tower 4200"),
        (with_values("config.json", text_config={"eos_token_id": 7}), "does not end texts with token 7"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
    ],
    ids=["no-tokenizer", "its-config-alone", "other-words", "other-end", "broken"],
)
def test_texts_are_not_encoded_by_a_tokenizer_of_another_model(
    change: Change, message: str, folder: Path
) -> None:
    change(folder)
    loaded = load_clip(str(folder))
    with pytest.raises(UserError, match=message):
        loaded.tokenize(["a cat"])


def test_the_missing_half_of_a_tokenizer_is_named(folder: Path) -> None:
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    assert torch.equal(
        load_clip(str(folder)).tokenize(["a cat"])["input_ids"],
        load_clip("tiny").tokenize(["a cat"])["input_ids"],
    )
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt is missing"):
        load_clip(str(folder)).tokenize(["a cat"])


def with_another_layer(folder: Path) -> None:
    with_values("config.json", vision_config={"num_hidden_layers": 3})(folder)


def with_wrong_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("preprocessor_config.json"), r"preprocessor_config\.json is missing"),
        (
            with_values("preprocessor_config.json", crop_size={"height": 64, "width": 64}),
            r"preprocessor_config\.json makes images of 64 x 64 pixels.*32 x 32",
        ),
        (
            with_values("preprocessor_config.json", do_resize=False, do_center_crop=False),
            r"preprocessor_config\.json makes images of None",
        ),
        (
            with_values("preprocessor_config.json", image_processor_type="ViTImageProcessor"),
            "for a ViTImageProcessor",
        ),
        (with_values("preprocessor_config.json", image_std=[1.0, 0.0, 1.0]), "above 0"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "not valid JSON"),
        (without("model.safetensors"), r"model\.safetensors"),
        (with_another_layer, r"beyond config\.json.*layers\.3"),
        (with_wrong_weights, "lacks 1 parameters, first text_projection"),
        (with_values("config.json", quantization_config={"load_in_8bit": True}), "quantised"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}'),
            "move the adapter",
        ),
    ],
    ids=[
        "no-processor", "crop", "no-size", "other-kind", "std", "broken", "no-weights", "too-many-weights",
        "too-few-weights", "quantised", "adapter-inside",
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused_and_the_file_named(
    change: Change, message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        load_clip(str(folder))


def test_the_values_of_a_processor_config_are_used(folder: Path) -> None:
    processor = CLIPProcessor.from_pretrained(folder)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    shift = load_clip(str(folder)).preprocess.shift.flatten()  # type: ignore[attr-defined]
    std = torch.tensor(processor.image_processor.image_std)
    torch.testing.assert_close(shift, -torch.tensor([0.1, 0.2, 0.3]) / std)

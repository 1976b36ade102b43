"""Claims about the bundled tiny CLIP: it loads offline, and its pre-training is worth something."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor

import models
from federated.data.sources import embedded

FOLDER = Path(models.__file__).resolve().parent / "tiny_clip"
# Zero-shot accuracy on the Fashion-MNIST test subset (1,000 images) with the plain official class names, from
# `scripts/pretrain_tiny_clip.py --evaluate models/tiny_clip`; the interval is three standard errors.
ZERO_SHOT_ACCURACY = 0.192
ZERO_SHOT_MARGIN = 0.037
CONTROL_SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def fashion(processor: CLIPProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values (1000, 3, 32, 32) and labels (1000,) of the test subset."""
    test = embedded.fashion_mnist()["test"]
    pixels = processor.image_processor(images=test["image"][:], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(test["label"][:])


@torch.no_grad()
def _embed_texts(clip: CLIPModel, processor: CLIPProcessor, texts: list[str]) -> torch.Tensor:
    tokens = processor.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    return F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)


@torch.no_grad()
def _zero_shot(clip: CLIPModel, processor: CLIPProcessor, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    pixels, labels = data
    classes = _embed_texts(clip, processor, list(embedded.FASHION_MNIST_NAMES))
    images = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    return ((images @ classes.T).argmax(dim=1) == labels).float().mean().item()


def _random_clip(seed: int) -> CLIPModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig.from_pretrained(FOLDER)).eval()


def test_it_has_1_73_million_parameters_computed_in_fp32_by_default() -> None:
    model = AutoModel.from_pretrained(FOLDER, local_files_only=True)
    assert type(model) is CLIPModel
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_725_953


def test_its_weights_are_finite_and_stored_in_half_precision() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (the file object is not iterable)
            tensor = weights.get_tensor(name)
            assert tensor.dtype in {torch.float16, torch.int64}
            assert torch.isfinite(tensor).all()


def test_the_folder_is_complete_and_below_5_megabytes() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "README.md",
        "LICENSE",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5_000_000


def test_the_special_tokens_close_the_vocabulary() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    size = len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        size - 2,
        size - 1,
        size - 1,
    )
    text_config = json.loads((FOLDER / "config.json").read_text())["text_config"]
    assert (text_config["vocab_size"], text_config["eos_token_id"]) == (size, size - 1)
    assert tokenizer.model_max_length == text_config["max_position_embeddings"] == 32


@pytest.mark.parametrize(
    "text",
    [
        *(f"a photo of a {name}." for name in embedded.FASHION_MNIST_NAMES),
        string.printable.strip(),
        "người phụ nữ ra hiệu trợ giúp",
        "前台女",
        "Ωμέγα ☃ 🦊",
    ],
)
def test_no_text_is_unknown_to_the_tokenizer(processor: CLIPProcessor, text: str) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1  # unknown bytes would show as end of text
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.lower().split())


def test_padding_does_not_change_a_text_embedding(clip: CLIPModel, processor: CLIPProcessor) -> None:
    texts = ["dress", "a picture of a person in a motorized wheelchair facing right"]
    together = _embed_texts(clip, processor, texts)
    apart = torch.cat([_embed_texts(clip, processor, [text]) for text in texts])
    assert torch.allclose(together, apart, atol=1e-5)


def test_embeddings_are_deterministic_across_loads(
    clip: CLIPModel, processor: CLIPProcessor, fashion: tuple[torch.Tensor, torch.Tensor]
) -> None:
    again = CLIPModel.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        pixels = fashion[0][:16]
        first, second = (
            model.get_image_features(pixel_values=pixels).pooler_output for model in (clip, again)
        )
    assert torch.equal(first, second)
    assert torch.equal(_embed_texts(clip, processor, ["coat"]), _embed_texts(again, processor, ["coat"]))


def test_zero_shot_accuracy_on_fashion_mnist_is_the_stated_one_and_random_weights_do_not_reach_it(
    clip: CLIPModel, processor: CLIPProcessor, fashion: tuple[torch.Tensor, torch.Tensor]
) -> None:
    measured = _zero_shot(clip, processor, fashion)
    assert abs(measured - ZERO_SHOT_ACCURACY) < ZERO_SHOT_MARGIN
    control = [_zero_shot(_random_clip(seed), processor, fashion) for seed in CONTROL_SEEDS]
    assert max(control) < ZERO_SHOT_ACCURACY - ZERO_SHOT_MARGIN


def test_it_names_the_group_of_emoji_it_has_never_seen(clip: CLIPModel, processor: CLIPProcessor) -> None:
    """Held-out concepts of the vendor left out of the training, against always guessing the largest group."""
    unseen = embedded.emoji(["openmoji"])["test"]
    labels = torch.tensor(unseen["label"][:])
    pixels = processor.image_processor(images=unseen["image"][:], return_tensors="pt")["pixel_values"]
    classes = _embed_texts(clip, processor, list(embedded.group_names()))
    with torch.no_grad():
        images = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    accuracy = ((images @ classes.T).argmax(dim=1) == labels).float().mean().item()
    majority = (torch.bincount(labels).max() / len(labels)).item()
    assert accuracy > majority + 0.1


def test_the_model_card_names_data_licences_and_numbers() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in (
        "Noto",
        "Twemoji",
        "CC BY 4.0",
        "Fluent",
        "OpenMoji",
        "--evaluate models/tiny_clip",
        "validation",
    ):
        assert word in card

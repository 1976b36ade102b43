"""Shared fixtures: a very small random CLIP folder in the hub's format, and batches for it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

_TORCHVISION_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "qroi_align",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


def _declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision import where its compiled operators cannot be loaded.

    A torchvision built for CUDA beside a CPU torch stops at "operator torchvision::nms does not
    exist"; with the names declared all but those operators works. Ordinary installs need nothing.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in _TORCHVISION_OPERATORS:
            library.define(f"{operator}(Tensor input) -> Tensor")
        return library
    return None


_torchvision_library = _declare_torchvision_operators()

CLASS_NAMES = ("cat", "dog", "red car")
IMAGE_SIZE = 16
WORDS = ("cat", "dog", "red", "car", "blue", "tree", "one", "two", "three")


def _write_tokenizer(folder: Path) -> int:
    """A word tokenizer in the form of CLIP's: <|startoftext|> words <|endoftext|>, padded with the last."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("a", "photo", "of", "picture", "the", ".", *WORDS)
    entries = ("<unk>", *words, "<|startoftext|>", "<|endoftext|>")
    vocabulary = {word: index for index, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def small_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in a folder: 16 px, two blocks a tower, D = 24, some 40,000 parameters."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("small_clip")
    vocabulary_size = _write_tokenizer(folder)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 24}
    config = CLIPConfig(
        text_config={
            **tower,
            "hidden_size": 32,
            "intermediate_size": 48,
            "vocab_size": vocabulary_size,
            "max_position_embeddings": 12,
            "bos_token_id": vocabulary_size - 2,
            "eos_token_id": vocabulary_size - 1,
            "pad_token_id": vocabulary_size - 1,
        },
        vision_config={
            **tower,
            "hidden_size": 32,
            "intermediate_size": 64,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        },
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pixel_batch() -> dict[str, torch.Tensor]:
    """Twelve random images with labels among three classes, four to a class."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(12, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "labels": torch.arange(12) % len(CLASS_NAMES),
    }

"""The numbers of the tiny CLIP's model card: zero-shot accuracy and retrieval.

Part of `pretrain_tiny_clip.py --evaluate`. Fashion-MNIST and the held-out emoji were never trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emoji_batches import ClassLevel, class_levels, normalise
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from federated.data.sources import embedded

logger = logging.getLogger("pretrain_tiny_clip")

TEMPLATE = "a photo of a {}."
FRIENDLY_NAMES = (
    "t-shirt", "jeans", "sweater", "dress", "coat", "sandal", "shirt", "running shoe", "handbag", "boot",
)  # fmt: skip
"""Fashion-MNIST classes in words that occur among emoji names, for comparison."""


@torch.no_grad()
def image_features(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Normalised features (N, D) of pixel values (N, 3, 32, 32)."""
    parts = [model.get_image_features(pixel_values=part).pooler_output for part in pixel_values.split(256)]
    return F.normalize(torch.cat(parts).float(), dim=-1)


@torch.no_grad()
def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Normalised features (N, D)."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)


def accuracy(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images (N, D) whose nearest class text (C, D) is the right one."""
    return ((image @ text.T).argmax(dim=1) == labels).float().mean().item()


def recall(image: torch.Tensor, text: torch.Tensor, k: int) -> float:
    """Share of rows of `image` (N, D) whose own row of `text` is among the k nearest."""
    similarity = image @ text.T
    own = similarity.diagonal().unsqueeze(1)
    return ((similarity > own).sum(dim=1) < k).float().mean().item()


def fashion_mnist_rows(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> list[dict[str, Any]]:
    """Zero-shot accuracy with plain names, the template, and friendlier names."""
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    data = embedded.fashion_mnist()
    features = {
        split: image_features(
            model, processor(images=data[split]["image"][:], return_tensors="pt")["pixel_values"]
        )
        for split in ("validation", "test")
    }
    prompts = {
        "official names": embedded.FASHION_MNIST_NAMES,
        f'official names, "{TEMPLATE}"': [TEMPLATE.format(name) for name in embedded.FASHION_MNIST_NAMES],
        "friendlier names": FRIENDLY_NAMES,
        f'friendlier names, "{TEMPLATE}"': [TEMPLATE.format(name) for name in FRIENDLY_NAMES],
    }
    rows = []
    for what, texts in prompts.items():
        classes = text_features(model, tokenizer, texts)
        rows.append(
            {"prompts": what}
            | {
                split: accuracy(features[split], classes, torch.tensor(data[split]["label"][:]))
                for split in features
            }
        )
    return rows


def emoji_rows(model: CLIPModel, tokenizer: CLIPTokenizer) -> list[dict[str, Any]]:
    """Group and subgroup accuracy and English retrieval for each vendor, seen and held-out concepts."""
    subgroup, _, group = class_levels()
    group_text = text_features(model, tokenizer, group.names)
    subgroup_text = text_features(model, tokenizer, subgroup.names)
    texts = {
        language: text_features(model, tokenizer, embedded.captions(language))
        for language in embedded.LANGUAGES
    }
    rows = []
    for vendor in embedded.VENDORS:
        tiles = embedded.flatten_tiles(embedded.emoji_tiles(vendor))
        pixels = normalise(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255)
        image = image_features(model, pixels)
        for held_out in (False, True):
            chosen = _concept_numbers(vendor, held_out=held_out)
            part = image[chosen]
            row: dict[str, Any] = {
                "vendor": vendor,
                "concepts": "held out" if held_out else "trained",
                "number": len(chosen),
                "group": accuracy(part, group_text, group.labels[chosen]),
                "subgroup": accuracy(part, subgroup_text, subgroup.labels[chosen]),
                "majority group": _majority(group, chosen),
            }
            for k in (1, 5):
                row[f"image to text R@{k}"] = recall(part, texts["en"][chosen], k)
                row[f"text to image R@{k}"] = recall(texts["en"][chosen], part, k)
            row["vi image to text R@5"] = recall(part, texts["vi"][chosen], 5)
            row["zh image to text R@5"] = recall(part, texts["zh"][chosen], 5)
            rows.append(row)
    return rows


def _concept_numbers(vendor: str, *, held_out: bool) -> torch.Tensor:
    return torch.tensor(
        [
            number
            for number, concept in enumerate(embedded.concepts())
            if concept.held_out == held_out and vendor not in concept.missing
        ]
    )


def _majority(level: ClassLevel, chosen: torch.Tensor) -> float:
    counts = np.bincount(level.labels[chosen].numpy())
    return float(counts.max() / counts.sum())


def print_evaluation(folder: Path) -> None:
    """Print the model card's two tables as Markdown, in percent."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    _print_table(fashion_mnist_rows(folder, model, tokenizer))
    _print_table(emoji_rows(model, tokenizer))


def _print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    logger.info("\n| %s |", " | ".join(rows[0]))
    logger.info("|%s", "---|" * len(rows[0]))
    for row in rows:
        logger.info("| %s |", " | ".join(map(cell, row.values())))

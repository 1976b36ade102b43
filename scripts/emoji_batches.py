"""Training batches of the tiny CLIP: random emoji pictures with random captions.

Part of `pretrain_tiny_clip.py`, which runs once, long before any round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from federated.data.sources import embedded

TRAIN_VENDORS = ("noto", "twemoji", "fluent")
"""OpenMoji stays out: it is the vendor the model has never seen (and its licence is share-alike)."""

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own normalisation (Radford et al. 2021)."""

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an emoji of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "a small image of a {}.",
)
COARSE_NAMES = {
    "face": ("face-",),
    "animal face": ("cat-face", "monkey-face"),
    "heart and emotion": ("heart", "emotion"),
    "hand": ("hand-", "hands"),
    "body part": ("body-parts",),
    "person": ("person", "person-", "family"),
    "animal": ("animal-",),
    "plant": ("plant-",),
    "food": ("food-",),
    "drink": ("drink", "dishware"),
    "place": ("place-", "hotel"),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "clock": ("time",),
    "weather": ("sky-weather",),
    "celebration": ("event", "award-medal"),
    "sport and game": ("sport", "game", "arts-crafts"),
    "clothing": ("clothing",),
    "music and sound": ("sound", "music", "musical-instrument"),
    "electronic device": ("phone", "computer", "light-video"),
    "paper": ("book-paper", "mail", "writing", "office"),
    "money": ("money", "currency"),
    "tool": ("tool", "lock"),
    "science and medicine": ("science", "medical"),
    "household object": ("household",),
    "other object": ("other-object",),
    "sign": ("transport-sign", "warning"),
    "arrow": ("arrow",),
    "religion": ("religion",),
    "zodiac": ("zodiac",),
    "button": ("av-symbol", "keycap"),
    "symbol": ("gender", "math", "punctuation", "other-symbol"),
    "letters": ("alphanum",),
    "shape": ("geometric",),
}
"""Coarse class -> Unicode subgroups (a trailing "-" marks a prefix): a level between subgroup and group."""


@dataclass(frozen=True)
class ClassLevel:
    """One level of the class hierarchy: class names and the class of every concept (-1: none)."""

    names: tuple[str, ...]
    labels: torch.Tensor


def readable(subgroup: str) -> str:
    """The text used for a Unicode subgroup key: "animal-mammal" -> "animal mammal"."""
    return subgroup.replace("-", " ")


def coarse_name(subgroup: str) -> str:
    """The coarse class of a subgroup.

    Raises:
        KeyError: for a subgroup that `COARSE_NAMES` does not cover.
    """
    for name, patterns in COARSE_NAMES.items():
        if any(subgroup.startswith(p) if p.endswith("-") else subgroup == p for p in patterns):
            return name
    raise KeyError(subgroup)


def class_levels() -> tuple[ClassLevel, ClassLevel, ClassLevel]:
    """Subgroups, coarse classes and groups of the emoji, with the label of every concept."""
    concepts = embedded.concepts()
    per_concept = (
        (tuple(map(readable, embedded.subgroup_names())), [readable(c.subgroup) for c in concepts]),
        (tuple(COARSE_NAMES), [coarse_name(c.subgroup) for c in concepts]),
        (embedded.group_names(), [_group_name(c.group) for c in concepts]),
    )
    subgroup, coarse, group = (
        ClassLevel(names, torch.tensor([names.index(name) for name in assigned]))
        for names, assigned in per_concept
    )
    return subgroup, coarse, group


def _group_name(key: str) -> str:
    return key.replace("-", " & ", 1)


class CaptionSampler:
    """Draws one caption for a concept: name, templated name, tags, or name with its subgroup or group."""

    kinds = ("name", "template", "name_tags", "tags", "subgroup", "group")
    probabilities = (0.45, 0.15, 0.14, 0.10, 0.10, 0.06)

    def __init__(self, language: str = "en") -> None:
        """Draw captions in one of the embedded languages."""
        self._concepts = embedded.concepts()
        self._language = language

    def draw(self, number: int, generator: np.random.Generator) -> str:
        """A caption of concept `number`."""
        concept = self._concepts[number]
        name, tags = concept.names[self._language], concept.tags[self._language]
        kind = generator.choice(self.kinds, p=self.probabilities)
        chosen = ", ".join(generator.permutation(tags)[: generator.integers(1, 5)]) if tags else name
        return {
            "name": name,
            "template": str(generator.choice(TEMPLATES)).format(name),
            "name_tags": f"{name}, {chosen}",
            "tags": chosen,
            "subgroup": f"{name}, {readable(concept.subgroup)}",
            "group": f"{name}, {_group_name(concept.group)}",
        }[str(kind)]


class PictureSampler:
    """Draws augmented pictures of concepts from a random training vendor each."""

    def __init__(self) -> None:
        """Read the sheets of the training vendors."""
        tiles = np.stack([embedded.emoji_tiles(vendor) for vendor in TRAIN_VENDORS])
        self._tiles = torch.from_numpy(tiles).permute(0, 1, 4, 2, 3).contiguous()  # (V, N, 4, 32, 32)
        concepts = embedded.concepts()
        self._vendors = [
            [v for v, name in enumerate(TRAIN_VENDORS) if name not in concept.missing] for concept in concepts
        ]

    def draw(self, numbers: np.ndarray, generator: np.random.Generator) -> torch.Tensor:
        """Normalised pixel values (B, 3, 32, 32) of the concepts `numbers` (B,)."""
        vendors = [int(generator.choice(self._vendors[number])) for number in numbers]
        rgba = self._tiles[vendors, torch.from_numpy(numbers)].float() / 255  # (B, 4, 32, 32)
        alpha = rgba[:, 3:]
        warped = _random_affine(torch.cat([rgba[:, :3] * alpha, alpha], dim=1), generator)
        picture = _over_random_background(warped, generator)
        return normalise(_random_colours(picture, generator))


def normalise(picture: torch.Tensor) -> torch.Tensor:
    """Scale RGB in [0, 1] (B, 3, H, W) to CLIP's pixel values."""
    return (picture - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


def _uniform(generator: np.random.Generator, low: float, high: float, count: int) -> torch.Tensor:
    return torch.from_numpy(generator.uniform(low, high, count).astype(np.float32))


def _chance(generator: np.random.Generator, probability: float, count: int) -> torch.Tensor:
    return torch.from_numpy(generator.random(count) < probability).view(-1, 1, 1, 1)


def _random_affine(premultiplied: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Rotate by up to 10 degrees, scale by 0.9 to 1.2, shift by up to 2 pixels, mirror 30 %."""
    count = len(premultiplied)
    angle = torch.deg2rad(_uniform(generator, -10, 10, count))
    zoom = 1 / _uniform(generator, 0.9, 1.2, count)
    mirror = 1 - 2 * _chance(generator, 0.3, count).float().view(-1)
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift_x, shift_y = _uniform(generator, -0.12, 0.12, count), _uniform(generator, -0.12, 0.12, count)
    top = torch.stack([cosine * mirror, -sine, shift_x], dim=1)
    bottom = torch.stack([sine * mirror, cosine, shift_y], dim=1)
    theta = torch.stack([top, bottom], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(premultiplied.shape), align_corners=False)
    return F.grid_sample(premultiplied, grid, align_corners=False)


def _over_random_background(premultiplied: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Lay (B, 4, H, W) over white, black or a random colour, a third each; returns RGB (B, 3, H, W)."""
    count = len(premultiplied)
    kind = generator.integers(0, 3, count)
    colours = generator.random((count, 3)).astype(np.float32)
    colours[kind == 0] = 1.0
    colours[kind == 1] = 0.0
    background = torch.from_numpy(colours).view(-1, 3, 1, 1)
    return premultiplied[:, :3] + background * (1 - premultiplied[:, 3:])


def _random_colours(picture: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Jitter brightness and contrast by 25 %; gray 25 %; invert 12 %."""
    count = len(picture)
    contrast = _uniform(generator, 0.75, 1.25, count).view(-1, 1, 1, 1)
    brightness = _uniform(generator, 0.75, 1.25, count).view(-1, 1, 1, 1)
    mean = picture.mean(dim=(1, 2, 3), keepdim=True)
    picture = (((picture - mean) * contrast + mean) * brightness).clamp(0, 1)
    luminance = (picture * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    picture = torch.where(_chance(generator, 0.25, count), luminance.expand_as(picture), picture)
    return torch.where(_chance(generator, 0.12, count), 1 - picture, picture)

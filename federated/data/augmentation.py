"""Image and caption augmentation as batched tensor operations, from the generator passed in.

Images come preprocessed, so colours are changed in the space of 0 to 1 that the model's mean and deviation
give back. Crop: Szegedy et al. 2015 (arXiv:1409.4842), colour jitter: Howard 2013 (arXiv:1312.5402); caption
templates: Radford et al. 2021 (arXiv:2103.00020, section 3.1.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's image mean and deviation, of its preprocessor_config.json."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to a client's training images and captions; the defaults do nothing.

    Attributes:
        crop_scale: least and greatest share of the image's area that a random resized crop keeps; (1, 1) is
            no crop.
        crop_ratio: least and greatest width : height of the crop, drawn log-uniformly.
        flip_probability: chance of a horizontal flip.
        brightness: factor drawn from 1 - brightness to 1 + brightness.
        contrast: likewise, around the image's mean grey.
        saturation: likewise, around each pixel's grey.
        templates: texts with one "{}" each; a caption is put into one at random.
        mean: the preprocessor's channel means.
        deviation: the preprocessor's channel deviations.

    Raises:
        UserError: a value out of range; names the option.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    templates: tuple[str, ...] = ()
    mean: tuple[float, float, float] = CLIP_MEAN
    deviation: tuple[float, float, float] = CLIP_DEVIATION

    def __post_init__(self) -> None:
        """Check every range."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(
                f"crop_scale is {self.crop_scale}; it must be two shares, 0 < least <= greatest <= 1"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise UserError(f"crop_ratio is {self.crop_ratio}; it must be 0 < least <= greatest")
        for option in ("flip_probability", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, option) <= 1:
                raise UserError(f"{option} is {getattr(self, option)}; it must be between 0 and 1")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UserError(f"caption template {template!r} must have one {{}} where the caption goes")
        if min(self.deviation) <= 0:
            raise UserError(f"deviation is {self.deviation}; every channel's must be above 0")

    @property
    def changes_anything(self) -> bool:
        """Whether images or captions are changed at all."""
        return self.changes_images or bool(self.templates)

    @property
    def changes_images(self) -> bool:
        """Whether images come out different; otherwise their features may be cached."""
        return (
            self.crop_scale != (1.0, 1.0)
            or self.flip_probability > 0
            or max(self.brightness, self.contrast, self.saturation) > 0
        )


def augmentation_from(options: Mapping[str, Any]) -> Augmentation:
    """Make an ``Augmentation`` of configuration values, such as ``{"flip_probability": 0.5}``.

    Raises:
        UserError: an unknown option, or a value of the wrong form or range.
    """
    known = [field.name for field in fields(Augmentation)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"no augmentation {', '.join(unknown)}; there are {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return Augmentation(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"augmentation {dict(options)} is not of the right form: {error}") from error


def augment_images(pixel_values: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop, flip and recolour each image of a batch on its own.

    Draws happen on the generator's device, so a CPU generator gives every device the same images.

    Args:
        pixel_values: preprocessed images, (B, 3, H, W).
        augmentation: what to do.
        generator: the client's generator; the only source of randomness.

    Returns:
        (B, 3, H, W); the very tensor passed in when there is nothing to do.
    """
    images = pixel_values
    if augmentation.crop_scale != (1.0, 1.0):
        boxes = crop_boxes(len(images), augmentation, generator, aspect=images.shape[-1] / images.shape[-2])
        images = crop_and_resize(images, boxes)
    if augmentation.flip_probability > 0:
        flip = torch.rand(len(images), generator=generator) < augmentation.flip_probability  # (B,)
        images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
    if max(augmentation.brightness, augmentation.contrast, augmentation.saturation) > 0:
        images = _jitter_colours(images, augmentation, generator)
    return images


def crop_boxes(
    num_images: int, augmentation: Augmentation, generator: torch.Generator, *, aspect: float = 1.0
) -> Tensor:
    """Draw crop boxes: area uniform, ratio log-uniform, place uniform.

    A box that would stick out is made to fit its side of the image rather than drawn again.

    Args:
        num_images: B.
        augmentation: gives ``crop_scale`` and ``crop_ratio``.
        generator: the only source of randomness.
        aspect: width : height of the images.

    Returns:
        left, top, width, height as shares of the image, (B, 4).
    """
    draws = torch.rand((num_images, 4), generator=generator)  # (B, 4)
    low, high = augmentation.crop_scale
    area = low + (high - low) * draws[:, 0]
    low, high = (math.log(ratio / aspect) for ratio in augmentation.crop_ratio)
    ratio = torch.exp(low + (high - low) * draws[:, 1])
    width = torch.sqrt(area * ratio).clamp(max=1.0)
    height = torch.sqrt(area / ratio).clamp(max=1.0)
    return torch.stack([draws[:, 2] * (1 - width), draws[:, 3] * (1 - height), width, height], dim=1)


def crop_and_resize(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of each image and enlarge it to the image's size, bilinearly.

    Args:
        images: (B, 3, H, W).
        boxes: left, top, width, height as shares of the image, (B, 4).

    Returns:
        (B, 3, H, W).
    """
    boxes = boxes.to(images.device, images.dtype)
    left, top, width, height = boxes.unbind(dim=1)
    affine = torch.zeros(len(images), 2, 3, device=images.device, dtype=images.dtype)
    affine[:, 0, 0], affine[:, 0, 2] = width, 2 * left + width - 1
    affine[:, 1, 1], affine[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def augment_captions(
    captions: Sequence[str], augmentation: Augmentation, rng: np.random.Generator
) -> list[str]:
    """Put each caption into a template at random; without templates they stay as they are.

    Args:
        captions: B texts.
        augmentation: gives the templates.
        rng: the client's generator; the only source of randomness.
    """
    if not augmentation.templates:
        return list(captions)
    chosen = rng.integers(len(augmentation.templates), size=len(captions))
    return [
        augmentation.templates[number].replace("{}", caption)
        for number, caption in zip(chosen, captions, strict=True)
    ]


def _jitter_colours(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Brightness, then contrast, then saturation, each by a factor of the image's own, within 0 to 1."""
    constants = torch.tensor([augmentation.mean, augmentation.deviation, LUMINANCE])  # (3, 3)
    mean, deviation, weights = constants.to(images)[:, :, None, None]  # (3, 1, 1) each
    strengths = torch.tensor([augmentation.brightness, augmentation.contrast, augmentation.saturation])
    draws = torch.rand((len(images), 3), generator=generator)  # (B, 3)
    factors = (1 + strengths * (2 * draws - 1)).to(images)[:, :, None, None, None]
    colours = images * deviation + mean  # (B, 3, H, W) in 0 to 1
    colours = (colours * factors[:, 0]).clamp(0, 1)
    grey = (colours * weights).sum(dim=1, keepdim=True)  # (B, 1, H, W)
    middle = grey.mean(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
    colours = (middle + factors[:, 1] * (colours - middle)).clamp(0, 1)
    grey = (colours * weights).sum(dim=1, keepdim=True)
    colours = (grey + factors[:, 2] * (colours - grey)).clamp(0, 1)
    return (colours - mean) / deviation

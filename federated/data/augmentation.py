"""Image and caption augmentation as batched tensor operations, from the generator passed in.

Images come preprocessed, so colours are changed in the space of 0 to 1 that the model's mean and deviation
give back. Crop: Szegedy et al. 2015 (arXiv:1409.4842), colour jitter: Howard 2013 (arXiv:1312.5402); caption
templates: Radford et al. 2021 (arXiv:2103.00020, section 3.1.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from federated.config.augmentation_options import Augmentation

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


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

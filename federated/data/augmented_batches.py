"""Augmentation of training batches: what the configuration asks for, in the colours of the run's model.

Every draw comes from a generator that belongs to one client in one round, so no client's images depend on who
else trains; without options a batch goes through untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from federated.config.augmentation_options import Augmentation, augmentation_from
from federated.data.augmentation import augment_captions, augment_images
from federated.data.image_tensors import Batch, Preprocess
from models.errors import UserError

_PROBE_PIXELS = 8  # edge of the plain images that show what a preprocessor does to colours


def training_augmentation(
    options: Mapping[str, Any], preprocess: Preprocess, *, captions: bool
) -> Augmentation:
    """Return what ``client.augmentation`` asks for, in the model's colours unless it names others.

    Args:
        options: Options of ``Augmentation`` by name; none: nothing is changed.
        preprocess: The model's image processor, asked for what black and white become.
        captions: Whether the task trains on captions, which templates need.

    Raises:
        UserError: An option is unknown or out of range, or has nothing to work on.
    """
    augmentation = augmentation_from(options)
    if augmentation.templates and not captions:
        raise UserError(
            "client.augmentation.templates go around captions, which only task.name=retrieval trains on: "
            "leave them out (prompts around class names are task.templates)"
        )
    if "mean" in options or "deviation" in options or not augmentation.changes_images:
        return augmentation
    mean, deviation = colour_range(preprocess)
    return replace(augmentation, mean=mean, deviation=deviation)


def colour_range(preprocess: Preprocess) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return (mean, deviation) of a preprocessor's channels, read off a black and a white image.

    A preprocessor maps a colour c of 0 to 1 to (c - mean) / deviation.
    """
    size = (_PROBE_PIXELS, _PROBE_PIXELS)
    black, white = (
        preprocess(Image.new("RGB", size, colour))[:, 0, 0].double() for colour in ("black", "white")
    )  # (3,)
    deviation = 1 / (white - black)
    red, green, blue = (-black * deviation).tolist()
    return (red, green, blue), tuple(deviation.tolist())


def augment_batch(batch: Batch, augmentation: Augmentation, rng: np.random.Generator) -> Batch:
    """Augment the images and captions of one batch.

    Args:
        batch: As ``ImageTensors.batch`` makes it; not changed.
        augmentation: What to do.
        rng: The client's generator of this round; the only source of randomness.

    Returns:
        The batch; the very one passed in when there is nothing to do.
    """
    changes: Batch = {}
    if augmentation.changes_images:
        draws = torch.Generator().manual_seed(int(rng.integers(2**63)))
        changes["pixel_values"] = augment_images(batch["pixel_values"], augmentation, draws)
    if augmentation.templates and "captions" in batch:
        changes["captions"] = augment_captions(batch["captions"], augmentation, rng)
    return {**batch, **changes} if changes else batch

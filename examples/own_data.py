"""A data source of your own: stripes, drawn here, whose direction is their class.

    fedlora run quickstart --plugin examples/own_data.py data.source=stripes model.num_classes=null

`model.num_classes=null`: the quickstart says 10, and here there are 3.
"""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage

from federated import register_source
from federated.data.sources.form import FederatedData, split_off
from models.errors import UserError

DIRECTIONS = ("horizontal stripes", "vertical stripes", "diagonal stripes")


@register_source("stripes")
def stripes(
    rng: np.random.Generator, *, num_images: int = 600, noise: float = 0.3, test_fraction: float = 0.25
) -> FederatedData:
    """Noisy grey stripes of random width, in three directions.

    Args:
        rng: Draws widths, noise and the test rows.
        num_images: Number of images.
        noise: Standard deviation of the noise, where the stripes go from -1 to 1.
        test_fraction: Share of the images for the test split.
    """
    if num_images < 30:
        raise UserError(f"num_images is {num_images}; give 30 or more", options=["num_images"])
    labels = [row % len(DIRECTIONS) for row in range(num_images)]
    images = [_draw(label, noise, rng) for label in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIRECTIONS))})
    rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
    train, test = split_off(rows, test_fraction, rng, label_column="label")
    return FederatedData(
        train=train,
        validation=None,
        test=test,
        class_names=DIRECTIONS,
        label_column="label",
        image_column="image",
        caption_column=None,
        domain_column=None,
        name="stripes",
        drawn=("test",),
    )


def _draw(label: int, noise: float, rng: np.random.Generator) -> PilImage.Image:
    y, x = np.mgrid[0:32, 0:32]
    wave = np.sin((y, x, x + y)[label] * rng.uniform(0.6, 1.6) + rng.uniform(0, 6)) + rng.normal(
        0, noise, (32, 32)
    )
    return PilImage.fromarray(np.clip(127 + 100 * wave, 0, 255).astype(np.uint8)).convert("RGB")

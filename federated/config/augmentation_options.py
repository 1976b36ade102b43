"""What a configuration may ask of augmentation; ``federated.data.augmentation`` does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from models.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's image mean and deviation, of its preprocessor_config.json."""


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

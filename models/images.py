"""CLIP's image processing with PIL and torch, and the one way in which images of any kind become RGB.

Used when data is read, before the first round: every image of every client passes through it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from torch import Tensor
from transformers import CLIPImageProcessorPil

from models.errors import UserError

WHITE = "white"
"""What transparent places show, unless another colour is asked for."""

_FLOAT_TOLERANCE = 1e-3  # how far rounding may carry a float beyond black and white


def load_image(path: Path | str) -> Image.Image:
    """Read an image file: its first frame, upright by its EXIF orientation, in the mode of the file.

    Raises:
        OSError, ValueError and others of Pillow's: it cannot be decoded.
    """
    with Image.open(path) as image:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation) is None:
            return image
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
        return upright


def rgb_image(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Show an image of any mode in RGB, as a viewer does.

    16 bits are scaled to 8 (v / 257), floats of 0 to 1 likewise, and transparent places show the background.

    Args:
        image: Of any mode of Pillow's.
        background: A colour by name or number, such as "black" or "#808080".

    Raises:
        UserError: Integers or floats of which it is not known what is white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey = Image.fromarray(_grey_levels(image))
        see_through = image.info.get("transparency")
        if not isinstance(see_through, int):
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == see_through, 0, 255).astype(np.uint8)))
        image = grey
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    shown = image.convert("RGBA")
    if shown.getchannel("A").getextrema() == (255, 255):
        return shown.convert("RGB")
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    canvas.alpha_composite(shown)
    return canvas.convert("RGB")


def _grey_levels(image: Image.Image) -> np.ndarray:
    """8-bit grey of an image of integers or floats, (H, W)."""
    values = np.asarray(image).astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (low >= -_FLOAT_TOLERANCE and high <= 1 + _FLOAT_TOLERANCE):  # false for what is not a number
            raise UserError(
                f"it holds floats from {low:g} to {high:g}, where 0 to 1 is black to white: scale them, or "
                "save it with 8 or 16 bits a value"
            )
        scaled = values * 255
    elif image.mode == "I" and not _is_16_bit(image, low, high):
        raise UserError(
            f"it holds 32-bit integers from {low:.0f} to {high:.0f}, of which it is not known what is white: "
            "save it with 8 or 16 bits a value"
        )
    else:
        scaled = values / 257
    levels: np.ndarray = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    return levels


def _is_16_bit(image: Image.Image, low: float, high: float) -> bool:
    """Whether 32-bit integers hold a 16-bit image: by the file's format, or by large values."""
    if low < 0 or high > 65535:  # noqa: PLR2004
        return False
    return high == 0 or high > 255 or image.format in ("PNG", "PPM")  # noqa: PLR2004


def with_background(
    preprocess: Callable[[Image.Image], Tensor], background: str
) -> Callable[[Image.Image], Tensor]:
    """Return an image processor that shows transparent places in another colour.

    Raises:
        UserError: There is no such colour, or the processor is not one of ours.
    """
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise UserError(
            f"data.background={background!r} is no colour ({error}): use white, black or #rrggbb"
        ) from error
    if isinstance(preprocess, ImageProcessor):
        return replace(preprocess, background=background)
    if background != WHITE:
        raise UserError(f"data.background={background}: this model's image processor knows white alone")
    return preprocess


@dataclass(frozen=True)
class ImageProcessor:
    """Resize, centre crop, scale, normalise.

    Equal to transformers' CLIPImageProcessorPil, several times faster for one image and without
    torchvision. Images of any mode become RGB by `rgb_image`, over `background`.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: Image.Resampling
    scale: Tensor  # (3, 1, 1)
    shift: Tensor  # (3, 1, 1)
    background: str = WHITE

    @classmethod
    def from_values(
        cls,
        *,
        size: tuple[int, int] | int | None,
        crop: tuple[int, int] | None,
        resample: Image.Resampling,
        factor: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> ImageProcessor:
        """Make a processor.

        Args:
            size: (height, width), or the length of the shorter edge, or None to keep the size.
            crop: (height, width) of the centre crop, or None.
            resample: PIL's filter.
            factor: What 0..255 is multiplied with.
            mean: Subtracted per channel after that.
            std: Divided by per channel at the end.
        """
        means, stds = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        return cls(size=size, crop=crop, resample=resample, scale=factor / stds, shift=-means / stds)

    @classmethod
    def from_settings(cls, settings: CLIPImageProcessorPil) -> ImageProcessor:
        """Read the values of a preprocessor_config.json."""
        size: tuple[int, int] | int | None = None
        if settings.do_resize:
            edge = settings.size.get("shortest_edge")
            size = int(edge) if edge else (int(settings.size["height"]), int(settings.size["width"]))
        return cls.from_values(
            size=size,
            crop=(settings.crop_size["height"], settings.crop_size["width"])
            if settings.do_center_crop
            else None,
            resample=Image.Resampling(settings.resample),
            factor=settings.rescale_factor if settings.do_rescale else 1.0,
            mean=settings.image_mean if settings.do_normalize else [0.0] * 3,
            std=settings.image_std if settings.do_normalize else [1.0] * 3,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixel values (3, H, W), float32."""
        image = self._resized(rgb_image(image, self.background))
        if self.crop is not None and (image.height, image.width) != self.crop:
            top, left = (image.height - self.crop[0]) // 2, (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # (H * W * 3,)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)
        return torch.addcmul(self.shift, pixels.to(torch.float32), self.scale)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            return image
        if isinstance(self.size, tuple):
            target = (self.size[1], self.size[0])
        elif image.width <= image.height:
            target = (self.size, int(self.size * image.height / image.width))
        else:
            target = (int(self.size * image.width / image.height), self.size)
        return image if image.size == target else image.resize(target, self.resample)

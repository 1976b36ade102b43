"""The one way in which image files are read, and images of any mode become RGB: as a viewer shows them.

Used wherever images come in: a run's data, what is predicted or encoded, and the check of a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

from models.errors import UserError

WHITE = "white"
"""What transparent places show, unless another colour is asked for."""

_FLOAT_TOLERANCE = 1e-3  # how far rounding may carry a float beyond black and white


def load_image(path: Path | str | BinaryIO) -> Image.Image:
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


def num_frames(path: Path | str | BinaryIO) -> int:
    """Return how many frames or pages an image file has; of those, `load_image` reads the first.

    The second picture in a camera's JPEG (MPO) is a preview or another eye's view, and does not count.

    Raises:
        OSError, ValueError and others of Pillow's: it cannot be decoded.
    """
    with Image.open(path) as image:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


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

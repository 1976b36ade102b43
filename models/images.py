"""CLIP's image processing with PIL and torch.

Used when data is read, before the first round: every image of every client passes through it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageColor
from torch import Tensor
from transformers import CLIPImageProcessorPil

from models.errors import UserError
from models.image_modes import WHITE, rgb_image


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

"""Images as tensors: each image is decoded and preprocessed once and kept within a memory budget.

No worker processes; all order comes from the generator passed in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from federated.data.batch_order import index_batches
from federated.data.names import read_alike
from federated.data.row_cache import shared_zeros
from federated.data.sources.folder_scan import DECODE_ERRORS
from federated.data.splits import IntArray, column_values
from models.errors import UserError
from models.image_modes import WHITE, rgb_image

logger = logging.getLogger(__name__)

Preprocess = Callable[[Image.Image], Tensor]
"""PIL image -> (3, H, W) float32; deterministic."""

Batch = dict[str, Any]

DEFAULT_CACHE_BYTES = 1_000_000_000
GREY_LEVELS = 256


class ImageTensors:
    """The rows of one split as tensors, decoded on first use.

    Three ways of keeping images, the first that fits the budget:

    - ``"uint8"``: a processor that only resizes 8-bit images and scales them has at most 256 values per
      channel; one byte per value and a table (3, 256) give its output back bit by bit, in a quarter of the
      memory. Whether that holds is checked for every image.
    - ``"float"``: the preprocessed tensors, where it does not hold.
    - ``"decode"``: nothing is kept.

    Args:
        dataset: the rows.
        preprocess: PIL image (always RGB) -> (3, H, W) float32 of one size for all images.
        image_column: the image column.
        label_column: the column of class numbers, if any.
        caption_column: the column of texts, if any.
        concept_column: rows of equal value show the same thing, if known.
        picture_column: rows of equal value are of the same picture, if known.
        cache_bytes: the memory budget for kept images.

    Attributes:
        image_shape: (3, H, W) of a preprocessed image.
        mode: "uint8", "float" or "decode", as above; may go down as images turn out not to fit.

    Raises:
        UserError: an empty data set, a missing column, or a first image that cannot be decoded.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        *,
        image_column: str = "image",
        label_column: str | None = None,
        caption_column: str | None = None,
        concept_column: str | None = None,
        picture_column: str | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Read the scalar columns and one image; decode the others when they are asked for."""
        if len(dataset) == 0:
            raise UserError(
                "there are no samples to turn into tensors; check the data's split and subset options"
            )
        if image_column not in dataset.column_names:
            raise UserError(
                f"the data has no column {image_column!r}; it has {', '.join(dataset.column_names)}"
            )
        self._images = dataset.select_columns([image_column])
        self._image_column = image_column
        self._preprocess = preprocess
        self._cache_bytes = cache_bytes
        self._labels = None if label_column is None else _codes(dataset, label_column, distinct=False)
        self._captions = None if caption_column is None else list(column_values(dataset, caption_column))
        self._ids = {
            key: _codes(dataset, column, distinct=True)
            for key, column in (("concept", concept_column), ("picture", picture_column))
            if column is not None
        }
        if self._captions is not None:
            texts = np.array([read_alike(caption) for caption in self._captions])
            self._ids["text"] = torch.from_numpy(np.unique(texts, return_inverse=True)[1])
        self.image_shape = tuple(self._decode(np.zeros(1, dtype=np.int64))[0].shape)
        self._levels = _grey_levels(preprocess)  # (3, 256) or None
        self._kept: Tensor | None = None
        self._is_kept: npt.NDArray[np.bool_] = np.zeros(len(dataset), dtype=np.bool_)
        self.mode = "decode"
        self._start_cache()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._images)

    def pixel_values(self, indices: npt.ArrayLike) -> Tensor:
        """Return preprocessed images, (B, 3, H, W) float32.

        Args:
            indices: rows, (B,).

        Raises:
            UserError: an image cannot be decoded; named.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if self.mode != "decode" and not self._is_kept[rows].all():
            self._keep(np.unique(rows[~self._is_kept[rows]]))
        if self._kept is None:  # no budget, or given up just now
            return self._decode(rows)
        kept = self._kept[torch.from_numpy(rows)]
        if self.mode == "float" or self._levels is None:
            return kept
        first_levels = GREY_LEVELS * np.arange(kept.shape[1]).reshape(-1, 1, 1)  # of each channel
        return torch.from_numpy(self._levels.numpy().reshape(-1).take(kept.numpy() + first_levels))

    @property
    def captions(self) -> list[str]:
        """The caption of each row; none where the data has no captions."""
        return [] if self._captions is None else self._captions

    def batch(self, indices: npt.ArrayLike, *, pixels: bool = True) -> Batch:
        """Return one batch.

        Args:
            indices: rows, (B,).
            pixels: False leaves the images out, and undecoded.

        Returns:
            "pixel_values" (B, 3, H, W), "index" (B,) the rows, and as far as the data has them "labels" (B,),
            "concept", "picture" and "text" (B,) int64 (equal numbers show the same thing, are of the same
            picture, have captions that read alike) and "captions", a list of B strings.
        """
        rows = np.asarray(indices, dtype=np.int64)
        index = torch.from_numpy(rows)
        batch: Batch = {"index": index}
        if pixels:
            batch["pixel_values"] = self.pixel_values(rows)
        if self._labels is not None:
            batch["labels"] = self._labels[index]
        batch |= {key: ids[index] for key, ids in self._ids.items()}
        if self._captions is not None:
            batch["captions"] = [self._captions[row] for row in rows]
        return batch

    def batches(
        self,
        indices: npt.ArrayLike | None,
        batch_size: int,
        *,
        rng: np.random.Generator | None,
        drop_last: bool = False,
        pixels: bool = True,
    ) -> Iterator[Batch]:
        """Yield the batches of one pass, as ``index_batches`` orders them; ``indices=None`` is all rows."""
        rows = np.arange(len(self)) if indices is None else indices
        for chosen in index_batches(rows, batch_size, rng=rng, drop_last=drop_last):
            yield self.batch(chosen, pixels=pixels)

    def _start_cache(self) -> None:
        """Set memory apart for the densest form that is possible and fits."""
        num_values = len(self) * math.prod(self.image_shape)
        for mode, dtype, possible in (
            ("uint8", torch.uint8, self._levels is not None),
            ("float", torch.float32, True),
        ):
            if possible and num_values * dtype.itemsize <= self._cache_bytes:
                # Shared with forked workers: what one of them decodes, all have.
                self.mode = mode
                kept = shared_zeros((len(self), *self.image_shape), str(dtype).removeprefix("torch."))
                self._kept, self._is_kept = torch.from_numpy(kept), shared_zeros((len(self),), np.bool_)
                return
        self.mode, self._kept = "decode", None
        logger.info("%d images do not fit %d bytes: they are decoded when read", len(self), self._cache_bytes)

    def _keep(self, rows: IntArray) -> None:
        """Decode rows into the cache."""
        if len(rows) == 0 or self._kept is None:
            return
        values = self._decode(rows)
        if self.mode == "uint8" and self._levels is not None:
            numbers = _level_numbers(values, self._levels)
            if numbers is None:
                self._leave_uint8()
                self._keep(rows)
                return
            values = numbers
        self._kept[torch.from_numpy(rows)] = values
        self._is_kept[rows] = True

    def _leave_uint8(self) -> None:
        """An image has values of its own: go on with floats, or without a cache."""
        logger.info("preprocessing gives more than 256 values per channel: images are not kept as bytes")
        self._levels = None
        self._start_cache()

    def _decode(self, rows: IntArray) -> Tensor:
        """Decode and preprocess rows, (B, 3, H, W)."""
        try:
            images = self._images[rows.tolist()][self._image_column]
        except DECODE_ERRORS as error:
            raise UserError(self._undecodable(rows, error)) from error
        try:
            tensors = [self._shown(image) for image in images]
        except UserError as error:  # an image of values that cannot be shown
            raise UserError(self._undecodable(rows, error)) from error
        return torch.stack(tensors).to(torch.float32)

    def _shown(self, image: Image.Image) -> Tensor:
        """Preprocess an image of any mode, (3, H, W)."""
        return self._preprocess(rgb_image(image, getattr(self._preprocess, "background", WHITE)))

    def _undecodable(self, rows: IntArray, error: Exception) -> str:
        """Say which image it was."""
        raw = self._images.cast_column(self._image_column, ImageFeature(decode=False))
        for row in rows.tolist():
            try:
                self._shown(self._images[row][self._image_column])
            except DECODE_ERRORS:
                name = raw[row][self._image_column]["path"] or f"image {row}"
                remedy = "replace it, or set data.options.skip_corrupt=true"
                return f"{name} (row {row}) cannot be decoded ({error}); {remedy}"
        return f"an image cannot be decoded: {error}"


def _codes(dataset: Dataset, column: str, *, distinct: bool) -> Tensor:
    """A column as int64 numbers, (N,): as they are, or numbered by distinct value."""
    values = column_values(dataset, column)
    numbers = np.unique(values, return_inverse=True)[1] if distinct else values
    return torch.tensor(np.asarray(numbers), dtype=torch.int64)


def _grey_levels(preprocess: Preprocess) -> Tensor | None:
    """What each of the 256 grey levels becomes in each channel, (3, 256); None if not one value each."""
    table = torch.empty(3, GREY_LEVELS)  # filled in place: small tensors would scatter over the heap
    for level in range(GREY_LEVELS):
        values = preprocess(Image.new("RGB", (8, 8), (level, level, level))).to(torch.float32)
        flat = values.flatten(1)  # (3, H*W)
        if not torch.equal(flat, flat[:, :1].expand_as(flat)):
            return None
        table[:, level] = flat[:, 0]
    return table if bool((table.diff(dim=1) > 0).all()) else None


def _level_numbers(values: Tensor, levels: Tensor) -> Tensor | None:
    """Grey levels (B, 3, H, W) uint8 of preprocessed images; None unless they give them back exactly."""
    channels = []
    for channel in range(levels.shape[0]):
        exact = values[:, channel].contiguous()
        numbers = torch.searchsorted(levels[channel].contiguous(), exact).clamp_(max=GREY_LEVELS - 1)
        if not torch.equal(levels[channel][numbers], exact):
            return None
        channels.append(numbers.to(torch.uint8))
    return torch.stack(channels, dim=1)

"""From rows to batches of questions: a picture is decoded once, and read once by a frozen vision tower.

The rows of one picture share both, however many questions there are about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from federated.data.image_tensors import ImageTensors
from federated.data.row_cache import RowCache
from federated.data.row_reader import ReadingSettings, TaskReader, task_reader
from federated.data.sources.form import FederatedData
from federated.data.splits import IntArray, column_values
from models.errors import UserError
from models.training import Batch
from models.vqa import FederatedVQAModel

PATCHES_AT_ONCE = 64
"""Pictures that pass through a frozen tower at a time."""


class PictureSplit:
    """The pictures of one split.

    Args:
        model: Says how images are prepared.
        data: The rows.
        split: Which of them.
        settings: Memory for images and for what is computed of them.
    """

    def __init__(
        self, model: FederatedVQAModel, data: FederatedData, split: str, settings: ReadingSettings
    ) -> None:
        self._model, rows = model, data.split(split)
        if data.image_column is None or data.picture_column is None:
            raise UserError(
                f"task.name=vqa needs images and pictures, and data.source={data.name!r} has none"
            )
        pictures = column_values(rows, data.picture_column)
        _, first, self.numbers = np.unique(pictures, return_index=True, return_inverse=True)
        self.images = ImageTensors(
            rows.select(first),
            model.preprocess,
            image_column=data.image_column,
            cache_bytes=settings.cache_bytes,
        )
        self.patches: RowCache | None = None
        if settings.caches.image_features and model.vision_is_frozen:
            vision = model.vision_config
            shape = ((vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
            self.patches = RowCache(
                self._read,
                len(first),
                shape,
                batch_size=PATCHES_AT_ONCE,
                max_bytes=settings.caches.max_bytes,
                folder=settings.caches.folder,
            )

    @torch.no_grad()
    def _read(self, pictures: IntArray) -> Tensor:
        pixels = self.images.pixel_values(pictures).to(self._model.device)
        return self._model.patch_states(pixels)

    def batch(self, rows: IntArray) -> Batch:
        """Return what a batch has of the pictures of some rows: their number, and pixels or patches."""
        chosen = self.numbers[rows]
        picture = torch.from_numpy(chosen.astype(np.int64))
        if self.patches is not None:
            return {"picture": picture, "patches": self.patches.rows(chosen)}
        return {"picture": picture, "pixel_values": self.images.pixel_values(chosen)}


class QuestionReader:
    """Makes batches for a model that answers questions about images.

    Args:
        model: The federated model, with its adapters.
        data: The rows.
        settings: How they are read.
    """

    def __init__(self, model: FederatedVQAModel, data: FederatedData, settings: ReadingSettings) -> None:
        task_reader(model, data, settings)  # refuses what goes with no task of rows
        columns = [column for column in model.task.reads if column != "image"]
        self._texts = TaskReader(data, columns, partial(model.task.batch, model))
        self._make = partial(PictureSplit, model, data, settings=settings)
        self._splits: dict[str, PictureSplit] = {}
        kept = self._pictures("train").patches is not None
        why = "" if kept else ": they change, or cache.image_features=false"
        self.notes: Sequence[str] = (
            f"patch features: {'computed once a picture' if kept else 'computed in every step'}{why}",
        )

    def _pictures(self, split: str) -> PictureSplit:
        if split not in self._splits:
            self._splits[split] = self._make(split)
        return self._splits[split]

    def batch(self, split: str, rows: IntArray) -> Batch:
        """Return the batch of some rows, (B,)."""
        return {**self._texts.batch(split, rows), **self._pictures(split).batch(rows)}

    def training_batch(self, rows: IntArray, rng: np.random.Generator) -> Batch:
        """Return the batch of some training rows, (B,); nothing is changed at random."""
        return self.batch("train", rows)

    def read_before_forking(self) -> None:
        """Read the first picture, so that the form in which images are kept is known."""
        self._pictures("train").images.pixel_values([0])

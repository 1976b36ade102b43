"""From rows to CLIP's batches: images decoded once, frozen work done once, captions as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from federated.data.augmented_batches import augment_batch, training_augmentation
from federated.data.dataset import ImageTensors, image_tensors
from federated.data.feature_cache import build_feature_caches
from federated.data.row_reader import ReadingSettings, TaskReader, task_reader
from federated.data.sources.form import FederatedData
from federated.data.splits import IntArray
from models.clip import FederatedCLIPModel
from models.metrics import CONCEPT, PICTURE, TEXT
from models.training import Batch


class ImageReader:
    """Makes batches for a CLIP whose task reads images, and labels or captions.

    Args:
        model: The federated model, with its adapters.
        data: The rows.
        settings: How they are read.

    Attributes:
        train_images: Tensors of the training rows.
        test_images: Tensors of the server's test rows.
        augmentation: What is done to the images and captions that clients train on.
        caches: What of the frozen towers is computed once.
    """

    def __init__(self, model: FederatedCLIPModel, data: FederatedData, settings: ReadingSettings) -> None:
        self._model, self._data, self._cache_bytes = model, data, settings.cache_bytes
        self._splits: dict[str, ImageTensors] = {}
        self.train_images, self.test_images = self.images("train"), self.images("test")
        self.augmentation = training_augmentation(
            settings.augmentation, model.preprocess, captions=model.task.reads_captions
        )
        self.caches = build_feature_caches(
            model, self._splits, settings.caches, self.augmentation, batch_size=settings.batch_size
        )

    @property
    def notes(self) -> Sequence[str]:
        """What is computed once and what is not, one line each."""
        return self.caches.notes

    def images(self, split: str) -> ImageTensors:
        """Return the tensors of a split, made at its first use."""
        if split not in self._splits:
            self._splits[split] = image_tensors(
                self._data, split, self._model.preprocess, cache_bytes=self._cache_bytes
            )
        return self._splits[split]

    def batch(self, split: str, rows: IntArray) -> Batch:
        """Return the batch of some rows (B,) for an evaluation."""
        images = self.images(split)
        kept = self.caches.serves_images(images, training=False)
        return self.model_batch(images.batch(rows, pixels=not kept), images if kept else None)

    def training_batch(self, rows: IntArray, rng: np.random.Generator) -> Batch:
        """Return the batch of some training rows (B,), augmented where the configuration says."""
        kept = self.caches.serves_images(self.train_images, training=True)
        batch = self.train_images.batch(rows, pixels=not kept)
        if self.augmentation.changes_anything:
            batch = augment_batch(batch, self.augmentation, rng)
        return self.model_batch(batch, self.train_images if kept else None)

    def model_batch(self, batch: Mapping[str, Any], kept: ImageTensors | None = None) -> Batch:
        """Keep what the model's task reads; captions become tokens.

        Args:
            batch: As ``ImageTensors.batch`` makes it.
            kept: The split that the rows of a batch without pixels are from.
        """
        keys: tuple[str, ...] = ("pixel_values", "labels")
        if self._model.task.reads_captions:
            keys = (*keys, CONCEPT, PICTURE, TEXT)
        tensors = {key: batch[key] for key in keys if key in batch}
        if kept is not None:
            tensors |= self.caches.of_images(kept, batch["index"])
        if self._model.task.reads_captions:
            tensors |= self.caches.of_texts(batch["captions"])
        return tensors

    def read_before_forking(self) -> None:
        """Read the tokens, and the form in which decoded images are kept."""
        self.caches.captions.read_known()
        self.train_images.pixel_values([0])


def clip_reader(
    model: FederatedCLIPModel, data: FederatedData, settings: ReadingSettings
) -> ImageReader | TaskReader:
    """Return the reader of a CLIP; a task that makes batches of its own is given the rows."""
    if model.task.batch is not None:
        return task_reader(model, data, settings)
    return ImageReader(model, data, settings)

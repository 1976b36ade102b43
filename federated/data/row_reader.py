"""From rows to batches: what every model family does, and the plain way: the task makes the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from datasets import Dataset

from federated.config.schema import CacheSection
from federated.data.image_tensors import DEFAULT_CACHE_BYTES
from federated.data.sources.form import FederatedData
from federated.data.splits import IntArray
from models.errors import UserError
from models.federated_model import FederatedModel
from models.training import Batch, Rows


@dataclass(frozen=True)
class ReadingSettings:
    """What a configuration says of reading rows; a family makes use of what it can.

    Attributes:
        batch_size: Rows of a local step.
        cache_bytes: Memory for decoded images.
        caches: What may be computed once.
        augmentation: Options of what is done to training batches.
    """

    batch_size: int
    cache_bytes: int = DEFAULT_CACHE_BYTES
    caches: CacheSection = CacheSection()
    augmentation: Mapping[str, Any] = field(default_factory=dict)


class RowReader(Protocol):
    """Makes batches of the rows of a run's data, for one model."""

    @property
    def notes(self) -> Sequence[str]:
        """What is computed once and what is not, one line each."""

    def batch(self, split: str, rows: IntArray) -> Batch:
        """Return the batch of some rows of "train", "validation" or "test", (B,), for an evaluation."""

    def training_batch(self, rows: IntArray, rng: np.random.Generator) -> Batch:
        """Return the batch of some training rows (B,) for a local step.

        Args:
            rows: Of the train split.
            rng: Of one client in one round; whatever is changed at random is drawn from it.
        """

    def read_before_forking(self) -> None:
        """Compute now what worker processes would each compute for themselves."""


class TaskReader:
    """The plain way: the task is given rows as the source has them, and nothing is kept.

    Args:
        data: The rows.
        columns: Those that the task reads.
        make_batch: Makes tensors of them.
    """

    notes: Sequence[str] = ()

    def __init__(
        self, data: FederatedData, columns: Sequence[str], make_batch: Callable[[Rows], Batch]
    ) -> None:
        self._columns = list(columns)
        self._data = data
        self._make_batch = make_batch
        self._splits: dict[str, Dataset] = {}

    def batch(self, split: str, rows: IntArray) -> Batch:
        """Return the batch of some rows, (B,)."""
        if split not in self._splits:
            self._splits[split] = self._data.split(split).select_columns(self._columns)
        return self._make_batch(self._splits[split][rows.tolist()])

    def training_batch(self, rows: IntArray, rng: np.random.Generator) -> Batch:
        """Return the batch of some training rows, (B,); nothing is changed at random."""
        return self.batch("train", rows)

    def read_before_forking(self) -> None:
        """Do nothing: nothing is kept."""


def task_reader(model: FederatedModel, data: FederatedData, settings: ReadingSettings) -> TaskReader:
    """Return the reader that calls the task of a model.

    Raises:
        UserError: The task makes no batches, or augmentation is asked for.
    """
    task = model.task
    if task.batch is None:
        raise UserError(f"task.name={task.name} makes no batches: give its Task a batch, and what it reads")
    if settings.augmentation:
        raise UserError(
            f"client.augmentation changes images that CLIP reads, and task.name={task.name} makes its own "
            "batches: leave client.augmentation out"
        )
    return TaskReader(data, task.reads, partial(task.batch, model))

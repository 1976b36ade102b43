"""Loading the data of a run: a source by name, then subsets and a validation split, all by the seed.

``load_data`` gives ``FederatedData``; ``federated.data.partition`` splits its train rows over clients;
``row_reader`` and ``image_reader`` make batches of them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from federated.config.choices import Choice, build
from federated.config.seeding import generator
from federated.data.batch_order import index_batches, local_index_batches, steps_per_epoch
from federated.data.image_tensors import DEFAULT_CACHE_BYTES, ImageTensors, Preprocess
from federated.data.sources.form import FederatedData, split_off
from federated.data.sources.source_registry import SOURCES
from federated.data.splits import column_values, stratified_choice
from models.errors import UserError
from models.tasks import TASKS
from models.untrusted import checked_name

__all__ = [
    "SOURCES",
    "FederatedData",
    "ImageTensors",
    "check_task_data",
    "image_tensors",
    "index_batches",
    "load_data",
    "local_index_batches",
    "steps_per_epoch",
]

logger = logging.getLogger(__name__)

SOURCE = Choice("data source", "data.source", "data.options", {"path": "data.path"})


def load_data(
    source: str,
    *,
    path: str | None = None,
    seed: int = 0,
    max_train_samples: int | None = None,
    max_validation_samples: int | None = None,
    max_test_samples: int | None = None,
    validation_fraction: float = 0.0,
    **options: Any,
) -> FederatedData:
    """Load a data source and cut it to size.

    The validation split, where the source has none, is taken out of train, never out of test, before train is
    cut down. Every choice is stratified by label and a function of the seed.

    Args:
        source: a key of ``SOURCES``.
        path: folder, file or hub name, for the sources that need one.
        seed: the run's seed.
        max_train_samples: keep at most so many training rows.
        max_validation_samples: keep at most so many validation rows.
        max_test_samples: keep at most so many test rows.
        validation_fraction: share of train that becomes the validation split where the source has none.
        **options: the source's own, such as ``skip_corrupt`` or ``language``.

    Returns:
        The data.

    Raises:
        UserError: an unknown source or option, or data that cannot be used; the message names the file.
    """
    if path is not None:
        options["path"] = path
    rng = generator(seed, "test split")
    data = build(SOURCES, SOURCE, source, options, rng)
    for name in data.class_names or ():
        checked_name(str(name), f"data source {source!r}: the class")
    for split, rows in (("train", data.train), ("test", data.test)):
        if len(rows) == 0:
            key = "data.options" if path is None else f"data.path={path}"
            raise UserError(f"data source {source!r} has no {split} samples; check {key}")
    train, validation, drawn = data.train, data.validation, data.drawn
    if validation is None and validation_fraction > 0:
        train, validation = split_off(
            train, validation_fraction, rng, label_column=data.label_column, groups=data.groups()
        )
        drawn = (*drawn, "validation")
    data = replace(
        data,
        name=data.name or source,
        train=_at_most(train, max_train_samples, data.label_column, rng),
        validation=validation and _at_most(validation, max_validation_samples, data.label_column, rng),
        test=_at_most(data.test, max_test_samples, data.label_column, rng),
        drawn=drawn,
    )
    logger.info(
        "%s: %d train, %d validation, %d test samples, %d corrupt left out",
        source,
        len(data.train),
        len(data.validation or ()),
        len(data.test),
        data.num_skipped,
    )
    return data


def check_task_data(data: FederatedData, task: str) -> None:
    """Make sure that data have what a task learns from.

    Args:
        data: the data.
        task: a key of ``models.tasks.TASKS``.

    Raises:
        UserError: they lack a column that the task reads, images, captions or labels; says what would help.
    """
    there = ", ".join(name for name in data.train.column_names if name != "picture")
    reads = TASKS[task].reads
    if missing := [column for column in reads if column not in data.train.column_names]:
        raise UserError(
            f"task.name={task} reads the column {missing[0]!r}, and data source {data.name!r} has none (it "
            f"gives {there}); choose another data.source, or another task.name"
        )
    if reads:
        return
    if data.image_column is None:
        raise UserError(
            f"task.name={task} needs images, and data source {data.name!r} has none (it gives {there}); "
            "choose another data.source, or another task.name"
        )
    needed, column = (
        ("captions", "caption_column") if TASKS[task].reads_captions else ("labels", "label_column")
    )
    if getattr(data, column) is not None:
        return
    remedy = (
        "choose another data.source, or task.name=classification"
        if data.name in ("imagefolder", "digits", "fashion_mnist")
        else f"name their column with data.options.{column}"
    )
    raise UserError(
        f"task.name={task} needs {needed}, and data source {data.name!r} has none (it gives {there}); "
        f"{remedy}"
    )


def image_tensors(
    data: FederatedData, split: str, preprocess: Preprocess, *, cache_bytes: int = DEFAULT_CACHE_BYTES
) -> ImageTensors:
    """Make the tensors of one split.

    Args:
        data: the data.
        split: "train", "validation" or "test".
        preprocess: PIL image -> (3, H, W) float tensor; the model's own, deterministic.
        cache_bytes: memory for decoded images; beyond it images are decoded whenever they are read.

    Raises:
        UserError: there is no such split, or there are no images.
    """
    if data.image_column is None:
        raise UserError(f"data source {data.name!r} has no images")
    return ImageTensors(
        data.split(split),
        preprocess,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
        concept_column=data.concept_column,
        picture_column=data.picture_column,
        cache_bytes=cache_bytes,
    )


def _at_most(
    dataset: Dataset, max_samples: int | None, label_column: str | None, rng: np.random.Generator
) -> Dataset:
    """A stratified subset, in the order of the rows; all rows where the limit is not reached."""
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    if max_samples < 1:
        raise UserError(f"cannot keep {max_samples} samples of a split; set the limit to at least 1")
    labels = np.zeros(len(dataset)) if label_column is None else column_values(dataset, label_column)
    return dataset.select(stratified_choice(labels, max_samples, rng))

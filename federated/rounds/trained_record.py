"""What a trained model's own folder says of it: its classes, its seed, and which rows it was trained on.

Written into the manifest beside the weights after training. Whoever uses the model again holds data and
configuration against it: class numbers are matched by name, and rows that were drawn are drawn the same way,
so that nothing is scored on rows that were trained on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from federated.config.schema import DataSection, ExperimentConfig
from federated.data.dataset import FederatedData
from federated.data.names import visible
from federated.data.splits import column_values
from lora.adapter_files import read_notes
from lora.start_adapter import adapter_folder
from models.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 10  # class names in a message
_LIMITS = ("max_train_samples", "max_validation_samples", "max_test_samples")


@dataclass(frozen=True)
class TrainedRecord:
    """What is known of a training.

    Attributes:
        source: The folder that says so, for messages.
        class_names: Of the classifier's outputs, in order; None where nobody says.
        seed: The run's seed; None where nobody says.
        data: The run's data section; empty where nobody says.
        drawn_rows: Split -> fingerprint of its rows, for splits that were drawn by the seed.
    """

    source: Path
    class_names: tuple[str, ...] | None = None
    seed: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    drawn_rows: Mapping[str, Any] = field(default_factory=dict)


def notes_of(config: ExperimentConfig, data: FederatedData) -> dict[str, Any]:
    """Return what a manifest keeps of a training, JSON values."""
    kept = ("source", "path", "options", "validation_fraction", *_LIMITS)
    section = config.data.model_dump(mode="json")
    return {
        "class_names": None if data.class_names is None else list(data.class_names),
        "seed": config.seed,
        "data": {key: section[key] for key in kept},
        "drawn_rows": {split: _fingerprint(data, split) for split in data.drawn},
    }


def record_from(
    notes: Mapping[str, Any], source: Path, class_names: Sequence[str] | None = None
) -> TrainedRecord:
    """Return the record in a manifest's notes; a part that has another form counts as not said.

    Args:
        notes: Of the manifest.
        source: The folder, for messages.
        class_names: What a file of the weights says of the classes; it goes first.
    """
    names, seed = notes.get("class_names") if class_names is None else class_names, notes.get("seed")
    section, rows = (notes.get(key) for key in ("data", "drawn_rows"))
    said = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return TrainedRecord(
        source=source,
        class_names=tuple(names) if said and names else None,
        seed=seed if isinstance(seed, int) else None,
        data=section if isinstance(section, dict) else {},
        drawn_rows=rows if isinstance(rows, dict) else {},
    )


def check_rows(record: TrainedRecord, config: ExperimentConfig, data: FederatedData, split: str) -> None:
    """Make sure that rows to score are not rows that were trained on.

    Splits that the data itself brings are anyone's; a split that was drawn must be drawn as for the training.

    Raises:
        UserError: The seed, the options of the source or the rows would draw others.
    """
    if split not in data.drawn or record.seed is None:
        return
    remedy = f"with data that brings its own {split} split any seed will do"
    if config.seed != record.seed:
        raise UserError(
            f"{record.source} was trained with seed {record.seed}, which also drew the {split} rows: seed "
            f"{config.seed} draws others, some of them trained on. Set seed={record.seed}; {remedy}"
        )
    if not _same_place(config.data, record.data):
        return
    fields = ["options"] + (["validation_fraction"] if split == "validation" else [])
    for key in fields:
        before, now = record.data.get(key), getattr(config.data, key)
        if before != now:
            raise UserError(
                f"{record.source} was trained with data.{key}={before}: data.{key}={now} draws other {split} "
                f"rows, some of them trained on. Set data.{key} as it was; {remedy}"
            )
    if any(record.data.get(limit) != getattr(config.data, limit) for limit in _LIMITS):
        return  # parts of the same rows, of other sizes
    if split in record.drawn_rows and record.drawn_rows[split] != _fingerprint(data, split):
        raise UserError(
            f"the rows of data.path={config.data.path} have changed since {record.source} was trained: the "
            f"{split} rows drawn from them are others, some of them trained on. Put the rows back; {remedy}"
        )


def check_start(config: ExperimentConfig, data: FederatedData) -> None:
    """Make sure that the adapter which a run starts from was not trained on rows that the run scores.

    Raises:
        UserError: It was trained on the same data, whose splits are drawn, and they are drawn otherwise here.
    """
    assert config.model.adapter is not None
    folder = adapter_folder(config.model.adapter)
    names, notes = read_notes(folder)
    record = record_from(notes, folder, names)
    if _same_place(config.data, record.data):
        for split in data.drawn:
            check_rows(record, config, data, split)


def matched_classes(data: FederatedData, record: TrainedRecord, *, needed: bool) -> FederatedData:
    """Return the data with the trained model's classes: every row's class number is that of its name.

    Names are the same that differ in blanks, invisible characters or the form of their letters alone.

    Args:
        data: As loaded, with an order of classes of its own.
        record: Of the training.
        needed: Whether the model knows no other classes, as a trained head. Otherwise data with others is
            returned as it is, and said to be so.

    Raises:
        UserError: The data has classes that the model does not know.
    """
    known, found, label = record.class_names, data.class_names, data.label_column
    if known is None or found is None or label is None or known == found:
        return data
    numbers_of = {visible(name): number for number, name in enumerate(known)}
    numbers_of |= {name: number for number, name in enumerate(known)}
    places = [numbers_of.get(name, numbers_of.get(visible(name))) for name in found]
    unknown = [name for name, place in zip(found, places, strict=True) if place is None]
    if unknown and needed:
        raise UserError(
            f"the data has {_plural(len(unknown), 'class', 'classes')} that {record.source} was not trained "
            f"on: {_listed(unknown)}; it knows {_listed(known)}. Take those images out, or rename their "
            "class"
        )
    if unknown:
        log.warning("the classes are the data's, others than %s was trained on", record.source)
        return data
    numbers = np.array(places)

    def renumbered(rows: Dataset) -> Dataset:
        return _renumbered(rows, label, numbers, known)

    return replace(
        data,
        train=renumbered(data.train),
        validation=data.validation and renumbered(data.validation),
        test=renumbered(data.test),
        class_names=known,
    )


def _renumbered(rows: Dataset, label: str, numbers: np.ndarray, class_names: tuple[str, ...]) -> Dataset:
    labels = numbers[column_values(rows, label).astype(np.int64)]
    feature = ClassLabel(names=list(class_names))
    return rows.remove_columns(label).add_column(label, labels.tolist(), feature=feature)


def _same_place(section: DataSection, before: Mapping[str, Any]) -> bool:
    """Whether two data sections read the same files."""

    def place(source: Any, path: Any) -> tuple[Any, Any]:
        return source, os.path.realpath(path) if isinstance(path, str) else path

    return place(section.source, section.path) == place(before.get("source"), before.get("path"))


def _fingerprint(data: FederatedData, split: str) -> str:
    """Hash of the splits' sizes and of a split's labels, which change where other rows are drawn from."""
    digest = hashlib.sha256(f"{len(data.train)} {len(data.validation or ())} {len(data.test)}".encode())
    if data.label_column is not None:
        digest.update(data.labels(split).astype("<i8").tobytes())
    return digest.hexdigest()


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])


def _plural(number: int, one: str, several: str) -> str:
    return f"a {one}" if number == 1 else f"{number} {several}"

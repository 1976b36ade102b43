"""The ``hub`` source: data sets of the Hugging Face hub, by name or as a local folder in its format.

Stands before round 0, called by ``federated.data.loading.load_data`` through
``federated.data.sources.SOURCES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from federated.data.form import SPLIT_NAMES, FederatedData, completed, ordered_class_names, our_split
from federated.data.splits import column_values
from models.errors import UserError


def hub(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    path: str,
    configuration: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    domain_column: str | None = None,
    concept_column: str | None = None,
    splits: Mapping[str, str] | None = None,
    test_fraction: float = 0.2,
) -> FederatedData:
    """A data set of the Hugging Face hub by name, or a local folder in the hub's format (parquet files).

    Args:
        rng: draws the test rows where there is no test split.
        path: hub name such as "uoft-cs/cifar10", or a local folder.
        configuration: which of the data set's configurations.
        revision: branch, tag or commit of a hub data set; name one to make a run repeatable.
        image_column: the image column; by default the only one of type Image.
        label_column: the class column, of class labels, integers or strings; by default the only one of type
            ClassLabel.
        caption_column: the text column.
        domain_column: the domain column.
        concept_column: rows of equal value show the same thing.
        splits: our split -> the data set's, where they are not found by name, such as ``{test: validation}``.
        test_fraction: share of the rows for testing where there is no test split.

    Raises:
        UserError: the data set cannot be had (no network, no such name), or lacks a split or column.
    """
    found = _hub_splits(_load_hub(path, configuration, revision), splits or {}, path)
    train = found["train"]
    image = image_column or _only_column(train, Image, "image", path)
    if image is None:
        raise UserError(
            f"{path} has no image column; set image_column to one of {', '.join(train.column_names)}"
        )
    label = label_column or _only_column(train, ClassLabel, "label", path)
    for column in (image, label, caption_column, domain_column, concept_column):
        if column is not None and column not in train.column_names:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(train.column_names)}")
    class_names = None
    if label is not None:
        class_names = _hub_class_names(train, label)
        found = {split: _with_label_numbers(rows, label, class_names, path) for split, rows in found.items()}
    return completed(
        found,
        rng,
        test_fraction,
        class_names=class_names,
        label_column=label,
        image_column=image,
        caption_column=caption_column,
        domain_column=domain_column,
        name="hub",
        concept_column=concept_column,
    )


def _load_hub(path: str, configuration: str | None, revision: str | None) -> DatasetDict:
    try:
        loaded = load_dataset(path, configuration, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"cannot get the data set {path!r} ({error}); check the name and the network, fetch it once "
            "with a network so that the cache has it, or give a local folder of parquet files as path"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise UserError(f"cannot read the data set {path!r}: {error}") from error
    return loaded


def _hub_splits(loaded: DatasetDict, chosen: Mapping[str, str], path: str) -> dict[str, Dataset]:
    """Our split -> rows, by the chosen names or by the usual ones."""
    unknown = [split for split in chosen if split not in SPLIT_NAMES]
    missing = [name for name in chosen.values() if name not in loaded]
    if unknown or missing:
        raise UserError(
            f"splits {dict(chosen)} do not fit {path}: it has {', '.join(loaded)}, and ours are "
            f"{', '.join(SPLIT_NAMES)}"
        )
    found = {split: loaded[name] for split, name in chosen.items()}
    for name, rows in loaded.items():
        split = our_split(str(name))
        if split is not None and split not in found and name not in chosen.values():
            found[split] = rows
    if "train" not in found:
        raise UserError(
            f"{path} has no train split; it has {', '.join(loaded)}: say which with splits={{train: ...}}"
        )
    return found


def _only_column(rows: Dataset, kind: type, role: str, path: str) -> str | None:
    """The one column of a feature type, None without one; several are for the user to choose from."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        raise UserError(f"{path} has several {role} columns ({', '.join(columns)}); set {role}_column")
    return columns[0] if columns else None


def _hub_class_names(train: Dataset, label_column: str) -> tuple[str, ...]:
    feature = train.features[label_column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    return ordered_class_names([str(value) for value in column_values(train, label_column)])


def _with_label_numbers(rows: Dataset, label_column: str, class_names: tuple[str, ...], path: str) -> Dataset:
    """Bring labels into the form of class numbers and check that every row has one."""
    values: npt.NDArray[Any] = column_values(rows, label_column)
    if not isinstance(rows.features[label_column], ClassLabel):
        numbers = {name: number for number, name in enumerate(class_names)}
        unknown = sorted({str(value) for value in values} - set(class_names))
        if unknown:
            raise UserError(f"{path}: class {unknown[0]!r} in {label_column!r} occurs in no training row")
        codes = [numbers[str(value)] for value in values]
        feature = ClassLabel(names=list(class_names))
        return rows.remove_columns(label_column).add_column(label_column, codes, feature=feature)
    if len(values) and not (values.min() >= 0 and values.max() < len(class_names)):
        raise UserError(
            f"{path}: {label_column!r} has values outside its {len(class_names)} classes in one split "
            "(hidden test labels?); choose another split with splits={test: ...}"
        )
    return rows

"""The one form that every data source is brought into: ``FederatedData`` over Hugging Face ``datasets``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset, Features, Image, Value

from federated.data.sources.folder_scan import image_error
from federated.data.splits import column_values, split_rows
from models.errors import CONTROL, UserError, printable
from models.progress import counted
from models.untrusted import checked_name

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Split of ours -> the names it goes by in tables and on the hub."""


@dataclass(frozen=True)
class FederatedData:
    """Train, validation and test rows as the source gives them, and what some columns mean.

    Columns beside those named here are carried along: a task names what it reads (``Task.reads``).

    Attributes:
        train: the rows that are partitioned over clients.
        validation: rows to choose settings on; disjoint from train and test; may be missing.
        test: the server's rows for reported results.
        class_names: names in order of the label numbers; None without labels.
        label_column: the class number, 0 to len(class_names) - 1.
        image_column: the image (``datasets.Image``) that CLIP reads.
        caption_column: the text that goes with the image.
        domain_column: where a row comes from (vendor, hospital ...), for natural partitions.
        name: the source; ``load_data`` fills it in.
        concept_column: rows of equal value show the same thing: positives of each other in retrieval, and
            kept together when rows are split.
        picture_column: likewise rows of the same picture, one for each of its captions; a picture is in the
            gallery of retrieval once.
        num_skipped: rows left out, for a corrupt image or an empty field.
        drawn: splits that the source does not bring, drawn from train by the seed.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    class_names: tuple[str, ...] | None = None
    label_column: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    domain_column: str | None = None
    name: str = ""
    concept_column: str | None = None
    picture_column: str | None = None
    num_skipped: int = 0
    drawn: tuple[str, ...] = ()

    def split(self, name: str) -> Dataset:
        """Return the split called "train", "validation" or "test".

        Raises:
            UserError: there is no such split.
        """
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        dataset = splits.get(name)
        if dataset is None:
            raise UserError(
                f"data source {self.name!r} has no {name} split; set data.validation_fraction to make one"
            )
        return dataset

    def labels(self, split: str = "train") -> npt.NDArray[np.int64]:
        """Return the class numbers of a split, (N,), int64.

        Raises:
            UserError: the data has no labels or no such split.
        """
        if self.label_column is None:
            raise UserError(f"data source {self.name!r} has no labels; set data.options.label_column")
        return column_values(self.split(split), self.label_column).astype(np.int64)

    def groups(self, split: str = "train") -> npt.NDArray[Any] | None:
        """Return the group of each row of a split, (N,): rows of one must not be divided; None: all may."""
        return row_groups(self.split(split), self.concept_column, self.picture_column)


def image_dataset(
    paths: Sequence[Path],
    labels: Sequence[int] | None,
    class_names: Sequence[str] | None,
    **texts: Sequence[str],
) -> Dataset:
    """Make a data set of image files, decoded when read, with columns image, label and the given texts.

    Args:
        paths: image files, (N,).
        labels: class numbers, (N,), or None.
        class_names: names of the classes; given with ``labels``.
        **texts: further columns of strings, each (N,).

    Raises:
        UserError: the name of a file or a class cannot be stored or shown.
    """
    names = [str(path) for path in paths]
    if unnameable := next((name for name in names if CONTROL.search(name)), None):
        raise UserError(
            f"{printable(unnameable)}: its name is not UTF-8, or holds a control character; rename it"
        )
    for class_name in class_names or ():
        checked_name(class_name, "the class")
    columns: dict[str, Sequence[object]] = {"image": [{"path": name, "bytes": None} for name in names]}
    features = {"image": Image()}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = ClassLabel(names=list(class_names or ()))
    for column, values in texts.items():
        columns[column] = list(values)
        features[column] = Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def readable_images(paths: Sequence[Path], *, skip_corrupt: bool) -> npt.NDArray[np.bool_]:
    """Decode every image once and say which can be read, (N,).

    Args:
        paths: image files, (N,).
        skip_corrupt: log the unreadable ones and go on; otherwise the first is an error.

    Raises:
        UserError: a corrupt image, named, unless ``skip_corrupt``.
    """
    readable = np.ones(len(paths), dtype=np.bool_)
    for row, path in enumerate(counted("images", paths, len(paths))):
        error = image_error(path)
        if error is None:
            continue
        if not skip_corrupt:
            raise UserError(
                f"{path} cannot be decoded ({error}); replace or remove it, or set skip_corrupt=true to "
                "leave corrupt images out",
                options=("skip_corrupt",),
            )
        logger.warning("left out %s: it cannot be decoded (%s)", path, error)
        readable[row] = False
    return readable


def split_off(
    dataset: Dataset,
    fraction: float,
    rng: np.random.Generator,
    *,
    label_column: str | None,
    groups: npt.NDArray[Any] | None = None,
) -> tuple[Dataset, Dataset]:
    """Split a share of the rows off, stratified by label, rows of one group staying together.

    Returns:
        (rest, split-off), disjoint and complete, in the order of the rows.

    Raises:
        UserError: the fraction leaves one side empty.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(
            f"the share to split off is {fraction}; it must be between 0 and 1", options=("test_fraction",)
        )
    labels = np.zeros(len(dataset)) if label_column is None else column_values(dataset, label_column)
    rest, held_out = split_rows(labels, round(fraction * len(dataset)), rng, groups=groups)
    if len(rest) == 0 or len(held_out) == 0:
        raise UserError(
            f"{len(dataset)} samples cannot give up a share of {fraction}; use more data",
            options=("test_fraction",),
        )
    return dataset.select(rest), dataset.select(held_out)


def row_groups(
    dataset: Dataset, concept_column: str | None, picture_column: str | None
) -> npt.NDArray[Any] | None:
    """Return the group of each row, (N,): rows of one concept or picture are in one; None: all apart."""
    columns = [column_values(dataset, column) for column in (concept_column, picture_column) if column]
    if not columns:
        return None
    groups = columns[0]
    for other in columns[1:]:  # until nothing changes: a picture links two concepts, and they a third
        changed = True
        while changed:
            joined = _least_of_group(_least_of_group(groups, other), groups)
            changed = bool((joined != groups).any())
            groups = joined
    return groups


def _least_of_group(values: npt.NDArray[Any], groups: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Replace each row's value by the least of its group, (N,)."""
    order = np.argsort(values, kind="stable")
    _, first, codes = np.unique(groups[order], return_index=True, return_inverse=True)
    least: npt.NDArray[Any] = np.empty_like(values)
    least[order] = values[order][first[codes]]
    return least


def our_split(name: str) -> str | None:
    """Return "train", "validation" or "test" for any of the names that split goes by."""
    return next((split for split, names in SPLIT_NAMES.items() if name.strip().lower() in names), None)


def ordered_class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct class names in order: by number if all are numbers."""
    names = sorted(set(labels))
    if all(name.strip().isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def completed(
    splits: dict[str, Dataset], rng: np.random.Generator, test_fraction: float, **meaning: Any
) -> FederatedData:
    """Give splits their form; without a test split, ``test_fraction`` of train becomes it.

    Args:
        splits: "train" and, as far as there are, "validation" and "test".
        rng: draws the test rows.
        test_fraction: their share, stratified.
        **meaning: the other fields of ``FederatedData``.
    """
    train, test = splits["train"], splits.get("test")
    drawn = ("test",) if test is None else ()
    if test is None:
        logger.warning("no test split: %.0f %% of the training samples are set apart", 100 * test_fraction)
        groups = row_groups(train, meaning["concept_column"], meaning["picture_column"])
        train, test = split_off(
            train, test_fraction, rng, label_column=meaning["label_column"], groups=groups
        )
    return FederatedData(train=train, validation=splits.get("validation"), test=test, drawn=drawn, **meaning)

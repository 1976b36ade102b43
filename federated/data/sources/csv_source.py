"""The ``csv`` source: images listed in csv files, with a caption, a class or both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from datasets import Dataset
from pydantic import StringConstraints

from federated.data.names import check_names, listed, plain, unusable
from federated.data.pictures import PICTURE, picture_names
from federated.data.sources.csv_table import Row, file_of, read_tables
from federated.data.sources.folder_scan import leaves
from federated.data.sources.form import (
    FederatedData,
    completed,
    image_dataset,
    logger,
    ordered_class_names,
    readable_images,
)
from models.errors import UserError


@dataclass(frozen=True)
class Columns:
    """What is read of a csv file: the names of its columns; None: not read."""

    image: str
    label: str | None
    caption: str | None
    domain: str | None
    concept: str | None

    @property
    def named(self) -> dict[str, str]:
        """Role -> the file's column, of those that are read."""
        return {role: column for role, column in self.__dict__.items() if column is not None}


def csv(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    path: str,
    image_root: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = "caption",
    domain_column: str | None = None,
    concept_column: str | None = None,
    split_column: str | None = "split",
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] = ",",
    test_fraction: float = 0.2,
    skip_corrupt: bool = False,
    skip_incomplete: bool = False,
    check_images: bool = True,
    allow_outside: bool = False,
) -> FederatedData:
    """Images listed in csv files with a header, with a caption, a class or both.

    ``path`` is one file, or a folder with ``train.csv``, ``test.csv`` and, if wanted, ``val.csv``. One file
    is split by its split column, or by ``test_fraction`` without one. Several rows may name one image
    (several captions): they stay in one split and count as positives of each other.

    Args:
        rng: draws the test rows where there is no test split.
        path: the file or folder.
        image_root: what image paths are relative to; by default the folder of the csv file.
        image_column: column of image paths.
        label_column: column of class names; used when it is there.
        caption_column: column of texts; used when it is there.
        domain_column: column of domains.
        concept_column: rows of equal value show the same thing, positives of each other in retrieval.
        split_column: column of split names; used when it is there.
        delimiter: what separates fields.
        test_fraction: share of the images for testing where there is no test split.
        skip_corrupt: leave images out that cannot be decoded, logged and counted, instead of stopping.
        skip_incomplete: likewise rows without image, label, caption, domain or concept.
        check_images: decode every image once at loading.
        allow_outside: take images that lie outside the folder, by ``..``, an absolute path or a link.

    Raises:
        UserError: a missing file, column, label or image, a corrupt image, an unknown split; named with
            file and line.
    """
    tables = read_tables(Path(path), split_column, delimiter)
    wanted = Columns(image_column, label_column, caption_column, domain_column, concept_column)
    columns = _columns_there(tables, wanted, split_column)
    num_listed = sum(len(table) for table in tables.values())
    tables = {split: _complete(table, columns, skip=skip_incomplete) for split, table in tables.items()}
    root = None if image_root is None else Path(image_root)
    files = {
        split: image_files(table, image_column, root, allow_outside=allow_outside)
        for split, table in tables.items()
    }
    if check_images:
        for split, table in tables.items():
            readable = readable_images(files[split], skip_corrupt=skip_corrupt)
            tables[split] = [row for row, good in zip(table, readable, strict=True) if good]
            files[split] = [file for file, good in zip(files[split], readable, strict=True) if good]
    class_names = None
    if columns.label is not None:
        class_names = ordered_class_names([row[columns.label] for row in tables["train"]])
        check_names(class_names, path)
    there = {role: role for role in columns.named if role != "image"}
    return completed(
        {split: _image_rows(table, files[split], columns, class_names) for split, table in tables.items()},
        rng,
        test_fraction,
        class_names=class_names,
        label_column=there.get("label"),
        image_column="image",
        caption_column=there.get("caption"),
        domain_column=there.get("domain"),
        name="csv",
        concept_column=there.get("concept"),
        picture_column=PICTURE,
        num_skipped=num_listed - sum(len(table) for table in tables.values()),
    )


def _image_rows(
    table: Sequence[Row], files: Sequence[Path], columns: Columns, class_names: Sequence[str] | None
) -> Dataset:
    """One split, with columns of our own names."""
    texts = {
        role: [row[column] for row in table]
        for role, column in columns.named.items()
        if role not in ("image", "label")
    }
    labels = None
    if columns.label is not None and class_names is not None:
        labels = _label_numbers(table, columns.label, class_names)
    return image_dataset(files, labels, class_names, picture=picture_names(files), **texts)


def _columns_there(tables: Mapping[str, Sequence[Row]], wanted: Columns, split_column: str | None) -> Columns:
    """The columns that are read; the files of all splits must agree in them."""
    first = tables["train"][0]
    there = listed((column for column in first if column), limit=20)
    for column in (wanted.image, wanted.domain, wanted.concept):
        if column is not None and column not in first:
            raise UserError(f"{file_of(first)} has no column {column!r}; it has {there}")
    named = wanted.named if split_column is None else {**wanted.named, "split": split_column}
    for role, column in named.items():
        alike = [name for name in first if name != column and name.casefold() == column.casefold()]
        if column not in first and alike:
            raise UserError(
                f"{file_of(first)} has a column {alike[0]!r}, which is not {column!r}; rename it, or set "
                f"{role}_column={alike[0]}{'' if role == 'image' else ', or null to do without it'}",
                options=(f"{role}_column",),
            )
    label, caption = (c if c in first else None for c in (wanted.label, wanted.caption))
    if label is None and caption is None:
        raise UserError(
            f"{file_of(first)} has neither {wanted.label!r} nor {wanted.caption!r}; it has {there}: set "
            "label_column or caption_column",
            options=("label_column", "caption_column"),
        )
    columns = Columns(wanted.image, label, caption, wanted.domain, wanted.concept)
    for row in (table[0] for table in tables.values()):
        for column in columns.named.values():
            if column not in row:
                raise UserError(
                    f"{file_of(row)} has no column {column!r}, which {file_of(first)} has; add it, or "
                    "remove it from the others"
                )
    return columns


def _complete(table: Sequence[Row], columns: Columns, *, skip: bool) -> list[Row]:
    """The rows without an empty field, their names without blanks around them."""
    rows, gaps = [], []
    for row in table:
        empty = [column for column in columns.named.values() if not row[column].strip()]
        if empty:
            gaps.append(f"{row['']} has no {empty[0]}")
            continue
        names = [c for c in (columns.label, columns.domain, columns.concept) if c is not None]
        rows.append({**row, **{column: plain(row[column]) for column in names}})
    if gaps and not skip:
        raise UserError(
            f"{len(gaps)} rows are not complete: {listed(gaps)}; fill them in, set skip_incomplete=true to "
            "leave such rows out, or label_column=null or caption_column=null to do without that column",
            options=("label_column", "caption_column", "skip_incomplete"),
        )
    if gaps:
        logger.warning("left out %d rows that are not complete: %s", len(gaps), listed(gaps))
    if not rows:
        raise UserError(
            f"{file_of(table[0])} has no row that is complete; fill in {listed(columns.named.values())}"
        )
    return rows


def image_files(
    table: Sequence[Row],
    image_column: str,
    root: Path | None,
    *,
    allow_outside: bool,
    root_option: str = "image_root",
) -> list[Path]:
    """Return the paths of the rows' images; all exist and, unless allowed, none leaves its folder.

    Args:
        table: The rows.
        image_column: Column of image paths.
        root: What they are relative to; None: the folder of the csv file.
        allow_outside: Whether a path may leave that folder.
        root_option: What the option is called that sets ``root``, for messages.

    Raises:
        UserError: An image does not exist, or lies outside; names row and file.
    """
    files, missing, outside = [], [], []
    for row in table:
        folder = root or file_of(row).parent
        if (reason := unusable(row[image_column])) is not None:
            raise UserError(f"{row['']}: image path {row[image_column]!r} {reason}; rename the file")
        file = folder / row[image_column]
        if not os.path.isfile(file):
            missing.append(f"{row['']}: {file}")
        elif not allow_outside and leaves(file, folder):
            outside.append(f"{row['']}: {file}")
        files.append(file)
    if missing:
        raise UserError(
            f"{len(missing)} images do not exist ({listed(missing)}); correct the paths, or set "
            f"{root_option} to the folder they are relative to",
            options=(root_option,),
        )
    if outside:
        raise UserError(
            f"{len(outside)} images lie outside the folder ({listed(outside)}); move them into it, set "
            f"{root_option} to a folder that holds them all, or allow_outside=true to read them nevertheless",
            options=(root_option, "allow_outside"),
        )
    return files


def _label_numbers(table: Sequence[Row], label_column: str, class_names: Sequence[str]) -> list[int]:
    numbers = {name: number for number, name in enumerate(class_names)}
    for row in table:
        if row[label_column] not in numbers:
            raise UserError(
                f"{row['']}: class {row[label_column]!r} occurs in no training row; add some, or remove it"
            )
    return [numbers[row[label_column]] for row in table]

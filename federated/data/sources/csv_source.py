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
from federated.data.sources.folder_scan import IMAGE_SUFFIXES, leaves
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
    separator: Annotated[str, StringConstraints(min_length=1, max_length=1)] | None = None,
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
        separator: what separates fields; by default comma, semicolon, tab or bar, as the header says.
        test_fraction: share of the images for testing where there is no test split.
        skip_corrupt: leave images out that are missing or cannot be decoded, logged and counted, instead of
            stopping.
        skip_incomplete: likewise rows without image, label, caption, domain or concept.
        check_images: decode every image once at loading.
        allow_outside: take images that lie outside the folder, by ``..``, an absolute path or a link.

    Raises:
        UserError: a missing file, column, label or image, a corrupt image, an unknown split; named with
            file and line.
    """
    tables = read_tables(Path(path), split_column, separator)
    wanted = Columns(image_column, label_column, caption_column, domain_column, concept_column)
    columns = _columns_there(tables, wanted, split_column)
    num_listed = sum(len(table) for table in tables.values())
    tables = {split: _complete(table, columns, skip=skip_incomplete) for split, table in tables.items()}
    root = None if image_root is None else Path(image_root)
    files = {}
    for split, table in tables.items():
        tables[split] = rows_with_images(table, image_column, root, skip_corrupt=skip_corrupt)
        files[split] = image_files(tables[split], image_column, root, allow_outside=allow_outside)
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
    named = wanted.named if split_column is None else {**wanted.named, "split": split_column}
    _refuse_other_spellings(first, named)
    for role in ("image", "domain", "concept"):
        if role in named and named[role] not in first:
            raise UserError(
                f"{file_of(first)} has no column {named[role]!r}; it has {there}: "
                f"set data.options.{role}_column={_likely_column(first, role)}",
                options=(f"{role}_column",),
            )
    label, caption = (c if c in first else None for c in (wanted.label, wanted.caption))
    if label is None and caption is None:
        raise UserError(
            f"{file_of(first)} has neither {wanted.label!r} nor {wanted.caption!r}; it has {there}: set "
            "data.options.label_column to the column of class names, or data.options.caption_column to the "
            "column of texts",
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


def _refuse_other_spellings(first: Row, named: Mapping[str, str]) -> None:
    """Name every column that is there in other letters ("Image"), with the options that read it."""
    found = {}
    for role, column in named.items():
        alike = [name for name in first if name.casefold() == column.casefold()]
        if column not in first and alike:
            found[role] = alike[0]
    if not found:
        return
    wanted = " and ".join(repr(named[role]) for role in found)
    options = " ".join(f"data.options.{role}_column={column}" for role, column in found.items())
    without = "" if list(found) == ["image"] else "; null does without a column"
    raise UserError(
        f"{file_of(first)} has {' and '.join(map(repr, found.values()))}, not {wanted}: set "
        f"{options}, or rename the header's columns{without}",
        options=tuple(f"{role}_column" for role in found),
    )


def _likely_column(first: Row, role: str) -> str:
    """The column whose first field names an image file, for the image's; otherwise a place to fill in."""
    images = [c for c, field in first.items() if c and Path(field).suffix.lower() in IMAGE_SUFFIXES]
    return images[0] if role == "image" and images else "COLUMN"


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


def rows_with_images(
    table: Sequence[Row],
    image_column: str,
    root: Path | None,
    *,
    skip_corrupt: bool,
    root_option: str = "image_root",
) -> list[Row]:
    """Return the rows whose image file exists; a missing one is an error, or left out and logged.

    Args:
        table: The rows.
        image_column: Column of image paths.
        root: What they are relative to; None: the folder of the csv file.
        skip_corrupt: Leave rows without an image out.
        root_option: What the option is called that sets ``root``, for messages.

    Raises:
        UserError: An image does not exist; names row and file.
    """
    there, missing = [], []
    for row in table:
        if (reason := unusable(row[image_column])) is not None:
            raise UserError(f"{row['']}: image path {row[image_column]!r} {reason}; rename the file")
        file = (root or file_of(row).parent) / row[image_column]
        if os.path.isfile(file):
            there.append(row)
        else:
            missing.append(f"{row['']}: {file}")
    if missing and (not skip_corrupt or not there):
        skip = ", or skip_corrupt=true to leave these rows out" if there else ""
        raise UserError(
            f"{len(missing)} images do not exist ({listed(missing)}); correct the paths, or set "
            f"{root_option} to the folder they are relative to{skip}",
            options=(root_option, "skip_corrupt") if there else (root_option,),
        )
    if missing:
        logger.warning("left out %d rows whose image does not exist: %s", len(missing), listed(missing))
    return there


def image_files(
    table: Sequence[Row],
    image_column: str,
    root: Path | None,
    *,
    allow_outside: bool,
    root_option: str = "image_root",
) -> list[Path]:
    """Return the paths of the rows' images; unless allowed, none leaves the folder it starts from.

    The arguments are those of ``rows_with_images``.

    Raises:
        UserError: An image lies outside; names row and file.
    """
    files, outside = [], []
    for row in table:
        folder = root or file_of(row).parent
        file = folder / row[image_column]
        if not allow_outside and leaves(file, folder):
            outside.append(f"{row['']}: {file}")
        files.append(file)
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

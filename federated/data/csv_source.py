"""The ``csv`` source: images listed in csv files, with a caption, a class or both.

Stands before round 0, called by ``federated.data.loading.load_data`` through
``federated.data.sources.SOURCES``.
"""

from __future__ import annotations

import csv as csv_files
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from federated.data.form import (
    FederatedData,
    completed,
    image_dataset,
    ordered_class_names,
    our_split,
    readable_images,
)
from models.errors import UserError

MAX_NAMED = 5
"""Missing files listed in one message."""

Row = dict[str, str]


def csv(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    path: str,
    image_root: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    caption_column: str = "caption",
    domain_column: str | None = None,
    split_column: str = "split",
    test_fraction: float = 0.2,
    skip_corrupt: bool = False,
    check_images: bool = True,
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
        split_column: column of split names; used when it is there.
        test_fraction: share of the images for testing where there is no test split.
        skip_corrupt: leave images out that cannot be decoded, logged and counted, instead of stopping.
        check_images: decode every image once at loading.

    Raises:
        UserError: a missing file, column, label or image, a corrupt image, an unknown split; named with
            file and line.
    """
    root = None if image_root is None else Path(image_root)
    tables = _read_tables(Path(path), split_column)
    for table in tables.values():
        _check_columns(table[0], (image_column, domain_column), (label_column, caption_column))
    has_labels, has_captions = (column in tables["train"][0] for column in (label_column, caption_column))
    num_listed = sum(len(table) for table in tables.values())
    if check_images:
        tables = {
            split: _decodable(table, _image_files(table, image_column, root), skip_corrupt=skip_corrupt)
            for split, table in tables.items()
        }
    class_names = ordered_class_names([row[label_column] for row in tables["train"]]) if has_labels else None
    texts = {"caption": caption_column} if has_captions else {}
    texts |= {"domain": domain_column} if domain_column else {}
    return completed(
        {
            split: _image_rows(
                table, _image_files(table, image_column, root), label_column, class_names, texts
            )
            for split, table in tables.items()
        },
        rng,
        test_fraction,
        class_names=class_names,
        label_column="label" if has_labels else None,
        image_column="image",
        caption_column="caption" if has_captions else None,
        domain_column="domain" if domain_column else None,
        name="csv",
        concept_column="concept",
        num_skipped=num_listed - sum(len(table) for table in tables.values()),
    )


def _decodable(table: Sequence[Row], files: Sequence[Path], *, skip_corrupt: bool) -> list[Row]:
    """The rows whose images can be decoded."""
    readable = readable_images(files, skip_corrupt=skip_corrupt)
    return [row for row, can_be_read in zip(table, readable, strict=True) if can_be_read]


def _image_rows(
    table: Sequence[Row],
    files: Sequence[Path],
    label_column: str,
    class_names: Sequence[str] | None,
    texts: Mapping[str, str],
) -> Dataset:
    """One split; rows of one image are one concept, and ``texts`` maps our columns to the file's."""
    labels = None if class_names is None else _label_numbers(table, label_column, class_names)
    columns = {ours: [row[theirs] for row in table] for ours, theirs in texts.items()}
    return image_dataset(files, labels, class_names, concept=[str(file) for file in files], **columns)


def _read_tables(path: Path, split_column: str) -> dict[str, list[Row]]:
    """Split -> rows, from one csv file or a folder of them; every row knows its file and line."""
    if path.is_dir():
        files = {our_split(file.stem): file for file in sorted(path.glob("*.csv"))}
        tables = {split: _read_csv(file) for split, file in files.items() if split is not None}
    elif path.is_file():
        tables = {}
        for row in _read_csv(path):
            split = our_split(row[split_column]) if split_column in row else "train"
            if split is None:
                raise UserError(f"{row['']}: no split {row[split_column]!r}; write train, val or test")
            tables.setdefault(split, []).append(row)
    else:
        raise UserError(f"{path} does not exist; give a csv file or a folder with train.csv and test.csv")
    if not tables.get("train"):
        raise UserError(f"{path} has no training rows; give train.csv, or rows whose {split_column} is train")
    return tables


def _read_csv(path: Path) -> list[Row]:
    """Rows of a csv file by column; the column "" says where a row stands, for messages."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_files.DictReader(file)
            rows = [{**row, "": f"{path} line {reader.line_num}"} for row in reader]
    except (UnicodeDecodeError, csv_files.Error) as error:
        raise UserError(f"{path} is no UTF-8 csv file ({error}); save it as CSV UTF-8") from error
    for row in rows:
        if None in row or None in row.values():
            raise UserError(
                f"{row['']}: the number of fields differs from the header's; quote fields with commas"
            )
    return rows


def _check_columns(row: Row, needed: Sequence[str | None], one_of: Sequence[str]) -> None:
    file = _file_of(row)
    there = ", ".join(column for column in row if column)
    for column in needed:
        if column is not None and column not in row:
            raise UserError(f"{file} has no column {column!r}; it has {there}")
    if not any(column in row for column in one_of):
        raise UserError(
            f"{file} has neither {one_of[0]!r} nor {one_of[1]!r}; it has {there}: set label_column or "
            "caption_column"
        )


def _file_of(row: Row) -> Path:
    return Path(row[""].rpartition(" line ")[0])


def _image_files(table: Sequence[Row], image_column: str, root: Path | None) -> list[Path]:
    """Paths of the rows' images, all of which exist."""
    files = [(root or _file_of(row).parent) / row[image_column] for row in table]
    missing = [(row[""], file) for row, file in zip(table, files, strict=True) if not file.is_file()]
    if missing:
        named = "; ".join(f"{where}: {file}" for where, file in missing[:MAX_NAMED])
        raise UserError(
            f"{len(missing)} images do not exist ({named}); correct the paths, or set image_root to the "
            "folder they are relative to"
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

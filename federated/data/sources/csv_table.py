"""Reading tables of images from csv files: every row is read or refused, with its file and line."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from federated.data.names import listed
from federated.data.sources.form import SPLIT_NAMES, logger, our_split
from models.errors import UserError

Row = dict[str, str]
"""Column -> field. The column "" says where the row stands, for messages."""

SEPARATORS = (",", ";", "\t", "|")
_ROWS_TO_SNIFF = 20
_SPLIT_WORD = re.compile(rf"({'|'.join(name for names in SPLIT_NAMES.values() for name in names)})(?![a-z])")


def read_tables(path: Path, split_column: str | None, separator: str | None) -> dict[str, list[Row]]:
    """Return split -> rows, from one csv file or a folder of them.

    Args:
        path: One file, whose rows say their split, or a folder with a file for each split.
        split_column: The column of split names; None: the data has none.
        separator: What separates fields; None: found out for each file.

    Raises:
        UserError: a file that is missing, no csv, without rows, or not used; a row of another form than the
            header, or of an unknown split.
    """
    if path.is_dir():
        tables = {split: read_csv(file, separator) for split, file in _files_by_split(path).items()}
        for split, rows in tables.items():
            if not rows:
                raise UserError(
                    f"{path}: the {split} split has a header and no rows; add rows, or remove the file"
                )
            _check_splits(rows, split, split_column)
    elif path.is_file():
        tables = {}
        for row in read_csv(path, separator):
            tables.setdefault(_split_of(row, split_column) or "train", []).append(row)
    else:
        raise UserError(f"{path} does not exist; give a csv file or a folder with train.csv and test.csv")
    if not tables.get("train"):
        raise UserError(f"{path} has no training rows; give train.csv, or rows whose {split_column} is train")
    return tables


def read_csv(path: Path, separator: str | None = None) -> list[Row]:
    """Return the rows of a csv file by column.

    Args:
        path: The file.
        separator: What separates fields; None: comma, semicolon, tab or bar, as the header says.

    Raises:
        UserError: it cannot be read, is not UTF-8, names a column twice, or a row has another
            number of fields than the header; names file and line.
    """
    text = _text_of(path)
    try:
        separator = separator or _sniffed(text)
    except csv.Error as error:
        raise UserError(
            f"{path}: no csv ({error}); set data.options.separator, or correct the quotes"
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(path, header)
        rows = [_row(header, fields, f"{path} line {reader.line_num}") for fields in reader if fields]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: no csv ({error}); correct the line") from error
    return rows


def file_of(row: Row) -> Path:
    """Return the file that a row stands in."""
    return Path(row[""].rpartition(" line ")[0])


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give another file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is no UTF-8 csv file ({error}) in line {line}; save it as CSV UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line}: holds a NUL character; save the file as CSV UTF-8")
    return text


def _sniffed(text: str) -> str:
    """Return what separates the header's fields; of several, the first that the next rows agree with."""
    found = []
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        widths = [len(fields) for fields in itertools.islice(reader, 1 + _ROWS_TO_SNIFF) if fields]
        if widths and widths[0] > 1:
            found.append((len(set(widths)) > 1, separator))
    return min(found, key=lambda candidate: candidate[0], default=(False, ","))[1]


def _check_header(path: Path, header: Sequence[str]) -> None:
    if not any(header):
        raise UserError(f"{path} has no header; its first line must name the columns, such as image,label")
    doubles = [name for name, count in Counter(header).items() if count > 1 and name]
    if doubles:
        raise UserError(
            f"{path} has two columns {doubles[0]!r}; rename or remove one, so that each has a name"
        )


def _row(header: Sequence[str], fields: Sequence[str], where: str) -> Row:
    if len(fields) != len(header):
        raise UserError(
            f"{where}: the number of fields differs from the header's ({len(fields)} and {len(header)}); "
            "quote fields that hold the separator, or set separator to another",
            options=("separator",),
        )
    return {**dict(zip(header, fields, strict=True)), "": where}


def _files_by_split(folder: Path) -> dict[str, Path]:
    """The csv file of each split; what is not read is an error where it looks like rows of a split."""
    found: dict[str, Path] = {}
    unread: list[Path] = []
    for file in sorted(_csv_files(folder)):
        split = our_split(file.stem)
        if split is None:
            unread.append(file)
        elif split in found:
            raise UserError(
                f"{found[split]} and {file} are both the {split} split; join them into one file, or move one"
            )
        else:
            found[split] = file
    parts = [file for file in unread if _SPLIT_WORD.match(file.name.lower())]
    if parts:
        raise UserError(
            f"{listed(parts)} would not be read; only train.csv, val.csv and test.csv are: join the parts of "
            "a split into one file, or move them elsewhere"
        )
    if unread:
        logger.warning("not read, since their names are no split's: %s", listed(unread))
    below = (Path(place) for place, _, _ in os.walk(folder) if Path(place) != folder)
    if nested := sorted(file for place in below for file in _csv_files(place)):
        logger.warning("not read, since they lie below %s: %s", folder, listed(nested))
    return found


def _csv_files(folder: Path) -> Iterator[Path]:
    for file in folder.iterdir():
        if {".csv", ".tsv"} & set(map(str.lower, file.suffixes)) and not file.name.startswith("."):
            yield file  # a compressed one too, to be named


def _split_of(row: Row, split_column: str | None) -> str | None:
    """The split that a row says it is of; None without the column."""
    if split_column is None or split_column not in row:
        return None
    split = our_split(row[split_column])
    if split is None:
        raise UserError(
            f"{row['']}: no split {row[split_column]!r} (column {split_column!r}); write train, val or test"
        )
    return split


def _check_splits(rows: Sequence[Row], split: str, split_column: str | None) -> None:
    """Rows of a split's own file say the same split, if they say one."""
    for row in rows:
        said = _split_of(row, split_column)
        if said not in (None, split):
            raise UserError(
                f"{row['']}: column {split_column!r} says {said}, but the file is the {split} split; give "
                "the files one by one as path, or set split_column=null if the column means something else",
                options=("path", "split_column"),
            )

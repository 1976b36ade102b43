"""Columns of data sets in the hub's format: values that are missing, and classes by name."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset_builder
from pyarrow import parquet

from federated.data.names import listed, plain, shortened
from federated.data.sources.folder_scan import image_error
from federated.data.sources.form import logger, ordered_class_names
from models.errors import UserError


def check_columns(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Make sure that a split has columns, of one value a row.

    Raises:
        UserError: a column is missing, or holds lists.
    """
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(rows.column_names)}")
        kind = rows.features.arrow_schema.field(column).type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            raise UserError(
                f"{where}: each row of {column!r} holds a list; make a row of each of its values, which may "
                "name one image again"
            )


def complete_rows(rows: Dataset, columns: Sequence[str], where: str, *, skip: bool) -> Dataset:
    """Return the rows that have a value in every column.

    Args:
        rows: one split.
        columns: what is read of it.
        where: data set and split, for messages.
        skip: leave incomplete rows out, with a warning; otherwise they are an error.

    Raises:
        UserError: names the rows.
    """
    gaps = {column: np.flatnonzero(_is_missing(rows, column)) for column in columns}
    missing = np.unique(np.concatenate(list(gaps.values())))
    if len(missing) == 0:
        return rows
    named = [f"row {row} has no {column}" for column, found in gaps.items() for row in found.tolist()]
    if not skip:
        raise UserError(
            f"{where}: {len(missing)} rows are not complete ({listed(named)}); fill them in, or set "
            "skip_incomplete=true to leave such rows out",
            options=("skip_incomplete",),
        )
    logger.warning("%s: left out %d rows that are not complete: %s", where, len(missing), listed(named))
    return rows.select(np.setdiff1d(np.arange(len(rows)), missing))


def readable_rows(rows: Dataset, image_column: str, where: str) -> Dataset:
    """Return the rows whose image can be decoded; the others are logged.

    Args:
        rows: one split, no image missing.
        image_column: its images.
        where: data set and split, for messages.

    Raises:
        UserError: no image can be decoded.
    """
    raw = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    good = []
    for row, cell in enumerate(raw[image_column]):
        held = cell["bytes"]
        error = image_error(cell["path"] if held is None else io.BytesIO(held))
        if error is None:
            good.append(row)
        else:
            logger.warning("%s: left out row %d: its image cannot be decoded (%s)", where, row, error)
    if not good:
        raise UserError(f"{where}: none of its images can be decoded; write the data set again")
    return rows if len(good) == len(rows) else rows.select(good)


def with_own_class_names(loaded: DatasetDict, path: str, configuration: str | None) -> DatasetDict:
    """Give each split of a local folder the class names that its own parquet files hold.

    ``load_dataset`` reads the names of the first file and applies them to the numbers of all the others.

    Raises:
        UserError: files of one split name the classes in different orders.
    """
    data_files = load_dataset_builder(path, configuration).config.data_files or {}
    for split in loaded:
        files = [str(file) for file in data_files.get(split, ()) if str(file).endswith(".parquet")]
        schemas = {file: Features.from_arrow_schema(parquet.read_schema(file)) for file in files}
        for column, feature in loaded[split].features.items():
            if isinstance(feature, ClassLabel):
                own = _agreed_feature(schemas, column)
                if own is not None and own.names != feature.names:
                    numbers = _arrow_column(loaded[split], column).to_pylist()
                    rest = loaded[split].remove_columns(column)
                    loaded[split] = rest.add_column(column, numbers, feature=own)
    return loaded


def _agreed_feature(schemas: Mapping[str, Features], column: str) -> ClassLabel | None:
    """The class names that all files of a split hold; None where they hold none."""
    own = {
        file: found[column] for file, found in schemas.items() if isinstance(found.get(column), ClassLabel)
    }
    if not own:
        return None
    first = next(iter(own))
    for file, feature in own.items():
        if feature.names != own[first].names:
            raise UserError(
                f"{first} and {file} name the classes of {column!r} in different orders; write the files of "
                "a split with the same names"
            )
    return own[first]


def class_names_of(train: Dataset, label_column: str) -> tuple[str, ...]:
    """Return the names of the classes: those of the column's type, or else the distinct values in order."""
    feature = train.features[label_column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    return ordered_class_names(_label_names(train, label_column, ""))


def with_label_numbers(rows: Dataset, label_column: str, class_names: tuple[str, ...], where: str) -> Dataset:
    """Bring labels into the form of class numbers, by name; every row has one.

    Args:
        rows: one split without missing labels; it may number the classes in another order.
        label_column: its labels.
        class_names: the classes of the training rows.
        where: data set and split, for messages.

    Raises:
        UserError: a label is none of the classes.
    """
    feature = rows.features[label_column]
    if isinstance(feature, ClassLabel) and tuple(feature.names) == class_names:
        _label_names(rows, label_column, where)  # numbers within the range of the names
        return rows
    numbers = {name: number for number, name in enumerate(class_names)}
    names = _label_names(rows, label_column, where)
    unknown = next((row for row, name in enumerate(names) if name not in numbers), None)
    if unknown is not None:
        raise UserError(
            f"{where}: class {shortened(names[unknown])} in {label_column!r} (row {unknown}) occurs in no "
            "training row; add some, or remove it"
        )
    codes = [numbers[name] for name in names]
    replaced = rows.remove_columns(label_column)
    return replaced.add_column(label_column, codes, feature=ClassLabel(names=list(class_names)))


def _label_names(rows: Dataset, label_column: str, where: str) -> list[str]:
    """The class name of each row, (N,)."""
    values = _arrow_column(rows, label_column).to_pylist()
    feature = rows.features[label_column]
    if not isinstance(feature, ClassLabel):
        return [plain(str(value)) for value in values]
    wrong = next((row for row, value in enumerate(values) if not 0 <= value < len(feature.names)), None)
    if wrong is not None:
        raise UserError(
            f"{where}: {label_column!r} has values outside its {len(feature.names)} classes, such as "
            f"{values[wrong]} in row {wrong} (hidden test labels?); choose another split with "
            "splits={test: ...}",
            options=("splits",),
        )
    return [feature.names[value] for value in values]


def _is_missing(rows: Dataset, column: str) -> npt.NDArray[np.bool_]:
    """Whether each row has nothing in a column, (N,): null, not a number, blank, or an image of nothing."""
    values = _arrow_column(rows, column)
    if pa.types.is_struct(values.type):  # an image: bytes, or a path
        fields = [values.type.field(number).name for number in range(values.type.num_fields)]
        parts = [pa.chunked_array([c.field(name) for c in values.chunks]).is_valid() for name in fields]
        held = np.zeros(len(values), dtype=np.bool_)
        for name, part in zip(fields, parts, strict=True):
            if name in ("bytes", "path"):
                held |= part.to_numpy()
        return ~(held & values.is_valid().to_numpy())
    missing: npt.NDArray[np.bool_] = values.is_null(nan_is_null=True).to_numpy()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        missing = missing | np.array(
            [not (text or "").strip() for text in values.to_pylist()], dtype=np.bool_
        )
    return missing


def _arrow_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    return rows.select_columns([column]).with_format("arrow")[:].column(column)

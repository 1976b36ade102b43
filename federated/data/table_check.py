"""Checking a table of images, csv or in the hub's format, before a run: rows, images, captions, questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image

from federated.data.dataset import load_data
from federated.data.names import listed, read_alike
from federated.data.question_check import QuestionReport, check_questions
from federated.data.sources.csv_table import read_csv
from federated.data.sources.folder_scan import Look, look_alike, look_at_all, of_one_colour, of_several_frames
from federated.data.sources.question_form import ANSWER, QUESTION
from federated.data.splits import column_values
from models.errors import UserError
from models.progress import Report, quiet


@dataclass(frozen=True)
class TableReport:
    """What is known about a table before it is used.

    Attributes:
        counts: what is counted -> split -> how many: "rows", "pictures" and, as far as there are, "captions",
            "questions" and "answers" that differ, and each class or type of question.
        captions: all captions.
        one_colour: images whose pixels are all of one colour.
        several_frames: images of which all frames but the first are not read.
        look_alike: groups of images that differ as files hold them and are equal as a model is shown them.
        leaks: groups of files in more than one split that show the same: test results would be too good.
        questions: what is known about the questions; None: the table has none.
    """

    counts: Mapping[str, Mapping[str, int]]
    captions: tuple[str, ...]
    one_colour: tuple[Path, ...]
    look_alike: tuple[tuple[Path, ...], ...]
    several_frames: tuple[Path, ...] = ()
    leaks: tuple[tuple[Path, ...], ...] = ()
    questions: QuestionReport | None = None


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds parquet files, or what ``save_to_disk`` of ``datasets`` wrote."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        folder.rglob("*.parquet")
    )


def check_table(
    path: Path, *, source: str = "csv", options: Mapping[str, Any] | None = None, report: Report = quiet
) -> TableReport:
    """Look at every row and image of a csv file, of a folder of them, or of a data set in the hub's format.

    A csv table with a column of questions is read by the source ``vqa_csv``.

    Args:
        path: the file or folder.
        source: "csv" or "hub".
        options: of the source, as in ``data.options``.
        report: told about the progress, after each image.

    Raises:
        UserError: a run could not use it; names file and line, or all images that cannot be decoded.
    """
    if source == "csv" and _has_questions(path, options or {}):
        source = "vqa_csv"
    unread = {} if source == "hub" else {"check_images": False}  # all are looked at below
    data = load_data(source, path=str(path), **{**unread, **(options or {})})
    parts = {"train": data.train, "val": data.validation, "test": data.test}
    splits = {name: rows for name, rows in parts.items() if rows is not None}
    counts: dict[str, dict[str, int]] = {"rows": {name: len(rows) for name, rows in splits.items()}}
    if data.picture_column is not None:
        pictures = data.picture_column
        counts["pictures"] = {name: len(set(rows[pictures][:])) for name, rows in splits.items()}
    captions: list[str] = []
    if data.caption_column is not None:
        of_split = {name: list(rows[data.caption_column][:]) for name, rows in splits.items()}
        captions = [caption for found in of_split.values() for caption in found]
        counts["captions"] = {name: len(set(map(read_alike, found))) for name, found in of_split.items()}
    has_questions = QUESTION in data.train.column_names
    for column in (QUESTION, ANSWER) if has_questions else ():
        counts[f"{column}s"] = {
            name: len(set(map(read_alike, rows[column][:]))) for name, rows in splits.items()
        }
    if data.class_names is not None:
        kind = "type" if has_questions else "class"
        names, labels = data.class_names, data.label_column or ""
        of_class = {
            name: np.bincount(column_values(rows, labels), minlength=len(names))
            for name, rows in splits.items()
        }
        counts |= {
            f"{kind} {class_name}": {name: int(found[number]) for name, found in of_class.items()}
            for number, class_name in enumerate(names)
        }
    if data.image_column is None:
        raise UserError(f"{path} has no column of images")
    files, held = _images(splits, data.image_column)
    corrupt: list[tuple[Path, str]] = []
    looks = look_at_all(list(files), corrupt, report, lambda image: held[image]() if image in held else image)
    if corrupt:
        named = listed(f"{file} ({reason})" for file, reason in corrupt)
        raise UserError(f"{path} cannot be used: {len(corrupt)} images cannot be decoded: {named}")
    return TableReport(
        counts,
        tuple(captions),
        one_colour=of_one_colour(looks),
        look_alike=look_alike(looks),
        several_frames=of_several_frames(looks),
        leaks=_leaks(files, looks),
        questions=check_questions(data) if has_questions else None,
    )


def _has_questions(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether the file, or the first of the folder's, has the column of questions."""
    file = min(path.glob("*.csv"), default=path) if path.is_dir() else path
    rows = read_csv(file, options.get("separator")) if file.is_file() else []
    return bool(rows) and options.get("question_column", "question") in rows[0]


def _images(
    splits: Mapping[str, Dataset], image_column: str
) -> tuple[dict[Path, set[str]], dict[Path, Callable[[], BytesIO]]]:
    """Return image -> the splits it is in, and image -> how to read it where it is no file of its own."""
    files: dict[Path, set[str]] = {}
    held: dict[Path, Callable[[], BytesIO]] = {}
    for split, rows in splits.items():
        raw = rows.cast_column(image_column, Image(decode=False)).select_columns([image_column])
        for number, row in enumerate(raw):
            cell = row[image_column]
            image = Path(cell["path"] or "")
            if cell["bytes"] is not None:
                image = Path(f"{split} row {number}")
                held[image] = partial(_content, raw, number, image_column)
            files.setdefault(image, set()).add(split)
    return files, held


def _content(rows: Dataset, number: int, image_column: str) -> BytesIO:
    return BytesIO(rows[number][image_column]["bytes"])


def _leaks(splits_of: Mapping[Path, set[str]], looks: Mapping[Path, Look]) -> tuple[tuple[Path, ...], ...]:
    """Groups of files that show the same and lie in more than one split."""
    groups: dict[str, list[Path]] = {}
    for file, look in looks.items():
        groups.setdefault(look.shown, []).append(file)
    return tuple(
        tuple(group) for group in groups.values() if len(set.union(*(splits_of[f] for f in group))) > 1
    )

"""Checking a csv table of images before a run: every row and image, its captions or questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Image

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


def check_table(
    path: Path, *, allow_outside: bool = False, report: Report = quiet, **options: Any
) -> TableReport:
    """Look at every row and image of a csv file, or of a folder of them.

    A table with a column of questions is read by the source ``vqa_csv``, another one by ``csv``.

    Args:
        path: the file or folder.
        allow_outside: look at images that lie outside the folder.
        report: told about the progress.
        **options: of the source, such as ``image_column``.

    Raises:
        UserError: a run could not use it; names file and line, or all images that cannot be decoded.
    """
    source = "vqa_csv" if _has_questions(path, options) else "csv"
    data = load_data(source, path=str(path), allow_outside=allow_outside, check_images=False, **options)
    parts = {"train": data.train, "val": data.validation, "test": data.test}
    splits = {name: rows for name, rows in parts.items() if rows is not None}
    counts: dict[str, dict[str, int]] = {"rows": {name: len(rows) for name, rows in splits.items()}}
    counts["pictures"] = {name: len(set(rows["picture"][:])) for name, rows in splits.items()}
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
    files: dict[Path, set[str]] = {}  # and the splits they are in
    for name, rows in splits.items():
        raw = rows.cast_column(data.image_column, Image(decode=False))[data.image_column]
        for cell in raw:
            files.setdefault(Path(cell["path"]), set()).add(name)
    corrupt: list[tuple[Path, str]] = []
    looks = look_at_all(list(files), corrupt, report)
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


def _leaks(splits_of: Mapping[Path, set[str]], looks: Mapping[Path, Look]) -> tuple[tuple[Path, ...], ...]:
    """Groups of files that show the same and lie in more than one split."""
    groups: dict[str, list[Path]] = {}
    for file, look in looks.items():
        groups.setdefault(look.shown, []).append(file)
    return tuple(
        tuple(group) for group in groups.values() if len(set.union(*(splits_of[f] for f in group))) > 1
    )

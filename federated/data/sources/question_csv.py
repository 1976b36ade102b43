"""The ``vqa_csv`` source: questions about images, listed in csv files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from datasets import Dataset
from pydantic import StringConstraints

from federated.data.names import check_names, listed, plain
from federated.data.pictures import picture_names
from federated.data.sources.csv_source import image_files, rows_with_images
from federated.data.sources.csv_table import Row, file_of, read_tables
from federated.data.sources.form import (
    FederatedData,
    completed,
    logger,
    ordered_class_names,
    readable_images,
    split_off,
)
from federated.data.sources.question_form import CLIENT, MEANING, Question, question_rows
from models.errors import UserError
from models.vqa_metrics import answer_type

Separator = Annotated[str, StringConstraints(min_length=1, max_length=1)]


@dataclass(frozen=True)
class QuestionColumns:
    """The names of the columns that are read; None: not read.

    Attributes:
        image: Image paths.
        question: Questions.
        answer: Answers; None where ``answers`` stand for them.
        type: Types of questions.
        domain: Whose a row is.
        answers: What several people said, in one field.
    """

    image: str
    question: str
    answer: str | None
    type: str | None
    domain: str | None
    answers: str | None

    @property
    def named(self) -> dict[str, str]:
        """Role -> the file's column, of those that are read."""
        return {role: column for role, column in self.__dict__.items() if column is not None}


def vqa_csv(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    path: str,
    image_dir: str | None = None,
    image_column: str = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    type_column: str | None = "type",
    types: Sequence[str] | None = None,
    domain_column: str | None = None,
    answers_column: str | None = None,
    answers_separator: Separator = "|",
    split_column: str | None = "split",
    separator: Separator | None = None,
    val_split: float = 0.1,
    test_fraction: float = 0.1,
    skip_corrupt: bool = False,
    skip_incomplete: bool = False,
    check_images: bool = True,
    allow_outside: bool = False,
) -> FederatedData:
    """Questions about images, listed in csv files with a header: image, question, answer, maybe a type.

    ``path`` is one file, or a folder with ``train.csv`` and, if wanted, ``val.csv`` and ``test.csv``. One
    file is split by its split column, or by ``test_fraction`` and ``val_split`` without one. Splits are drawn
    by picture: all questions about one stay together.

    Args:
        rng: draws the test and validation rows where there are none.
        path: the file or folder.
        image_dir: what image paths are relative to; by default the folder of the csv file.
        image_column: column of image paths.
        question_column: column of questions.
        answer_column: column of answers; without it the most frequent of ``answers_column``.
        type_column: column of the types of questions; used when it is there. Without it a row's type is its
            answer's: yes/no, number or other.
        types: the types that may occur, in their order; by default those of the training rows.
        domain_column: column of domains, for natural partitions.
        answers_column: column of what several people answered, in one field.
        answers_separator: what separates them.
        split_column: column of split names; used when it is there.
        separator: what separates fields; by default comma, semicolon, tab or bar, as the header says.
        val_split: share of the training images for validation where there is no such split; 0 for none.
        test_fraction: share of the images for testing where there is no test split.
        skip_corrupt: leave images out that are missing or cannot be decoded, logged and counted, instead of
            stopping.
        skip_incomplete: likewise rows without image, question, answer, type or domain.
        check_images: decode every image once at loading.
        allow_outside: take images that lie outside the folder, by ``..``, an absolute path or a link.

    Raises:
        UserError: a missing file, column or image, an empty field, an unknown type, a corrupt image; named
            with file and line.
    """
    tables = read_tables(Path(path), split_column, separator)
    wanted = QuestionColumns(
        image_column, question_column, answer_column, type_column, domain_column, answers_column
    )
    columns = _columns_there(tables, wanted)
    num_listed = sum(map(len, tables.values()))
    tables = {split: _complete(table, columns, skip=skip_incomplete) for split, table in tables.items()}
    root = None if image_dir is None else Path(image_dir)
    files = {}
    for split, table in tables.items():
        tables[split] = rows_with_images(
            table, image_column, root, skip_corrupt=skip_corrupt, root_option="image_dir"
        )
        files[split] = image_files(
            tables[split], image_column, root, allow_outside=allow_outside, root_option="image_dir"
        )
    if check_images:
        readable = _readable(files, skip_corrupt=skip_corrupt)
        for split, table in tables.items():
            kept = [row for row, file in enumerate(files[split]) if file in readable]
            tables[split], files[split] = [table[row] for row in kept], [files[split][row] for row in kept]
    asked = {
        split: [_question(row, number, columns, answers_separator) for number, row in enumerate(table)]
        for split, table in tables.items()
    }
    kinds = _kinds(tables, asked, types) if columns.type is not None else _answer_types(asked)
    check_names(kinds, path)
    data = completed(
        {split: _rows(files[split], questions, kinds) for split, questions in asked.items()},
        rng,
        test_fraction,
        class_names=kinds,
        domain_column=None if columns.domain is None else CLIENT,
        name="vqa_csv",
        concept_column=None,
        num_skipped=num_listed - sum(map(len, tables.values())),
        **MEANING,
    )
    return data if data.validation is not None or val_split == 0 else _with_validation(data, val_split, rng)


def _columns_there(tables: Mapping[str, Sequence[Row]], wanted: QuestionColumns) -> QuestionColumns:
    """The columns that are read; the files of all splits must have them."""
    first = tables["train"][0]
    columns = replace(
        wanted,
        answer=wanted.answer if wanted.answer in first or wanted.answers is None else None,
        type=wanted.type if wanted.type in first else None,
    )
    for row in (table[0] for table in tables.values()):
        for role, column in columns.named.items():
            if column not in row:
                has = listed((repr(name) for name in row if name), limit=20)
                raise UserError(
                    f"{file_of(row)} has no column {column!r}; it has {has}: set {role}_column to the one "
                    f"that holds the {role}",
                    options=(f"{role}_column",),
                )
    return columns


def _complete(table: Sequence[Row], columns: QuestionColumns, *, skip: bool) -> list[Row]:
    """The rows without an empty field, without blanks around their texts."""
    rows, gaps = [], []
    for row in table:
        texts = {column: plain(row[column]) for role, column in columns.named.items() if role != "image"}
        fields = {**texts, columns.image: row[columns.image].strip()}
        empty = [column for column, text in fields.items() if not text]
        if empty:
            gaps.append(f"{row['']} has an empty {empty[0]}")
        else:
            rows.append({**row, **texts})
    if gaps and not skip:
        raise UserError(
            f"{len(gaps)} rows are not complete: {listed(gaps)}; fill them in, or set skip_incomplete=true "
            "to leave such rows out",
            options=("skip_incomplete",),
        )
    if gaps:
        logger.warning("left out %d rows that are not complete: %s", len(gaps), listed(gaps))
    if not rows:
        raise UserError(
            f"{file_of(table[0])} has no row that is complete; fill in {listed(columns.named.values())}"
        )
    return rows


def _readable(files: Mapping[str, Sequence[Path]], *, skip_corrupt: bool) -> set[Path]:
    """The images that can be decoded, each looked at once however many questions there are about it."""
    distinct = list(dict.fromkeys(file for found in files.values() for file in found))
    readable = readable_images(distinct, skip_corrupt=skip_corrupt)
    return {file for file, good in zip(distinct, readable, strict=True) if good}


def _question(row: Row, number: int, columns: QuestionColumns, answers_separator: str) -> Question:
    """One row; its type is its answer's where the file has none."""
    answers: tuple[str, ...] = ()
    if columns.answers is not None:
        answers = tuple(text for text in map(plain, row[columns.answers].split(answers_separator)) if text)
    if columns.answer is not None:
        answer = row[columns.answer]
    elif answers:
        answer = Counter(answers).most_common(1)[0][0]
    else:
        raise UserError(
            f"{row['']}: column {columns.answers!r} holds no answer; fill it in, or remove the row"
        )
    return Question(
        number,
        row[columns.question],
        answer,
        answer_type(answer) if columns.type is None else row[columns.type],
        None if columns.domain is None else row[columns.domain],
        answers,
    )


def _kinds(
    tables: Mapping[str, Sequence[Row]], asked: Mapping[str, Sequence[Question]], types: Sequence[str] | None
) -> tuple[str, ...]:
    """The types in their order; every row's is among them."""
    trained = ordered_class_names([question.kind for question in asked["train"]])
    known = trained if types is None else tuple(map(plain, types))
    reason = "occurs in no training row" if types is None else "is not among types"
    for split, questions in asked.items():
        for row, question in zip(tables[split], questions, strict=True):
            if question.kind not in known:
                raise UserError(
                    f"{row['']}: type {question.kind!r} {reason}; there are {listed(known, limit=20)}: "
                    "correct it, or name all types in types",
                    options=("types",),
                )
    return known


def _answer_types(asked: Mapping[str, Sequence[Question]]) -> tuple[str, ...]:
    """The types of the answers, of which a split may lack one."""
    return tuple(sorted({question.kind for questions in asked.values() for question in questions}))


def _rows(files: Sequence[Path], questions: Sequence[Question], kinds: Sequence[str]) -> Dataset:
    images = [{"bytes": None, "path": str(file)} for file in files]
    return question_rows(images, questions, kinds, picture_names(files))


def _with_validation(data: FederatedData, val_split: float, rng: np.random.Generator) -> FederatedData:
    """Take a validation split out of train, by picture."""
    if not 0 <= val_split < 1:
        raise UserError(
            f"val_split is {val_split}; it must be at least 0 and below 1", options=("val_split",)
        )
    train, validation = split_off(
        data.train, val_split, rng, label_column=data.label_column, groups=data.groups()
    )
    return replace(data, train=train, validation=validation, drawn=(*data.drawn, "validation"))

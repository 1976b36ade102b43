"""Questions about pictures as rows: one row a question, with its picture, answer and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from datasets.table import InMemoryTable

from federated.data.pictures import PICTURE

QUESTION, ANSWER, ANSWERS, TYPE, CLIENT = "question", "answer", "answers", "label", "client"
"""Columns of a row; the type is the label, so that rows are split and partitioned by it."""

MEANING: Mapping[str, Any] = {
    "label_column": TYPE,
    "image_column": "image",
    "caption_column": None,
    "picture_column": PICTURE,
}
"""Fields of ``FederatedData`` that all sources of questions share."""


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        picture: Number of its picture in its split.
        question: The question.
        answer: The answer to learn, and to score against.
        kind: The type of the question.
        client: Whose it is, for natural partitions; None: the data does not say.
        answers: What several people said, where it is known.
    """

    picture: int
    question: str
    answer: str
    kind: str
    client: str | None = None
    answers: tuple[str, ...] = ()


def question_rows(
    images: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    kinds: Sequence[str],
    pictures: Sequence[str] | None = None,
) -> Dataset:
    """Make one split.

    Args:
        images: "bytes" and "path" of each picture, (P,).
        questions: The rows, (N,).
        kinds: Names of the types, in order of their numbers.
        pictures: Names of the pictures, (P,), equal for equal pictures; None: all differ, and are numbers.

    Returns:
        The columns image, question, answer, label (the type) and picture; client and answers where the first
        row has them.
    """
    numbers = [row.picture for row in questions]
    features = {
        "image": Image(),
        QUESTION: Value("string"),
        ANSWER: Value("string"),
        TYPE: ClassLabel(names=list(kinds)),
        PICTURE: Value("int64" if pictures is None else "string"),
    }
    storage = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    places = {kind: number for number, kind in enumerate(kinds)}
    columns: dict[str, Any] = {
        "image": pa.array(list(images), storage).take(pa.array(numbers, pa.int64())),
        QUESTION: [row.question for row in questions],
        ANSWER: [row.answer for row in questions],
        TYPE: [places[row.kind] for row in questions],
        PICTURE: numbers if pictures is None else [pictures[number] for number in numbers],
    }
    if questions and questions[0].client is not None:
        columns[CLIENT], features[CLIENT] = [row.client for row in questions], Value("string")
    if questions and questions[0].answers:
        columns[ANSWERS] = [list(row.answers) for row in questions]
        features[ANSWERS] = List(Value("string"))
    schema = Features(features).arrow_schema
    return Dataset(InMemoryTable(pa.table(columns).select(schema.names).cast(schema)))

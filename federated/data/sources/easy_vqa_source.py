"""The ``easy_vqa`` source: somebody else's questions about plain shapes, in somebody else's split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from federated.data.sources.embedded import DATA_FOLDER
from federated.data.sources.form import FederatedData
from federated.data.sources.question_form import MEANING, Question, question_rows

KINDS = ("yes/no", "shape", "colour")
SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa(rng: np.random.Generator) -> FederatedData:
    """Bundled easy-VQA: 38,575 and 9,673 English questions on 4,000 and 1,000 pictures of 64 px, 13 answers.

    The split is its author's (Victor Zhou, 2019, PyPI ``easy-vqa`` 1.0). Types: yes/no, shape, colour.

    Args:
        rng: not used.
    """
    return FederatedData(
        train=_read("train"),
        validation=None,
        test=_read("test"),
        class_names=KINDS,
        domain_column=None,
        name="easy_vqa",
        **MEANING,
    )


def _read(split: str) -> Dataset:
    import pyarrow.parquet as pq

    table = pq.read_table(DATA_FOLDER / "easy_vqa" / f"{split}.parquet", use_threads=False)
    columns: dict[str, Sequence[list[str]]] = table.select(["question", "answer"]).to_pydict()
    asked = zip(columns["question"], columns["answer"], strict=True)
    questions = [
        Question(picture, question, answer, _kind_of(answer))
        for picture, (texts, answers) in enumerate(asked)
        for question, answer in zip(texts, answers, strict=True)
    ]
    return question_rows(table.column("image").to_pylist(), questions, KINDS)


def _kind_of(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"

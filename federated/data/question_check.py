"""Checking questions about images before a run: answers, lengths, doubles, what needs no picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from federated.data.names import read_alike
from federated.data.pictures import PICTURE
from federated.data.sources.form import FederatedData
from federated.data.sources.question_form import ANSWER, QUESTION
from models.question_baselines import baseline_scores
from models.vqa_metrics import EXACT_MATCH

NUM_FREQUENT = 10


@dataclass(frozen=True)
class QuestionReport:
    """What is known about questions and answers before they are used.

    Attributes:
        frequent: The most frequent answers of all rows, and how many rows have each.
        num_answers: Answers that differ.
        num_rows: Rows.
        words: "question" and "answer" -> fewest, median and most words.
        repeated: Questions that are asked of one picture more than once, with the same answer.
        contradicted: Questions that are asked of one picture more than once, with answers that differ.
        unseen: Test rows whose answer occurs in no training row.
        num_test: Test rows.
        without_picture: "majority" and "question_only" -> share of the test rows that they answer exactly.
    """

    frequent: tuple[tuple[str, int], ...]
    num_answers: int
    num_rows: int
    words: Mapping[str, tuple[int, int, int]]
    repeated: tuple[str, ...]
    contradicted: tuple[str, ...]
    unseen: int
    num_test: int
    without_picture: Mapping[str, float]


def check_questions(data: FederatedData) -> QuestionReport:
    """Look at the questions and answers of all splits.

    Args:
        data: Of a source of questions.
    """
    splits = [rows for rows in (data.train, data.validation, data.test) if rows is not None]
    pairs = [_texts(rows) for rows in splits]
    questions = [question for asked, _ in pairs for question in asked]
    answers = [read_alike(answer) for _, given in pairs for answer in given]
    pictures = [str(picture) for rows in splits for picture in rows[PICTURE][:]]
    asked: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for picture, question, answer in zip(pictures, questions, answers, strict=True):
        asked[picture, read_alike(question)].append(answer)
    several = {key: given for key, given in asked.items() if len(given) > 1}
    train, test = _texts(data.train), _texts(data.test)
    trained = {read_alike(answer) for answer in train[1]}
    scores = baseline_scores(train, test, language="vi")  # the rules that both languages share
    counts = Counter(answers)
    return QuestionReport(
        frequent=tuple(counts.most_common(NUM_FREQUENT)),
        num_answers=len(counts),
        num_rows=len(answers),
        words={"question": _num_words(questions), "answer": _num_words(answers)},
        repeated=tuple(f"{key[0]}: {key[1]}" for key, given in several.items() if len(set(given)) == 1),
        contradicted=tuple(f"{key[0]}: {key[1]}" for key, given in several.items() if len(set(given)) > 1),
        unseen=sum(read_alike(answer) not in trained for answer in test[1]),
        num_test=len(test[1]),
        without_picture={name: score[EXACT_MATCH] for name, score in scores.items()},
    )


def _texts(rows: Dataset) -> tuple[list[str], list[str]]:
    """Questions and answers."""
    return list(rows[QUESTION][:]), list(rows[ANSWER][:])


def _num_words(texts: Sequence[str]) -> tuple[int, int, int]:
    """Fewest, median and most words."""
    counts = np.array([len(text.split()) for text in texts])
    return int(counts.min()), int(np.median(counts)), int(counts.max())

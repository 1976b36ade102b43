"""How right answers to questions are: exact match, token F1 and the official VQA accuracy.

Answers are normalised before they are compared. Sources: the VQA accuracy of Antol et al. 2015
(arXiv:1505.00468), as its official evaluation counts it; token F1 of Rajpurkar et al. 2016
(arXiv:1606.05250).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.errors import UserError

Language = Literal["en", "vi"]

EXACT_MATCH, TOKEN_F1, VQA_ACCURACY = "exact_match", "token_f1", "vqa_accuracy"
ANSWER_METRICS = (EXACT_MATCH, TOKEN_F1, VQA_ACCURACY)

NUM_PEOPLE = 10
"""Answers to a question in the official VQA accuracy."""

RowScores = Mapping[str, npt.NDArray[np.float64]]
"""Metric -> its value for each row, (N,), 0 to 1."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_CONTRACTED = """ain't aren't can't couldn't couldn't've didn't doesn't don't hadn't hasn't haven't he'd
he's how's i'm i've isn't it'd it'll let's mightn't mustn't needn't o'clock shan't she's
should've shouldn't that's there's they'd they'll they're they've wasn't we've weren't
what's when's where's who's why's won't would've wouldn't y'all you'd you'll you're you've"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_YES_NO = frozenset(("yes", "no", "có", "không", "đúng", "sai", "phải", "không phải"))
_VIETNAMESE_NUMBERS = frozenset(("một", "hai", "ba", "bốn", "năm", "sáu", "bảy", "tám", "chín", "mười"))


def normalised(answer: str, language: Language = "en") -> str:
    """Return an answer as it is compared with others.

    In both languages: letters in Unicode's composed form, tone marks kept; lower case; punctuation removed,
    or a blank where it joins words; blanks as one each; a comma within a number goes. In English besides, as
    in the official evaluation: number words up to ten are digits, articles go, contractions get their
    apostrophe.

    Args:
        answer: What was said.
        language: "en" or "vi". English rules leave Vietnamese words as they are but "a" and "an".
    """
    text = " ".join(unicodedata.normalize("NFC", answer).lower().split())
    bare = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        apart = in_number or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if apart else " ")
    words = _PERIOD.sub("", bare).split()
    if language == "en":
        words = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
        words = [_CONTRACTIONS.get(word, word) for word in words]
    return " ".join(words)


def exact_match(predicted: str, right: str, language: Language = "en") -> float:
    """Return 1 where two answers are equal once normalised, 0 otherwise."""
    return float(normalised(predicted, language) == normalised(right, language))


def token_f1(predicted: str, right: str, language: Language = "en") -> float:
    """Return the harmonic mean of precision and recall of the words of an answer, 0 to 1.

    Words count as often as they occur; two answers without words are equal.
    """
    said, expected = (normalised(text, language).split() for text in (predicted, right))
    if not said or not expected:
        return float(said == expected)
    shared = (Counter(said) & Counter(expected)).total()
    return 2 * shared / (len(said) + len(expected))


def vqa_accuracy(predicted: str, answers: Sequence[str], language: Language = "en") -> float:
    """Return the official accuracy: over the sets that leave out one person, the mean of min(equal / 3, 1).

    Of ten people, 0, 1, 2, 3 and 4 who say the same give 0, 0.3, 0.6, 0.9 and 1.

    Args:
        predicted: The answer to score.
        answers: What ten people said.
        language: "en" or "vi".

    Raises:
        UserError: There are not ten answers.
    """
    if len(answers) != NUM_PEOPLE:
        raise UserError(
            f"the official VQA accuracy needs {NUM_PEOPLE} answers a question, not {len(answers)}; use "
            f"{EXACT_MATCH} and {TOKEN_F1}"
        )
    said = normalised(predicted, language)
    equal = sum(normalised(answer, language) == said for answer in answers)
    without_equal, without_other = min((equal - 1) / 3, 1.0), min(equal / 3, 1.0)
    return (equal * without_equal + (NUM_PEOPLE - equal) * without_other) / NUM_PEOPLE


def check_answer_metric(name: str) -> None:
    """Make sure that a metric of answers is known.

    Raises:
        UserError: It is not, or is WUPS; says why and what to use.
    """
    if name.lower().startswith("wups"):
        raise UserError(
            "WUPS is not offered: it compares words by their places in an English taxonomy, WordNet, and no "
            f"mapping of Vietnamese words to it is agreed on; use {TOKEN_F1}, which credits partial answers"
        )
    if name not in ANSWER_METRICS:
        raise UserError(f"unknown metric of answers {name!r}; choose {', '.join(ANSWER_METRICS)}")


def row_scores(
    predicted: Sequence[str],
    right: Sequence[str],
    *,
    answers: Sequence[Sequence[str]] | None = None,
    language: Language = "en",
) -> RowScores:
    """Score answers one by one.

    Args:
        predicted: What was answered, (N,).
        right: The right answers, (N,).
        answers: What ten people said, N of ten; None: the official VQA accuracy is left out.
        language: "en" or "vi".

    Returns:
        Metric -> (N,).
    """
    pairs = list(zip(predicted, right, strict=True))
    scores = {
        EXACT_MATCH: np.array([exact_match(said, expected, language) for said, expected in pairs]),
        TOKEN_F1: np.array([token_f1(said, expected, language) for said, expected in pairs]),
    }
    if answers is not None:
        of_people = zip(predicted, answers, strict=True)
        scores[VQA_ACCURACY] = np.array([vqa_accuracy(said, people, language) for said, people in of_people])
    return scores


def mean_scores(scores: RowScores) -> dict[str, float]:
    """Return the mean of each metric over the rows; nan without rows."""
    return {
        metric: float(values.mean()) if len(values) else float("nan") for metric, values in scores.items()
    }


def scores_by(scores: RowScores, groups: Sequence[Hashable]) -> dict[Hashable, dict[str, float]]:
    """Return the scores of each group of rows, such as the type of the question or of the answer.

    Args:
        scores: Of ``row_scores``.
        groups: The group of each row, (N,).

    Returns:
        Group, in order of first occurrence -> metric -> mean, and "rows", how many there are.
    """
    found: dict[Hashable, dict[str, float]] = {}
    for group in dict.fromkeys(groups):
        chosen = np.array([other == group for other in groups])
        found[group] = {"rows": float(chosen.sum())}
        found[group] |= mean_scores({metric: values[chosen] for metric, values in scores.items()})
    return found


def answer_type(answer: str) -> str:
    """Return the type that VQA v2 gives an answer: "yes/no", "number" or "other"; also in Vietnamese."""
    text = normalised(answer)
    if text in _YES_NO:
        return "yes/no"
    is_number = text in _VIETNAMESE_NUMBERS or text.replace(".", "", 1).isdecimal()
    return "number" if is_number else "other"

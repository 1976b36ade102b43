"""Answers that look at no picture: the most frequent one, and one chosen by the question alone.

A model has learned to see only as far as it is better than these.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from models.errors import UserError
from models.vqa_metrics import Language, mean_scores, normalised, row_scores

Answerer = Callable[[Sequence[str]], list[str]]
"""Questions -> answers."""

MOST_WORDS, MOST_ANSWERS = 2000, 1000
"""Frequent words and answers that the classifier knows."""


def majority_answer(answers: Sequence[str]) -> str:
    """Return the most frequent answer, of several the first in the order of letters.

    Raises:
        UserError: There are no answers.
    """
    if not answers:
        raise UserError("there is no training answer to take the most frequent of; add training rows")
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def question_only(questions: Sequence[str], answers: Sequence[str]) -> Answerer:
    """Train a classifier of questions: logistic regression on which words occur in one.

    Args:
        questions: The training questions, (N,).
        answers: Their answers, (N,); all but the 1,000 most frequent ones are left out.

    Returns:
        Questions -> the most probable answers.

    Raises:
        UserError: There are no answers.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    majority = majority_answer(answers)
    frequent = {answer for answer, _ in Counter(answers).most_common(MOST_ANSWERS)}
    asked = [normalised(question, "vi") for question in questions]  # articles and numbers may say something
    pairs = Counter(pair for pair in zip(asked, answers, strict=True) if pair[1] in frequent)
    if len(frequent) == 1 or not any(question for question, _ in pairs):
        return lambda others: [majority for _ in others]
    texts, targets = zip(*pairs, strict=True)
    words = CountVectorizer(binary=True, tokenizer=str.split, token_pattern=None, max_features=MOST_WORDS)
    classifier = LogisticRegression(max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline that is nearly there will do
        classifier.fit(words.fit_transform(texts), targets, sample_weight=list(pairs.values()))

    def answer(others: Sequence[str]) -> list[str]:
        known = words.transform([normalised(question, "vi") for question in others])
        return [str(found) for found in classifier.predict(known)]

    return answer


def baseline_scores(
    train: tuple[Sequence[str], Sequence[str]],
    test: tuple[Sequence[str], Sequence[str]],
    *,
    answers: Sequence[Sequence[str]] | None = None,
    language: Language = "en",
) -> dict[str, dict[str, float]]:
    """Return what answering without the picture reaches.

    Args:
        train: Questions and answers to learn from.
        test: Questions and answers to score on.
        answers: What ten people said to each test question, if known.
        language: "en" or "vi".

    Returns:
        "majority" and "question_only" -> metric -> mean over the test rows.
    """
    questions, right = test
    predicted = {
        "majority": [majority_answer(train[1])] * len(questions),
        "question_only": question_only(*train)(questions),
    }
    return {
        name: mean_scores(row_scores(said, right, answers=answers, language=language))
        for name, said in predicted.items()
    }

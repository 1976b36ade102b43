"""Claims about the metrics of answers and about the baselines that see no picture."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.data.dataset import load_data
from models.errors import UserError
from models.question_baselines import baseline_scores, majority_answer, question_only
from models.vqa_metrics import (
    answer_type,
    check_answer_metric,
    exact_match,
    mean_scores,
    normalised,
    row_scores,
    scores_by,
    token_f1,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat.", "cat"),
        ("an  umbrella!", "umbrella"),
        ("two", "2"),
        ("Ten", "10"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("  ", ""),
        ("the", ""),
    ],
)
def test_english_answers_are_normalised_as_in_the_official_evaluation(answer, expected):
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Màu Đỏ.", "màu đỏ"),
        ("An toàn", "an toàn"),  # "an" is no article here
        ("hai", "hai"),
        ("con  mèo?", "con mèo"),
        (unicodedata.normalize("NFD", "Góc trên bên trái"), "góc trên bên trái"),
    ],
)
def test_vietnamese_answers_keep_tone_marks_and_words(answer, expected):
    assert normalised(answer, "vi") == expected


def test_words_that_differ_in_their_tone_are_different_answers():
    assert exact_match("ba", "bà", "vi") == 0
    assert exact_match("BÀ", unicodedata.normalize("NFD", "bà"), "vi") == 1


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from(["en", "vi"]))
def test_normalising_leaves_no_mark_and_no_double_blank(text, language):
    result = normalised(text, language)
    assert result == " ".join(result.split())
    assert not set(result) & set(';/[]"{}()=+\\_-><@`,?!')


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall():
    def naive(predicted: str, right: str) -> float:
        said, expected = predicted.split(), right.split()
        shared = 0
        left = list(expected)
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        if shared == 0:
            return 0.0
        precision, recall = shared / len(said), shared / len(expected)
        return 2 * precision * recall / (precision + recall)

    texts = [" ".join(words) for n in (1, 2, 3) for words in itertools.product("xyz", repeat=n)]
    for predicted, right in itertools.product(texts, texts):
        assert token_f1(predicted, right) == pytest.approx(naive(predicted, right))


@pytest.mark.parametrize(("predicted", "right", "score"), [("", "", 1), ("", "cat", 0), ("the", "a", 1)])
def test_token_f1_of_answers_without_words(predicted, right, score):
    assert token_f1(predicted, right) == score


@pytest.mark.parametrize(("equal", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_k_equal_answers_of_ten(equal, score):
    answers = ["cat"] * equal + [f"other {number}" for number in range(10 - equal)]
    assert vqa_accuracy("The cat", answers) == pytest.approx(score)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "cow"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_mean_over_the_sets_that_leave_one_person_out(answers):
    subsets = [answers[:out] + answers[out + 1 :] for out in range(10)]
    naive = np.mean([min(subset.count("cat") / 3, 1) for subset in subsets])
    assert vqa_accuracy("cat", answers) == pytest.approx(naive)


def test_vqa_accuracy_of_another_number_of_answers_is_refused():
    with pytest.raises(UserError, match="needs 10 answers a question, not 3"):
        vqa_accuracy("cat", ["cat"] * 3)


def test_wups_is_refused_with_the_reason():
    with pytest.raises(UserError, match="English taxonomy.*use token_f1"):
        check_answer_metric("WUPS@0.9")
    with pytest.raises(UserError, match="unknown metric of answers 'bleu'; choose exact_match, token_f1"):
        check_answer_metric("bleu")
    check_answer_metric("exact_match")


def test_the_scores_of_groups_make_up_the_mean():
    rng = np.random.default_rng(0)
    said, right = (rng.choice(["red car", "red", "car"], 50).tolist() for _ in range(2))
    groups = rng.choice(["colour", "object"], 50).tolist()
    scores = row_scores(said, right, answers=[[answer] * 10 for answer in right])
    by_group, total = scores_by(scores, groups), mean_scores(scores)
    assert sum(group["rows"] for group in by_group.values()) == 50
    for metric, value in total.items():
        assert sum(g["rows"] * g[metric] for g in by_group.values()) / 50 == pytest.approx(value)
    chosen = [s == r for s, r, group in zip(said, right, groups, strict=True) if group == "colour"]
    assert by_group["colour"]["exact_match"] == pytest.approx(np.mean(chosen))
    assert total["vqa_accuracy"] == pytest.approx(total["exact_match"])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("Yes", "yes/no"), ("không", "yes/no"), ("two", "number"), ("2", "number"), ("3.5", "number"),
     ("hai", "number"), ("red", "other"), ("hai con mèo", "other")],
)  # fmt: skip
def test_answers_have_the_types_of_vqa_v2(answer, kind):
    assert answer_type(answer) == kind


# ---- baselines


def test_the_majority_answer_is_the_most_frequent_one_and_ties_are_in_order():
    assert majority_answer(["b", "a", "b"]) == "b"
    assert majority_answer(["b", "a"]) == "a"
    with pytest.raises(UserError, match="no training answer"):
        majority_answer([])


def test_a_question_only_classifier_learns_what_words_give_away():
    questions = ["what colour is it", "how many are there"] * 20
    answers = ["red", "two"] * 15 + ["blue", "three"] * 5
    answer = question_only(questions, answers)
    assert answer(["what COLOUR?", "how many?"]) == ["red", "two"]


def test_a_question_only_classifier_of_one_answer_or_no_words_gives_the_majority():
    assert question_only(["a", "b"], ["yes", "yes"])(["c"]) == ["yes"]
    assert question_only(["?", "!", "?"], ["no", "yes", "no"])(["what"]) == ["no"]


def test_questions_of_easy_vqa_give_much_away_without_a_picture():
    """Their words alone reach 66 %, near what the best answer to each question would."""
    data = load_data("easy_vqa")
    train, test = ((rows["question"][:], rows["answer"][:]) for rows in (data.train, data.test))
    found = baseline_scores(train, test)
    most = max(Counter(train[1]), key=Counter(train[1]).get)
    assert found["majority"]["exact_match"] == pytest.approx(test[1].count(most) / len(test[1]))
    best = {
        q: majority_answer([a for other, a in zip(*train, strict=True) if other == q]) for q in set(train[0])
    }
    ceiling = np.mean([best[q] == a for q, a in zip(*test, strict=True)])
    assert 0.6 < found["question_only"]["exact_match"] <= ceiling + 0.01


@pytest.mark.parametrize("language", ["vi", "en"])
def test_questions_about_scenes_do_not_give_their_answer_away(language):
    """Guessing within the type gives 16 %: one of 40 objects, 4 numbers, 8 colours, 4 places."""
    data = load_data("emoji_vqa", language=language)
    train, test = ((rows["question"][:], rows["answer"][:]) for rows in (data.train, data.test))
    found = baseline_scores(train, test, language=language)["question_only"]["exact_match"]
    share = np.bincount(data.labels("test"), minlength=4) / len(data.test)
    chance = float(share @ np.array([1 / 40, 1 / 4, 1 / 8, 1 / 4]))
    assert found == pytest.approx(chance, abs=0.03)

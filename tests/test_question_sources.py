"""Claims about the sources of questions that ship: easy-VQA and the scenes of emoji."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from federated.data.dataset import load_data
from federated.data.partition import partition
from federated.data.row_reader import TaskReader
from federated.data.sources import embedded
from federated.data.sources.emoji_scenes import Scene, draw_scene, questions_about
from federated.data.sources.form import FederatedData
from federated.data.sources.scene_vocabulary import COLOURS, KINDS, NUMBERS, OBJECTS, PLACES, TEMPLATES, asked
from federated.data.splits import column_values
from models.errors import UserError

LANGUAGES = ("vi", "en")


def picture_hashes(rows) -> list[str]:
    """The hash of each row's picture."""
    cells = rows.data.column("image").combine_chunks().field("bytes").to_pylist()
    return [hashlib.sha256(cell).hexdigest() for cell in cells]


@pytest.fixture(scope="module")
def easy() -> FederatedData:
    return load_data("easy_vqa")


@pytest.fixture(scope="module")
def scenes() -> FederatedData:
    options = {"language": "both", "clients_per_vendor": 2}
    return load_data("emoji_vqa", num_train_pictures=400, num_test_pictures=100, **options)


def test_easy_vqa_has_its_authors_sizes_answers_and_split(easy):
    assert (len(easy.train), len(easy.test)) == (38575, 9673)
    assert [len(set(column_values(rows, "picture"))) for rows in (easy.train, easy.test)] == [4000, 1000]
    answers = Counter(easy.train["answer"][:])
    assert len(answers) == 13
    assert set(easy.test["answer"][:]) == set(answers)
    assert (answers["yes"], answers["no"]) == (14229, 14178)  # the package's README: 28,407 yes/no questions
    assert easy.drawn == ()
    row = easy.train[0]
    assert (row["question"], row["answer"], row["picture"]) == ("what is the blue shape?", "rectangle", 0)
    assert (row["image"].size, row["image"].mode) == ((64, 64), "RGB")


def test_the_types_of_easy_vqa_say_what_is_asked_for(easy):
    kinds: dict[str, set[str]] = {}
    for answer, number in zip(easy.test["answer"][:], easy.labels("test").tolist(), strict=True):
        kinds.setdefault(easy.class_names[number], set()).add(answer)
    assert kinds["yes/no"] == {"yes", "no"}
    assert kinds["shape"] == {"circle", "rectangle", "triangle"}
    assert kinds["colour"] == {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}


def test_a_validation_split_of_questions_shares_no_picture_with_train():
    data = load_data("emoji_vqa", num_train_pictures=100, num_test_pictures=10, validation_fraction=0.2)
    train, validation = (set(column_values(data.split(name), "picture")) for name in ("train", "validation"))
    assert len(train | validation) == 100
    assert not train & validation
    assert len(validation) == 20


def test_dirichlet_partitions_questions_by_their_type(easy):
    split = partition(
        easy.test, name="dirichlet", num_clients=5, seed=0, label_column=easy.label_column, alpha=0.1
    )
    shares = [np.bincount(easy.labels("test")[rows], minlength=3) / len(rows) for rows in split.indices]
    assert max(share.max() for share in shares) > 0.9


def test_scenes_are_the_same_for_a_seed_and_others_for_another():
    small = {"num_train_pictures": 12, "num_test_pictures": 12}
    first, again = (load_data("emoji_vqa", seed=seed, **small) for seed in (0, 7))
    other = load_data("emoji_vqa", scene_seed=1, **small)
    for split in ("train", "test"):
        assert first.split(split).data.table.equals(again.split(split).data.table)
        assert not set(picture_hashes(first.split(split))) & set(picture_hashes(other.split(split)))


def test_more_training_scenes_leave_the_test_scenes_as_they_are():
    few, many = (
        load_data("emoji_vqa", num_train_pictures=number, num_test_pictures=12).test for number in (8, 40)
    )
    assert few.data.table.equals(many.data.table)


def test_no_scene_is_in_two_splits_or_of_two_clients(scenes):
    train, test = picture_hashes(scenes.train), picture_hashes(scenes.test)
    assert not set(train) & set(test)
    assert len(set(train)) == 400
    assert len(set(test)) == 100
    owners: dict[str, set[str]] = {}
    for picture, client in zip(train, column_values(scenes.train, scenes.domain_column), strict=True):
        owners.setdefault(picture, set()).add(client)
    assert {len(clients) for clients in owners.values()} == {1}


def test_natural_clients_of_scenes_share_no_picture(scenes):
    split = partition(
        scenes.train, name="natural", num_clients=8, seed=0, label_column="label", domain_column="client"
    )
    pictures = column_values(scenes.train, "picture")
    held = [set(pictures[rows]) for rows in split.indices]
    assert sum(map(len, held)) == len(set.union(*held)) == 400


def test_scenes_are_drawn_by_every_vendor_and_by_the_test_vendor_that_is_named():
    data = load_data(
        "emoji_vqa", vendors=["noto"], test_vendors=["openmoji"], num_train_pictures=3, num_test_pictures=3
    )
    assert set(data.train["client"][:]) == {"noto-0"}
    assert set(data.test["client"][:]) == {"openmoji-0"}


def brute_force_answer(scene: Scene, kind: str, question: str, language: str) -> str:
    """Answer a question by trying what it could be about."""
    for thing, item in enumerate(OBJECTS):
        for place in range(4):
            if question not in [asked(text, item, language, place) for text in TEMPLATES[language][kind]]:
                continue
            if kind == "object":
                return OBJECTS[scene.objects[place]].name(language)
            cells = [cell for cell in range(4) if scene.objects[cell] == thing]
            if kind == "number":
                return NUMBERS[language][len(cells) - 1]
            (cell,) = cells
            return COLOURS[scene.colours[cell]][1][language] if kind == "colour" else PLACES[language][cell]
    raise AssertionError(question)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answers_about_scenes_are_right(language):
    rng = np.random.default_rng(3)
    kinds = Counter()
    for _ in range(60):
        scene = draw_scene("noto", rng)
        for kind, question, answer in questions_about(scene, language, rng):
            assert answer == brute_force_answer(scene, kind, question, language)
            kinds[kind] += 1
    assert set(kinds) == set(KINDS)


def test_answers_about_scenes_are_balanced_within_their_type():
    """Each answer of a type is as frequent as the others, within four standard deviations."""
    rng, found = np.random.default_rng(0), {kind: Counter() for kind in KINDS}
    for _ in range(4000):
        for kind, _, answer in questions_about(draw_scene("noto", rng), "en", rng):
            found[kind][answer] += 1
    num_answers = {"object": len(OBJECTS), "number": 4, "colour": len(COLOURS), "location": 4}
    for kind, counts in found.items():
        assert len(counts) == num_answers[kind]
        expected = counts.total() / num_answers[kind]
        assert max(abs(count - expected) for count in counts.values()) < 4 * expected**0.5


def test_every_object_is_a_training_concept_that_each_vendor_drew():
    known = {concept.code_points: concept for concept in embedded.concepts()}
    for thing in OBJECTS:
        assert not known[thing.code_points].held_out
        assert not known[thing.code_points].missing
    assert len({thing.code_points for thing in OBJECTS}) == len(OBJECTS) == 40
    for language in LANGUAGES:
        assert len({thing.name(language) for thing in OBJECTS}) == 40


def test_the_square_behind_an_object_has_the_colour_that_is_answered():
    data = load_data("emoji_vqa", language="en", num_train_pictures=8, num_test_pictures=1)
    values = {name["en"]: value for value, name in COLOURS}
    for row in data.train:
        if data.class_names[row["label"]] == "colour":
            pixels = np.asarray(row["image"]).reshape(-1, 3)
            assert (pixels == values[row["answer"]]).all(1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "de"}, "data.options.language"),
        ({"vendors": ["acme"]}, "unknown vendor"),
        ({"num_test_pictures": 0}, "at least 1"),
        ({"num_train_pictures": 3}, "do not reach"),
    ],
)
def test_impossible_scenes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        load_data("emoji_vqa", **options)


def test_a_task_is_given_pictures_questions_and_answers_as_they_are(scenes):
    reader = TaskReader(scenes, ("image", "question", "answer", "label"), dict)
    batch = reader.batch("test", np.array([0, 3]))
    assert [image.size for image in batch["image"]] == [(64, 64), (64, 64)]
    assert batch["question"] == [scenes.test[row]["question"] for row in (0, 3)]
    assert batch["answer"] == [scenes.test[row]["answer"] for row in (0, 3)]
    assert batch["label"] == scenes.labels("test")[[0, 3]].tolist()

"""Claims about loading data: sources that ship with the package, subsets, validation splits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from federated.data.dataset import SOURCES, load_data
from federated.data.sources.form import split_off
from federated.data.splits import column_values
from models.errors import UserError


def image_hashes(dataset, image_column: str = "image") -> list[str]:
    return [hashlib.sha256(np.asarray(image).tobytes()).hexdigest() for image in dataset[image_column]]


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", validation_fraction=0.1)


def test_digits_are_all_1797_real_images_in_disjoint_splits(digits):
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    hashes = [set(image_hashes(split)) for split in (digits.train, digits.validation, digits.test)]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 1797  # no two digits are equal in pixels
    assert digits.class_names == tuple("0123456789")
    assert digits.train[0]["image"].size == (8, 8)


def test_splits_keep_the_share_of_each_class(digits):
    whole = np.concatenate([digits.labels(split) for split in ("train", "validation", "test")])
    shares = np.bincount(whole) / len(whole)
    for split in ("train", "validation", "test"):
        labels = digits.labels(split)
        assert np.abs(np.bincount(labels) - shares * len(labels)).max() < 2


def test_the_seed_decides_every_choice():
    def chosen(seed: int) -> list[list[str]]:
        data = load_data("digits", seed=seed, validation_fraction=0.1, max_train_samples=50)
        return [image_hashes(split) for split in (data.train, data.validation, data.test)]

    assert chosen(0) == chosen(0)
    assert all(first != other for first, other in zip(chosen(0), chosen(1), strict=True))


def test_limits_give_exact_stratified_subsets():
    data = load_data(
        "digits",
        validation_fraction=0.2,
        max_train_samples=100,
        max_validation_samples=30,
        max_test_samples=20,
    )
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 30, 20)
    assert np.abs(np.bincount(data.labels(), minlength=10) - 10).max() <= 1
    assert set(data.labels("test")) == set(range(10))


def test_a_limit_on_train_leaves_validation_and_test_as_they_were():
    whole = load_data("digits", validation_fraction=0.1)
    cut = load_data("digits", validation_fraction=0.1, max_train_samples=100)
    assert image_hashes(whole.validation) == image_hashes(cut.validation)
    assert image_hashes(whole.test) == image_hashes(cut.test)
    assert set(image_hashes(cut.train)) < set(image_hashes(whole.train))


def test_fashion_mnist_has_its_own_validation_split():
    data = load_data("fashion_mnist")
    assert len(data.class_names) == 10
    assert data.validation is not None
    untouched = load_data("fashion_mnist", validation_fraction=0.3)
    assert len(untouched.train) == len(data.train)
    assert set(data.labels()) == set(range(10))


def test_emoji_validation_shares_no_concept_with_train_or_test():
    data = load_data("emoji", validation_fraction=0.15)
    train, validation, test = (
        set(column_values(data.split(split), "concept").tolist()) for split in ("train", "validation", "test")
    )
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)
    assert 0.1 < len(data.validation) / (len(data.train) + len(data.validation)) < 0.2
    assert data.domain_column == "vendor"
    assert data.caption_column == "caption"


def test_emoji_options_choose_vendors_language_and_label():
    options = {"vendors": ["noto"], "test_vendors": ["openmoji"], "language": "vi", "label": "subgroup"}
    data = load_data("emoji", max_train_samples=200, **options)
    assert set(column_values(data.train, "vendor")) == {"noto"}
    assert set(column_values(data.test, "vendor")) == {"openmoji"}
    assert len(data.class_names) > 50
    with pytest.raises(UserError, match="no label 'colour'"):
        load_data("emoji", label="colour")


def test_without_a_validation_split_the_message_says_how_to_make_one():
    data = load_data("digits")
    assert data.validation is None
    with pytest.raises(UserError, match="validation_fraction"):
        data.split("validation")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("fashon_mnist", {}, "did you mean 'fashion_mnist'"),
        ("digits", {"path": "somewhere"}, "no option 'path'"),
        ("digits", {"test_fracton": 0.1}, "did you mean 'test_fraction'"),
        ("digits", {"test_fraction": 1.5}, "between 0 and 1"),
        ("digits", {"validation_fraction": 1.0}, "between 0 and 1"),
        ("digits", {"validation_fraction": 1e-6}, "cannot give up"),
        ("digits", {"max_train_samples": 0}, "at least 1"),
        ("imagefolder", {}, "needs the option 'path'"),
    ],
)
def test_wrong_options_are_named_with_the_remedy(source, options, message):
    with pytest.raises(UserError, match=message):
        load_data(source, **options)


def test_split_off_is_complete_and_keeps_order(digits):
    rest, held_out = split_off(digits.test, 0.3, np.random.default_rng(0), label_column="label")
    whole = image_hashes(digits.test)
    left, right = image_hashes(rest), image_hashes(held_out)
    assert sorted(left + right) == sorted(whole)
    assert [h for h in whole if h in set(left)] == left


def test_the_registry_holds_the_documented_sources():
    pictures = {"fashion_mnist", "emoji", "digits", "imagefolder", "csv", "hub"}
    assert set(SOURCES) == pictures | {"easy_vqa", "emoji_vqa", "vqa_csv"}

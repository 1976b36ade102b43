"""Claims about partitioning: who holds which rows."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner

from federated.data.partition import (
    PARTITIONERS,
    class_counts,
    hold_out,
    load_partition,
    partition,
    save_partition,
)
from federated.data.partitioners import ROW, iid
from federated.data.splits import split_rows, stratified_choice
from models.errors import UserError

NUM_ROWS = 1000
LABELS = np.repeat(np.arange(10), NUM_ROWS // 10)  # sorted by class, the hard case for an IID split
VENDORS = ["noto", "twemoji", "fluent", "openmoji"]
COMPLETE = [
    ("iid", {}, 7),
    ("dirichlet", {"alpha": 0.3}, 7),
    ("pathological", {"classes_per_client": 2}, 20),
    ("shard", {"shard_size": 30}, 7),
    ("shard", {"shards_per_client": 2}, 10),
    ("natural", {}, 4),
    ("natural", {}, 12),
    ("natural", {}, 2),
    ("exponential", {}, 5),
    ("linear", {}, 7),
    ("square", {}, 7),
]


def rows() -> Dataset:
    vendors = [VENDORS[number % 4] for number in range(NUM_ROWS)]
    return Dataset.from_dict({"label": LABELS, "vendor": vendors})


def split(name: str, num_clients: int = 10, seed: int = 0, **options):
    return partition(
        rows(),
        name=name,
        num_clients=num_clients,
        seed=seed,
        label_column="label",
        domain_column="vendor",
        **options,
    )


@pytest.mark.parametrize(("name", "options", "num_clients"), COMPLETE)
def test_every_row_has_exactly_one_client(name, options, num_clients):
    result = split(name, num_clients, **options)
    assert result.num_clients == num_clients
    assert np.array_equal(np.sort(np.concatenate(result.indices)), np.arange(NUM_ROWS))
    assert all(len(shard) and np.all(np.diff(shard) > 0) for shard in result.indices)
    assert {shard.dtype for shard in result.indices} == {np.dtype(np.int64)}


@pytest.mark.parametrize(("name", "options", "num_clients"), COMPLETE)
def test_same_seed_gives_the_same_split_and_another_seed_another(name, options, num_clients):
    first, again, other = (split(name, num_clients, seed, **options) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first.indices, again.indices))
    if name == "natural" and num_clients <= len(VENDORS):
        return  # whole domains: nothing is drawn
    assert not all(map(np.array_equal, first.indices, other.indices))


@pytest.mark.parametrize(("name", "options", "num_clients"), COMPLETE)
def test_global_random_state_is_neither_read_nor_changed(name, options, num_clients):
    states = []
    for seed in (1, 2):
        np.random.seed(seed)  # noqa: NPY002 -- the global state is what is tested
        random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
        states.append(split(name, num_clients, **options))
        assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
        assert before[1] == random.getstate()
        assert torch.equal(before[2], torch.get_rng_state())
    assert all(map(np.array_equal, states[0].indices, states[1].indices))


def test_iid_is_iid_though_the_data_is_sorted_by_class():
    counts = class_counts(split("iid"), LABELS, 10)
    assert (counts.sum(axis=1) == 100).all()
    assert (counts > 0).mean() > 0.95


def test_smaller_alpha_gives_more_uneven_classes():
    def mean_largest_share(alpha: float) -> float:
        counts = class_counts(split("dirichlet", alpha=alpha), LABELS, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert mean_largest_share(0.1) > mean_largest_share(1.0) > mean_largest_share(100.0)


def test_dirichlet_meets_min_samples():
    assert min(len(shard) for shard in split("dirichlet", alpha=0.3, min_samples=30).indices) >= 30


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"alpha": 1e-6, "min_samples": 50}, "raise alpha, lower min_samples"),  # possible, never drawn
        ({"alpha": 0.5, "min_samples": 101}, "set it between 1 and 100"),  # impossible by arithmetic
        ({"alpha": 0.5, "min_samples": 0}, "set it between"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": "high"}, r"partition\.options\.alpha.*high"),
    ],
)
def test_impossible_dirichlet_ends_with_the_remedy(options, remedy):
    with pytest.raises(UserError, match=remedy):
        split("dirichlet", **options)


def test_pathological_clients_have_exactly_the_number_of_classes():
    counts = class_counts(split("pathological", 15, classes_per_client=3), LABELS, 10)
    assert ((counts > 0).sum(axis=1) == 3).all()


def test_rows_left_over_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        result = split("pathological", 2, classes_per_client=2)
    num_left = NUM_ROWS - sum(len(rows) for rows in result.indices)
    assert num_left > 0
    assert f"leaves {num_left} of {NUM_ROWS}" in caplog.text


def test_natural_gives_each_domain_its_own_clients():
    for num_clients, per_domain in ((4, 1), (12, 3)):
        result = split("natural", num_clients)
        for client, shard in enumerate(result.indices):
            assert {sorted(VENDORS)[client // per_domain]} == {VENDORS[row % 4] for row in shard}
        sizes = [len(shard) for shard in result.indices]
        assert max(sizes) - min(sizes) <= 1


def test_natural_with_a_divisor_gives_clients_whole_domains():
    vendors_of = [{VENDORS[row % 4] for row in shard} for shard in split("natural", 2).indices]
    assert vendors_of == [{"fluent", "noto"}, {"openmoji", "twemoji"}]


@pytest.mark.parametrize(
    ("name", "num_clients", "options", "message"),
    [
        ("iid", NUM_ROWS + 1, {}, "cannot share 1000"),
        ("iid", 0, {}, "at least 1"),
        ("dirichlett", 5, {}, "did you mean 'dirichlet'"),
        ("dirichlet", 5, {"aplha": 1.0}, "did you mean 'alpha'"),
        ("natural", 3, {}, "4 domains"),
        ("exponential", 100, {}, "exponential"),
        ("shard", 600, {"shards_per_client": 2}, "at least 1200"),
        ("shard", 5, {"shards_per_client": 2, "shard_size": 3}, "not both"),
        ("shard", 5, {"shard_size": 900}, "shard"),
        ("pathological", 5, {"classes_per_client": 11}, "classes"),
        ("pathological", 5, {"classes_per_client": 0}, "at least 1"),
        ("pathological", 5, {"class_assignment": "odd"}, "odd"),
    ],
)
def test_a_split_that_cannot_be_had_names_the_remedy(name, num_clients, options, message):
    with pytest.raises(UserError, match=message):
        split(name, num_clients, **options)


def test_partitioners_that_need_a_column_say_so():
    for name in ("dirichlet", "pathological", "shard", "natural"):
        with pytest.raises(UserError, match="needs a (label|domain)"):
            partition(rows(), name=name, num_clients=4, seed=0, label_column=None)
    with pytest.raises(UserError, match="no column 'klass'"):
        partition(rows(), name="iid", num_clients=4, seed=0, label_column="klass")


def test_captions_without_labels_can_be_split_iid():
    captions = Dataset.from_dict({"caption": ["a", "b", "c", "d", "e"]})
    result = partition(captions, name="iid", num_clients=5, seed=0, label_column=None)
    assert [len(shard) for shard in result.indices] == [1] * 5


def test_a_saved_partition_comes_back_equal(tmp_path):
    path = tmp_path / "partition.json"
    names = [f"class {number}" for number in range(10)]
    for name, options, num_clients in COMPLETE:
        result = split(name, num_clients, **options)
        save_partition(result, path, LABELS, names)
        loaded = load_partition(path)
        assert all(map(np.array_equal, result.indices, loaded.indices))
        assert (loaded.name, loaded.seed, loaded.options) == (result.name, result.seed, result.options)
    assert [file.name for file in tmp_path.iterdir()] == ["partition.json"]


def test_the_file_has_the_documented_keys(tmp_path):
    path = tmp_path / "partition.json"
    result = split("dirichlet", 5, alpha=1.0)
    save_partition(result, path, LABELS, [str(number) for number in range(10)])
    document = json.loads(path.read_text())
    assert document["partitioner"] == "dirichlet"
    assert document["num_clients"] == len(document["clients"]) == 5
    assert len(document["class_names"]) == 10
    for client in document["clients"]:
        assert client["num_examples"] == len(client["indices"]) == sum(client["class_counts"])
        naive = [int(np.sum(LABELS[client["indices"]] == number)) for number in range(10)]
        assert client["class_counts"] == naive
    save_partition(result, path)
    assert json.loads(path.read_text())["clients"][0]["class_counts"] == []


def test_a_bad_partition_file_is_named(tmp_path):
    path = tmp_path / "partition.json"
    with pytest.raises(UserError, match="does not exist"):
        load_partition(path)
    for text in ("{", "{}", '{"clients": [{"client_id": 0}]}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"partition\.json is no partition file"):
            load_partition(path)


def test_hold_out_is_disjoint_complete_stratified_and_leaves_training_rows():
    rng = np.random.default_rng(0)
    shard = np.sort(rng.choice(NUM_ROWS, 400, replace=False))
    train, test = hold_out(shard, 0.25, rng, LABELS)
    assert np.array_equal(np.sort(np.concatenate([train, test])), shard)
    assert len(test) == 100
    for number in range(10):
        in_class = np.sum(LABELS[shard] == number)
        assert abs(np.sum(LABELS[test] == number) - in_class / 4) < 1


@pytest.mark.parametrize(
    ("size", "fraction", "num_test"), [(1, 0.9, 0), (2, 0.01, 1), (2, 0.99, 1), (5, 0, 0)]
)
def test_hold_out_of_small_shards_never_empties_training(size, fraction, num_test):
    train, test = hold_out(np.arange(size), fraction, np.random.default_rng(0), LABELS)
    assert (len(train), len(test)) == (size - num_test, num_test)


def test_hold_out_is_a_function_of_its_generator():
    first, again, other = (hold_out(np.arange(50), 0.2, np.random.default_rng(s))[1] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_hold_out_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="below 1"):
        hold_out(np.arange(5), 1.0, np.random.default_rng(0))
    with pytest.raises(UserError, match="without samples"):
        hold_out([], 0.1, np.random.default_rng(0))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 20])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_hold_out_keeps_groups_whole_and_both_sides_filled(num_groups, fraction):
    groups = np.arange(NUM_ROWS) % num_groups
    shard = np.arange(0, 60)
    train, test = hold_out(shard, fraction, np.random.default_rng(0), LABELS, groups=groups)
    assert set(groups[train]).isdisjoint(groups[test])
    assert np.array_equal(np.sort(np.concatenate([train, test])), shard)
    assert len(train) > 0
    assert (len(test) > 0) == (num_groups > 1)


@pytest.mark.parametrize("seed", range(5))
def test_stratified_choice_draws_the_exact_number_and_keeps_shares(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(6, size=300, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    for num_samples in (0, 1, 5, 6, 37, 299, 300):
        chosen = stratified_choice(labels, num_samples, rng)
        assert len(np.unique(chosen)) == num_samples
        if num_samples >= 37:
            shares = np.bincount(labels, minlength=6) * num_samples / 300
            assert np.abs(np.bincount(labels[chosen], minlength=6) - shares).max() < 2
        if num_samples >= 6:
            assert set(labels[chosen]) == set(labels)  # rare classes are covered
    with pytest.raises(UserError, match="cannot draw 301 of 300"):
        stratified_choice(labels, 301, rng)


def test_groups_are_never_divided():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, size=200)
    kept, held_out = split_rows(groups % 4, 50, rng, groups=groups)
    assert set(groups[kept]).isdisjoint(groups[held_out])
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(200))
    assert 30 <= len(held_out) <= 70


def test_every_registered_partitioner_is_tested_for_completeness():
    assert {name for name, _, _ in COMPLETE} == set(PARTITIONERS)


@pytest.mark.parametrize(("num_rows", "num_clients"), [(10, 3), (12, 4), (7, 7), (101, 10)])
def test_iid_blocks_are_those_of_flowers_partitioner(num_rows: int, num_clients: int) -> None:
    light = Dataset.from_dict({ROW: list(range(num_rows))[::-1]})
    flower = IidPartitioner(num_clients)
    flower.dataset = light
    ours = iid(light, num_clients, np.random.default_rng(0))
    for k, rows in enumerate(ours):
        assert rows.tolist() == list(flower.load_partition(k)[ROW])

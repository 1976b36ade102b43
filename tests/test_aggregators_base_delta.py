"""What is merged into a base weight, and what a client that missed rounds receives for it."""

from __future__ import annotations

import pytest
import torch
from aggregator_simulation import normal

import federated.rounds.base_weights
from federated.methods import NEVER
from federated.methods.base_delta import BaseDelta, split_updates, updates_to_state
from federated.methods.lowrank import LowRank
from federated.rounds.base_weights import BaseWeights
from models.errors import UserError

D_OUT, D_IN = 9, 14
PRETRAINED = normal(1, D_OUT, D_IN)


def term(server_round: int, columns: int = 1) -> LowRank:
    return LowRank(normal(100 + server_round, D_OUT, columns), normal(200 + server_round, columns, D_IN))


def after(num_rounds: int, columns: int = 1) -> BaseDelta:
    delta = BaseDelta()
    for server_round in range(1, num_rounds + 1):
        delta = delta.plus(server_round, term(server_round, columns))
    return delta


def naive_sum(version: int, columns: int = 1) -> torch.Tensor:
    return sum((term(t, columns).dense() for t in range(1, version + 1)), torch.zeros(D_OUT, D_IN))


def held_at(version: int, columns: int = 1) -> BaseDelta:
    """What a client keeps that has received every round up to this one."""
    return BaseDelta(dense=naive_sum(version, columns)) if version > 0 else BaseDelta()


@pytest.mark.parametrize("columns", [1, 3, 30])
@pytest.mark.parametrize("num_rounds", [1, 3, 5, 6, 12])
def test_whatever_a_client_held_it_ends_with_the_sum_of_all_rounds(num_rounds, columns):
    delta = after(num_rounds, columns)
    for version in range(NEVER, num_rounds + 1):
        held, update = held_at(version, columns), delta.since(version)
        after_update = held if update is None else held.received(update, version)
        assert torch.equal(after_update.total(), delta.total())  # bit for bit
    torch.testing.assert_close(delta.total(), naive_sum(num_rounds, columns))


@pytest.mark.parametrize("columns", [1, 3, 30])
def test_a_backlog_is_never_more_numbers_than_the_weight(columns):
    delta = after(12, columns)
    for version in range(NEVER, 12):
        update = delta.since(version)
        missed = min(12, 12 - version) * columns * (D_OUT + D_IN)
        assert update is not None
        assert update.num_values == min(missed, D_OUT * D_IN)
    assert delta.since(12) is None


def test_the_server_keeps_at_most_two_weights_and_the_newest_round():
    for columns in (1, 2, 3):
        delta = after(50, columns)
        assert delta.dense is not None
        assert sum(product.num_values for _, product in delta.terms) <= D_OUT * D_IN
    newest_is_large = after(4, 30)
    assert [at for at, _ in newest_is_large.terms] == [4]


def test_short_histories_stay_exact_factors():
    delta = after(5)
    assert delta.dense is None
    assert len(delta.terms) == 5


def test_terms_that_a_client_already_has_are_not_added_twice():
    """A server that never saw the client's last reply sends the rounds before it again."""
    delta = after(3)
    update = delta.since(1)
    assert update is not None
    assert torch.equal(held_at(1).received(update, 1).total(), naive_sum(3))
    assert torch.equal(held_at(2).received(update, 2).total(), naive_sum(3))
    assert torch.equal(held_at(3).received(update, 3).total(), naive_sum(3))


def test_twenty_small_merges_are_not_lost_in_float32():
    """In half precision they are: 29 % of such an update in fp16 and 85 % in bf16 (docs/aggregation.md)."""
    weight = normal(3, 64, 48, dtype=torch.float32)
    step = LowRank(normal(4, 64, 2, dtype=torch.float32) * 1e-3, normal(5, 2, 48, dtype=torch.float32) / 2)
    delta, merged = BaseDelta(), BaseDelta()
    for server_round in range(1, 21):
        delta = delta.plus(server_round, step)
        update = delta.since(server_round - 1)
        assert update is not None
        merged = merged.received(update, server_round - 1)
    held = weight + merged.total()
    wanted = 20 * step.left.double() @ step.right.double()
    assert float((held.double() - weight.double() - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_is_refused(dtype, monkeypatch):
    monkeypatch.setattr(
        federated.rounds.base_weights, "base_weights", lambda model: {"m": PRETRAINED.to(dtype)}
    )
    base = BaseWeights(torch.nn.Module())
    with pytest.raises(UserError, match="float32"):
        base.hold({"m": after(1)})


@pytest.mark.parametrize("num_rounds", [3, 12])
def test_base_updates_survive_being_named_tensors(num_rounds):
    updates = {f"tower.{i}.q_proj": after(num_rounds, i).since(0) for i in (1, 2)}
    others = {"head.bias": torch.zeros(2)}
    values, back = split_updates({**others, **updates_to_state(updates)})
    assert values.keys() == others.keys()
    assert back.keys() == updates.keys()
    for module, update in updates.items():
        assert torch.equal(
            BaseDelta().received(back[module], 0).total(), BaseDelta().received(update, 0).total()
        )
        assert back[module].num_values == update.num_values


def test_the_sum_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing has been merged"):
        BaseDelta().total()

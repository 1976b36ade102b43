"""One bad reply is refused and named; the rest of the round goes on."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from aggregator_simulation import MIXED_RANKS, Federation, a_name, b_name, federation, send, train

from federated.methods import (
    Limits,
    Update,
    check_ranks,
    check_updates,
    fed_sb,
    fedavg,
    fedex,
    ffa,
    flexlora,
    flora,
    run_round,
)
from models.errors import UserError
from models.state import flat

ANYTHING = Limits(update_ratio=1e100, examples_ratio=1e100)
A, B = a_name("tower.first"), b_name("tower.first")


def round_of(fed: Federation) -> list[Update]:
    for client in fed.clients:
        send(fed, client)
    return [train(fed, client, 2) for client in fed.clients]


def changed(update: Update, **values: torch.Tensor) -> Update:
    return replace(update, state={**update.state, **values})


def poisoned(value: float):
    def spoil(update: Update) -> Update:
        tensor = update.state[B].clone()
        tensor[2, 1] = value
        return changed(update, **{B: tensor})

    return spoil


def without(update: Update) -> Update:
    return replace(update, state={name: t for name, t in update.state.items() if name != B})


FAULTS = {
    "nan": (poisoned(float("nan")), f"{B} is not finite"),
    "infinite": (poisoned(float("inf")), f"{B} is not finite"),
    "no examples": (lambda u: replace(u, num_examples=0), "has 0 training examples"),
    "negative examples": (lambda u: replace(u, num_examples=-3), "has -3 training examples"),
    "missing": (without, f"lacks {B}"),
    "unknown": (lambda u: changed(u, surprise=torch.zeros(1)), "has unknown surprise"),
    "transposed": (lambda u: changed(u, **{B: u.state[B].T}), f"{B} has shape (4, 7) instead of (7, 4)"),
    "narrow": (lambda u: changed(u, **{A: u.state[A][:2]}), f"{A} has shape (2, 12) instead of (4, 12)"),
    "dtype": (
        lambda u: changed(u, **{A: u.state[A].half()}),
        "is torch.float16 instead of torch.float64",
    ),
    "rank": (lambda u: replace(u, rank=2), "has rank 2, the server 4; fedavg needs one rank"),
    "scaling": (
        lambda u: replace(u, scaling={**u.scaling, "tower.first": 3.0}),
        "has scaling 3.0 on tower.first",
    ),
    "no scaling": (lambda u: replace(u, scaling={}), "lacks the scaling of tower.first"),
}


def _laid(update: Update, laid) -> Update:
    """Lay an update's values out; a flat one has one dtype."""
    values = update.state
    if laid is flat and len({tensor.dtype for tensor in values.values()}) > 1:
        values = {name: tensor.half() for name, tensor in values.items()}
    return replace(update, state=laid(values))


@pytest.mark.parametrize("laid", [dict, flat])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_update_is_refused_by_name_and_the_rest_goes_on(fault, laid, caplog):
    spoil, reason = FAULTS[fault]
    fed = federation(fedavg())
    updates = [replace(u, state=laid(u.state)) for u in round_of(fed)]
    spoilt = [_laid(spoil(u), laid) if u.client_id == 2 else u for u in updates]
    with caplog.at_level(logging.WARNING):
        server, accepted, refused = run_round(fed.aggregator, fed.server, spoilt)
    assert [u.client_id for u in accepted] == [0, 1, 3, 4]
    assert [client_id for client_id, _ in refused] == [2]
    assert reason in refused[0][1]
    assert "client 2 refused" in caplog.text
    alone = fed.aggregator.apply(fed.server, [u for u in updates if u.client_id != 2])
    assert all(torch.equal(server.state[name], alone.state[name]) for name in server.state)
    assert server.server_round == 1


def test_a_round_without_usable_updates_changes_nothing_but_the_round(caplog):
    fed = federation(fedex())
    bad = [poisoned(float("nan"))(update) for update in round_of(fed)]
    with caplog.at_level(logging.WARNING):
        server, accepted, refused = run_round(fed.aggregator, fed.server, bad)
    assert accepted == []
    assert [client_id for client_id, _ in refused] == [0, 1, 2, 3, 4]
    assert "no usable update" in caplog.text
    assert server.server_round == fed.server.server_round + 1
    assert server.state is fed.server.state
    assert server.base_delta is fed.server.base_delta


def test_clients_recover_from_a_round_that_was_lost():
    """Their own training of the lost round is overwritten, although the server's values did not change."""
    fed = federation(ffa())
    updates = round_of(fed)
    fed.server, _, _ = run_round(fed.aggregator, fed.server, [replace(u, num_examples=0) for u in updates])
    send(fed, fed.clients[0])
    assert torch.equal(fed.clients[0].held[B], fed.server.state[B])
    assert not torch.equal(updates[0].state[B], fed.server.state[B])


def test_large_values_whose_sum_overflows_are_named_by_their_size():
    fed = federation(fedavg(), dtype=torch.float32)
    updates = round_of(fed)
    large = changed(updates[1], **{B: torch.full_like(updates[1].state[B], 3e38)})
    assert check_updates(fed.server, [large], fed.aggregator, ANYTHING)[1] == []
    ((client_id, reason),) = check_updates(fed.server, [large], fed.aggregator)[1]
    assert client_id == 1
    assert "what it sent has norm 1.59e+39" in reason  # sqrt(28) * 3e38, which float32 cannot hold


def test_the_first_of_several_faults_is_named():
    fed = federation(fedavg())
    (update, *_) = round_of(fed)
    both = poisoned(float("nan"))(changed(update, **{a_name("tower.second"): torch.zeros(2, 2).double()}))
    assert check_updates(fed.server, [both])[1] == [(0, f"{B} is not finite")]
    both = changed(both, **{A: update.state[A][:1]})
    assert check_updates(fed.server, [both])[1] == [(0, f"{A} has shape (1, 12) instead of (4, 12)")]


def test_the_same_reply_twice_counts_once():
    fed = federation(fedavg())
    updates = round_of(fed)
    accepted, refused = check_updates(fed.server, [*updates, updates[3]], fed.aggregator)
    assert [u.client_id for u in accepted] == [0, 1, 2, 3, 4]
    assert refused == [(3, "sent its update again; it counts once")]


def test_two_different_replies_of_one_client_are_both_refused_in_any_order():
    fed = federation(fedavg())
    updates = round_of(fed)
    other = changed(updates[3], **{B: updates[3].state[B] + 1})
    for order in ([*updates, other], [other, *updates]):
        accepted, refused = check_updates(fed.server, order, fed.aggregator)
        assert [u.client_id for u in accepted] == [0, 1, 2, 4]
        assert refused == [(3, "sent 2 different updates in one round")]


def test_what_an_aggregator_does_not_send_up_is_unknown():
    fed = federation(ffa())
    (first, *_) = round_of(fed)
    whole = changed(first, **{A: fed.server.state[A]})
    assert check_updates(fed.server, [first], fed.aggregator)[1] == []
    assert f"unknown {A}" in check_updates(fed.server, [whole], fed.aggregator)[1][0][1]
    fed = federation(fed_sb())
    assert check_updates(fed.server, round_of(fed), fed.aggregator)[1] == []


def test_without_an_aggregator_everything_must_have_travelled():
    fed = federation(fedavg())
    updates = round_of(fed)
    assert [u.client_id for u in check_updates(fed.server, updates)[0]] == [0, 1, 2, 3, 4]
    assert "lacks" in check_updates(fed.server, [without(updates[0])])[1][0][1]


@pytest.mark.parametrize("rule", [flora, flexlora])
def test_mixed_ranks_pass_where_they_are_allowed_and_must_match_the_shapes(rule):
    fed = federation(rule(), ranks=MIXED_RANKS)
    updates = round_of(fed)
    accepted, refused = check_updates(fed.server, updates, fed.aggregator)
    assert (len(accepted), refused) == (5, [])
    wrong = [replace(updates[1], rank=3), replace(updates[2], rank=9), replace(updates[4], rank=0)]
    reasons = dict(check_updates(fed.server, wrong, fed.aggregator)[1])
    assert "has shape (1, 12) instead of (3, 12)" in reasons[1]
    assert "has rank 9, outside 1 to 4" in reasons[2]
    assert "has rank 0, outside 1 to 4" in reasons[4]


def test_client_ranks_are_refused_before_the_first_round_by_client_and_rank():
    rule = fedavg()
    server = federation(rule).server
    check_ranks(rule, server, {0: 4, 1: 4})
    with pytest.raises(
        UserError, match="fedavg needs one rank .* server has 4, but client 1 has 2, client 5 has 8"
    ):
        check_ranks(rule, server, {0: 4, 5: 8, 1: 2})
    check_ranks(flora(), server, {0: 4, 1: 1})
    with pytest.raises(UserError, match="client 5 has 8, outside 1 to 4"):
        check_ranks(flora(), server, {0: 4, 5: 8, 1: 2})


def test_applying_nothing_is_an_error_that_says_what_to_do():
    fed = federation(fedavg())
    with pytest.raises(ValueError, match="skip_round"):
        fed.aggregator.apply(fed.server, [])


# ---- finite, and still nothing that can be meant


def scaled(update: Update, factor: float) -> Update:
    return replace(update, state={name: tensor * factor for name, tensor in update.state.items()})


@pytest.mark.parametrize("num_clients", [1, 2, 3, 5])
@pytest.mark.parametrize("rule", [fedavg, fedex, flexlora, flora, ffa])
def test_an_absurd_update_is_named_and_the_others_are_used(rule, num_clients):
    """In a cohort of one the global state is all there is to compare with."""
    fed = federation(rule(), dtype=torch.float32)
    updates = round_of(fed)[:num_clients]
    liar = updates[-1].client_id
    spoilt = [*updates[:-1], changed(updates[-1], **{B: torch.full_like(updates[-1].state[B], 1e30)})]
    server, accepted, refused = run_round(fed.aggregator, fed.server, spoilt)
    assert [update.client_id for update in accepted] == list(range(num_clients - 1))
    assert [client_id for client_id, _ in refused] == [liar]
    assert "aggregation.max_update_ratio=100" in refused[0][1]
    if num_clients > 1:
        alone = fed.aggregator.apply(fed.server, updates[:-1])
        assert all(torch.equal(server.state[name], value) for name, value in alone.state.items())


def test_a_majority_that_lies_does_not_vouch_for_itself():
    fed = federation(fedavg())
    lies = [scaled(update, 1e30) for update in round_of(fed)]
    assert len(check_updates(fed.server, lies, fed.aggregator)[1]) == len(lies)


@pytest.mark.parametrize("num_clients", [2, 3, 5])
def test_an_absurd_weight_is_named_whatever_the_others_have(num_clients):
    fed = federation(fedavg())
    updates = [replace(u, num_examples=10 * (u.client_id + 1)) for u in round_of(fed)[:num_clients]]
    updates[0] = replace(updates[0], num_examples=10**12)
    accepted, refused = check_updates(fed.server, updates, fed.aggregator)
    assert [update.client_id for update in accepted] == list(range(1, num_clients))
    assert "has 1000000000000 training examples" in refused[0][1]


@pytest.mark.parametrize("num_clients", [1, 2, 3, 5])
@pytest.mark.parametrize("state", ["as usual", "zeros"])
def test_honest_clients_may_differ_by_orders_of_magnitude(num_clients, state):
    """Rows from 1 to 1,000,000; some have nothing left to learn while one moves its values by ten a value."""
    fed = federation(ffa() if state == "zeros" else fedavg())
    if state == "zeros":  # a new head
        fed.server = replace(fed.server, state={n: torch.zeros_like(t) for n, t in fed.server.state.items()})
    names = fed.aggregator.uplink(fed.server.state, 1)
    moved = {k: 10.0 if k == num_clients - 1 else 1e-9 * k for k in range(num_clients)}
    updates = [
        replace(
            update,
            state={name: fed.server.state[name] + moved[update.client_id] for name in names},
            num_examples=10**6 if update.client_id == 0 else 1 + update.client_id,
        )
        for update in round_of(fed)[:num_clients]
    ]
    assert check_updates(fed.server, updates, fed.aggregator)[1] == []


@pytest.mark.parametrize("rule", [fedavg, fedex, flexlora, flora])
def test_a_round_whose_aggregate_is_not_finite_leaves_the_server_as_it_was(rule, caplog):
    """Finite updates, whose products overflow: nothing that was refused may reach a client."""
    fed = federation(rule(), dtype=torch.float32)
    updates = round_of(fed)
    updates[3] = scaled(updates[3], 1e25)
    with caplog.at_level(logging.WARNING):
        server, accepted, refused = run_round(fed.aggregator, fed.server, updates, ANYTHING)
    assert accepted == []
    assert server.state is fed.server.state
    assert server.base_delta is fed.server.base_delta
    assert server.server_round == 1
    assert [client_id for client_id, _ in refused] == [0, 1, 2, 3, 4]
    assert all("not finite" in reason and "that of client 3" in reason for _, reason in refused)
    assert "the global state stays as it was" in caplog.text

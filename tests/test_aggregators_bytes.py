"""The numbers that travel are those of the formulas in the docstrings of the rules."""

from __future__ import annotations

import pytest
from aggregator_simulation import MIXED_RANKS, NUM_EXAMPLES, RANK, SHAPES, federation, send, train

from federated.methods import NEVER, ClientProfile, aggregator_from_name, pack_downlink

HEAD = 3
P_A = sum(RANK * d_in for _, d_in in SHAPES.values())
P_B = sum(RANK * d_out for d_out, _ in SHAPES.values())
P = P_A + P_B
CORES = RANK * RANK * len(SHAPES)
M = len(NUM_EXAMPLES)


def smaller(columns: int) -> int:
    """min(q (d_in + d_out), d_in d_out) summed over modules."""
    return sum(min(columns * (d_out + d_in), d_out * d_in) for d_out, d_in in SHAPES.values())


# name, options; up; after round 1: down to a client that was there, down to a new client
EXPECTED = [
    ("fedavg", {}, P + HEAD, P + HEAD, P + HEAD),
    ("ffa", {}, P_B + HEAD, P_B + HEAD, P + HEAD),
    ("rolora", {}, P_B + HEAD, P_B + HEAD, P + HEAD),
    ("flora", {}, P + HEAD, smaller(M * RANK) + HEAD, smaller(M * RANK) + HEAD),
    ("fedex", {}, P + HEAD, P + HEAD + smaller((M - 1) * RANK), P + HEAD + smaller((M - 1) * RANK)),
    ("fedex", {"rank_cap": 1}, P + HEAD, P + HEAD + smaller(1), P + HEAD + smaller(1)),
    ("fedex", {"rank_cap": 0}, P + HEAD, P + HEAD, P + HEAD),
    ("flexlora", {}, P + HEAD, P + HEAD, P + HEAD),
    ("hetlora", {}, P + HEAD, P + HEAD, P + HEAD),
    ("fedsa", {}, P_A, P_A, P + HEAD),
    ("fedsa", {"private_head": False}, P_A + HEAD, P_A + HEAD, P + HEAD),
    ("lora_fair", {}, P + HEAD, P + HEAD, P + HEAD),
    ("fedsvd", {}, P_B + HEAD, P + HEAD, P + HEAD),
    ("fedsvd", {"period": 2}, P_B + HEAD, P_B + HEAD, P + HEAD),
    ("fed_sb", {}, CORES + HEAD, CORES + HEAD, P + CORES + HEAD),
    ("dual", {}, P + HEAD, P + HEAD, P + HEAD),
]


@pytest.mark.parametrize(("name", "options", "up", "known", "new"), EXPECTED)
def test_uplink_and_downlink_are_as_many_numbers_as_the_formulas_say(name, options, up, known, new):
    fed = federation(aggregator_from_name(name, options))
    for client in fed.clients:
        send(fed, client)
    updates = [train(fed, client, 1) for client in fed.clients]
    assert {sum(t.numel() for t in u.state.values()) for u in updates} == {up}
    fed.server = fed.aggregator.apply(fed.server, updates)
    for version, expected in ((0, known), (NEVER, new), (1, 0)):
        downlink = fed.aggregator.downlink(fed.server, ClientProfile(version=version))
        assert downlink.num_values == expected
        assert sum(t.numel() for t in pack_downlink(downlink)[0].values()) == expected


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_a_client_of_low_rank_sends_and_receives_its_own_rank_only(name):
    fed = federation(aggregator_from_name(name, {}), ranks=MIXED_RANKS)
    for client in fed.clients:
        downlink = fed.aggregator.downlink(fed.server, client.profile())
        send(fed, client)
        update = train(fed, client, 1)
        expected = P * client.rank // RANK + HEAD
        assert downlink.num_values == expected
        assert sum(tensor.numel() for tensor in update.state.values()) == expected


def test_rolora_sends_the_frozen_factor_to_a_client_that_missed_its_last_change():
    fed = federation(aggregator_from_name("rolora", {}))
    for cohort in ([0, 1], [1], [1]):
        for client_id in cohort:
            send(fed, fed.clients[client_id])
        fed.server = fed.aggregator.apply(fed.server, [train(fed, fed.clients[i], 1) for i in cohort])
    # after rounds 1 (B), 2 (A) and 3 (B): client 1 was there in round 3, client 0 has seen round 1 only
    assert fed.aggregator.downlink(fed.server, fed.clients[1].profile()).num_values == P_B + HEAD
    assert fed.aggregator.downlink(fed.server, fed.clients[0].profile()).num_values == P + HEAD


def test_a_late_joiner_of_flora_receives_the_dense_base_once_that_is_smaller():
    fed = federation(aggregator_from_name("flora", {}))
    dense = sum(d_out * d_in for d_out, d_in in SHAPES.values())
    for _ in range(6):
        send(fed, fed.clients[1])
        fed.server = fed.aggregator.apply(fed.server, [train(fed, fed.clients[1], 1)])
        backlog = fed.aggregator.downlink(fed.server, ClientProfile()).num_values
        assert backlog == smaller(fed.server.server_round * RANK) + HEAD
    assert backlog == dense + HEAD

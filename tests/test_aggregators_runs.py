"""Every aggregator through real rounds on the bundled model: exact, private, repeatable, and as many bytes
as its formula says. The linear algebra itself is tested in ``test_aggregators_oracles.py`` and others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from flwr.app import Message
from real_federation import (
    EXACT,
    METHODS,
    NUM_CLIENTS,
    RANK,
    RealFederation,
    distance,
    same,
    small_config,
    with_method,
)

from federated.aggregators import factor_averaging
from federated.checkpoint import ServerCheckpoint, load_server_checkpoint, save_server_checkpoint
from federated.client import CODEC_MEMORY, recall
from federated.experiment import Experiment, build_experiment
from federated.local_training import Assignment, train_locally
from federated.messages import read_state
from federated.payload import layout_of
from lora.adapters import factor_pairs
from models.errors import UserError
from models.state import State

ROUNDS = ((0, 1), (1, 2), (0, 1, 3))
"""Cohorts: client 1 is always there, 0 misses a round, 2 and 3 come late."""


@pytest.fixture(scope="module")
def base() -> Experiment:
    return build_experiment(small_config())


@pytest.fixture(scope="module")
def private_base() -> Experiment:
    return build_experiment(small_config("aggregation.name=dual"))


@pytest.fixture
def experiment_for(base: Experiment, private_base: Experiment) -> Any:
    def choose(method: str, **changes: Any) -> Experiment:
        return with_method(private_base if method == "dual" else base, method, **changes)

    return choose


@contextmanager
def federation(experiment: Experiment, order: Any = None) -> Iterator[RealFederation]:
    with pytest.MonkeyPatch.context() as patch:
        yield RealFederation(experiment, patch, order)


def backwards(messages: Sequence[Message]) -> Sequence[Message]:
    return list(reversed(messages))


def play_all(fed: RealFederation) -> list[State]:
    """Play ROUNDS, with an evaluation by all clients at the end; return the global state after each."""
    states = []
    for server_round, cohort in enumerate(ROUNDS, start=1):
        fed.play(server_round, cohort)
        assert not fed.strategy.record.failed
        states.append(fed.strategy.server_state.state)
    fed.evaluate(len(ROUNDS), range(NUM_CLIENTS))
    return states


# ---- repeatable, in any order of clients


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_bitwise_in_another_client_order(method: str, experiment_for: Any) -> None:
    experiment = experiment_for(method)
    with federation(experiment) as fed:
        states, clients, base = play_all(fed), fed.strategy.record.clients, experiment.base.current()
        held, rows = dict(fed.held), list(fed.ledger.rows)
    with federation(experiment, backwards) as again:
        repeated = play_all(again)
        assert all(same(a, b) for a, b in zip(states, repeated, strict=True))
        assert same(base, experiment.base.current())
        assert again.strategy.record.clients == clients
        assert again.strategy.record.metrics.get("aggregation_error") is not None or method == "fedsa"
        assert all(same(held[i], again.held[i]) for i in held)
        assert sorted(map(str, again.ledger.rows)) == sorted(map(str, rows))
    assert not same(states[0], states[2])


# ---- the right model


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_give_clients_the_weighted_mean_of_what_they_trained(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method, local_steps=6)) as fed:
        for server_round, cohort in enumerate(ROUNDS, start=1):
            fed.evaluate(server_round - 1, range(NUM_CLIENTS))
            before = fed.client_weights(1)
            fed.play(server_round, cohort)
            total = sum(fed.experiment.num_examples(i) for i in cohort)
            ideal = dict(before)
            for i in cohort:
                share = fed.experiment.num_examples(i) / total
                ideal = {m: w + share * (fed.ends[i][m] - fed.starts[i][m]) for m, w in ideal.items()}
            fed.evaluate(server_round, range(NUM_CLIENTS))
            moved = distance(before, ideal)
            assert moved > 1e-3 or (method == "rolora" and moved > 1e-4)
            for i in range(NUM_CLIENTS):
                assert distance(fed.client_weights(i), ideal) < 1e-5
            assert fed.strategy.record.metrics["aggregation_error"] < 1e-4


def test_averaging_factors_apart_is_off_and_the_metric_says_by_how_much(experiment_for: Any) -> None:
    with federation(experiment_for("fedavg", local_steps=6)) as fed:
        before = None
        for server_round in (1, 2):
            fed.evaluate(server_round - 1, range(NUM_CLIENTS))
            before = fed.client_weights(1)
            fed.play(server_round, range(NUM_CLIENTS))
        fed.evaluate(2, [1])
        total = sum(fed.experiment.num_examples(i) for i in range(NUM_CLIENTS))
        shares = [fed.experiment.num_examples(i) / total for i in range(NUM_CLIENTS)]
        found = fed.client_weights(1)
        squared_error = squared_size = 0.0
        for module, start in fed.pretrained.items():
            ideal = sum(share * (fed.ends[i][module] - start) for i, share in enumerate(shares))
            squared_error += float((found[module] - start - ideal).square().sum())
            squared_size += float(ideal.square().sum())
        error = fed.strategy.record.metrics["aggregation_error"]
        assert error == pytest.approx((squared_error / squared_size) ** 0.5, rel=1e-3)
        assert error > 1e-3
        assert before is not None


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("fedsa", "dual")])
def test_a_late_joiner_ends_with_the_model_of_a_client_that_was_always_there(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method)) as fed:
        play_all(fed)
        always = fed.client_weights(1)
        assert distance(always, fed.pretrained) > 1e-4
        for i in (0, 2, 3):
            assert distance(fed.client_weights(i), always) < 1e-5
        server = fed.experiment.base.current()
        assert distance(fed.bases[1], server) < 1e-5
        features = fed.global_features()
        assert torch.isfinite(features).all()


@pytest.mark.parametrize("method", METHODS)
def test_zero_training_keeps_the_model(method: str, experiment_for: Any) -> None:
    with federation(experiment_for(method, trained=True, learning_rate=1e-30)) as fed:
        start = fed.global_features()
        play_all(fed)
        before = {m: fed.client_weights(1)[m] for m in fed.pretrained}
        assert torch.allclose(fed.global_features(), start, atol=2e-4)
        for i in range(NUM_CLIENTS):
            assert distance(fed.client_weights(i), before) < 1e-5


# ---- private parts


@pytest.mark.parametrize("method", ["fedsa", "dual"])
def test_private_parts_never_travel_and_are_bit_identical_in_the_next_round(
    method: str, experiment_for: Any
) -> None:
    with federation(experiment_for(method)) as fed:
        kept: dict[int, State] = {}
        for server_round, cohort in enumerate((*ROUNDS, (0, 1, 2, 3)), start=1):
            fed.play(server_round, cohort)
            for i in cohort:
                private = fed.experiment.aggregator.private(fed.trained[i])
                assert private
                if i in kept:
                    assert same({n: fed.held[i][n] for n in private}, kept[i])
                kept[i] = {n: fed.trained[i][n] for n in private}
                assert same(fed.private_state(i), kept[i])
        assert all(not set(delta) & set(kept[i]) for i, delta in fed.uplinks)
        assert not same(kept[0], kept[1])
        initial = {n: fed.experiment.initial_state[n] for n in kept[0]}
        assert all(not same(values, initial) for values in kept.values())
        fed.evaluate(4, range(NUM_CLIENTS))
        assert all(same(fed.private_state(i), kept[i]) for i in kept)


def test_private_values_survive_a_server_that_never_saw_the_answer(experiment_for: Any) -> None:
    with federation(experiment_for("fedsa")) as fed:
        fed.play(1, [0, 1])
        kept = fed.private_state(0)
        fed.strategy.versions.clear()
        fed.play(2, [0, 1])
        assert same({n: fed.held[0][n] for n in kept}, kept)


# ---- bytes


def sizes(experiment: Experiment) -> dict[str, int]:
    pairs = [pair for pair in factor_pairs({n for n in experiment.initial_state if ".private." not in n})]
    shapes = [(experiment.initial_state[p.b].shape[0], experiment.initial_state[p.a].shape[1]) for p in pairs]
    head = sum(t.numel() for n, t in experiment.initial_state.items() if n.startswith("head."))
    a, b = (sum(RANK * shape[axis] for shape in shapes) for axis in (1, 0))
    return {"a": a, "b": b, "p": a + b, "head": head, "cores": RANK * RANK * len(shapes)} | {
        f"base{q}": sum(min(q * (o + i), o * i) for o, i in shapes) for q in (2, RANK, 2 * RANK)
    }


# method -> uplink, first downlink, downlink to a client of round 1 in round 2
FORMULAS = {
    "fedavg": ("p+head", "p+head", "p+head"),
    "ffa": ("b+head", "p+head", "b+head"),
    "rolora": ("b+head", "p+head", "b+head"),
    "flora": ("p+head", "head", "base8+head"),
    "fedex": ("p+head", "p+head", "p+head+base4"),
    "fedex(rank_cap=2)": ("p+head", "p+head", "p+head+base2"),
    "flexlora": ("p+head", "p+head", "p+head"),
    "hetlora": ("p+head", "p+head", "p+head"),
    "fedsa": ("a", "p+head", "a"),
    "lora_fair": ("p+head", "p+head", "p+head"),
    "fedsvd": ("b+head", "p+head", "p+head"),
    "fed_sb": ("cores+head", "p+cores+head", "cores+head"),
    "dual": ("p+head", "p+head", "p+head"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_has_the_bytes_of_the_methods_formula(method: str, experiment_for: Any) -> None:
    experiment = experiment_for(method)
    values = sizes(experiment)
    up, first, later = (4 * sum(values[part] for part in text.split("+")) for text in FORMULAS[method])
    with federation(experiment) as fed:
        fed.play(1, (0, 1))
        fed.play(2, (1, 2))
        found = {(row.server_round, row.client_id, row.direction): row.payload_bytes for row in fed.ledger.rows}
    assert found[1, 0, "downlink"] == found[1, 1, "downlink"] == first
    assert found[1, 0, "uplink"] == found[1, 1, "uplink"] == up
    assert found[2, 1, "downlink"] == later
    newcomer = {"flora": later, "fedex": later, "fedex(rank_cap=2)": later}.get(method, first)
    assert found[2, 2, "downlink"] == newcomer
    if method == "rolora":
        assert found[2, 1, "uplink"] == 4 * (values["a"] + values["head"])


# ---- ranks that differ


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_mixed_ranks_send_their_own_rank_and_end_with_one_model(method: str) -> None:
    experiment = build_experiment(small_config(f"aggregation.name={method}", "client.ranks=[4, 1, 2]"))
    with federation(experiment) as fed:
        for server_round, cohort in enumerate(ROUNDS, start=1):
            fed.play(server_round, cohort)
            assert not fed.strategy.record.failed
        values = sizes(experiment)
        for row in fed.ledger.rows:
            if row.direction == "uplink" and row.server_round == 1:
                rank = (4, 1, 2, 4)[row.client_id]
                assert row.parameters == values["p"] * rank // RANK + values["head"]
        if method == "flora":
            fed.evaluate(3, range(NUM_CLIENTS))
            for i in range(NUM_CLIENTS):
                assert distance(fed.client_weights(i), fed.client_weights(0)) < 1e-5


@pytest.mark.parametrize("method", ["flora", "flexlora", "hetlora"])
def test_zero_training_with_mixed_ranks_keeps_the_global_model(method: str) -> None:
    config = small_config(
        f"aggregation.name={method}", "client.ranks=[4, 1, 2]", "client.learning_rate=1e-30"
    )
    experiment = with_method(build_experiment(config), method, trained=True)
    with federation(experiment) as fed:
        start = fed.global_features()
        for server_round in range(1, 6):
            fed.play(server_round, range(NUM_CLIENTS))
        assert torch.allclose(fed.global_features(), start, atol=2e-4)


@pytest.mark.parametrize(
    "method", [m for m in ("fedavg", "ffa", "rolora", "fedex", "fedsa", "lora_fair", "fedsvd", "fed_sb", "dual")]
)
def test_other_methods_refuse_mixed_ranks_before_the_run(method: str) -> None:
    with pytest.raises(UserError, match=r"needs one rank for all clients.*flora, flexlora or hetlora"):
        build_experiment(small_config(f"aggregation.name={method}", "client.ranks=[4, 2]"))


def test_hetloras_penalty_acts_on_a_clients_own_components() -> None:
    """A client of rank 2 in a model of rank 4 has its tail in component 2, not in the zeros beyond it."""
    config = small_config(
        "aggregation={name: hetlora, options: {gamma: 0.5, penalty_weight: 50.0}}",
        "client.ranks=[4, 2]",
        "client.optimizer=sgd",
        "client.learning_rate=1e-4",
    )
    experiment = with_method(build_experiment(config), "hetlora", trained=True)
    plain = with_method(experiment, "fedavg", ranks=None)
    experiment = build_like(experiment, config)
    held = experiment.wire_state(2)
    penalised = train_locally(experiment, Assignment(1, 1, rank=2), held).state
    free = train_locally(build_like(plain, config, penalty=False), Assignment(1, 1, rank=2), held).state
    for pair in factor_pairs(held):
        assert float(penalised[pair.b][:, 1].norm()) < float(free[pair.b][:, 1].norm())
        assert torch.allclose(penalised[pair.b][:, 0], free[pair.b][:, 0], atol=1e-3)


def build_like(experiment: Experiment, config: Any, *, penalty: bool = True) -> Experiment:
    """The experiment under a configuration's aggregator, with or without its penalty."""
    from dataclasses import replace

    from federated.compatibility import build_aggregator

    aggregator = build_aggregator(config)
    if not penalty:
        aggregator = replace(aggregator, client=replace(aggregator.client, penalty=None))
    return replace(experiment, config=config, aggregator=aggregator)

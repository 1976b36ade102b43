"""FedProx and SCAFFOLD: the terms themselves, and both in real rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real_federation import RealFederation, distance, same, small_config, with_method
from torch import nn

import federated.rounds.client
from federated.methods import (
    Aggregator,
    LocalStart,
    LossTerm,
    ServerState,
    Update,
    join_auxiliary,
    split_auxiliary,
)
from federated.methods.fedprox import proximal_term
from federated.methods.protocol import with_loss_term
from federated.methods.scaffold import ControlVariates, DriftCorrection, control_of, next_control
from federated.rounds.client_state import METHOD_MEMORY, recall
from federated.rounds.local_training import Assignment, sum_of_terms, train_locally
from federated.rounds.run import Run, build_run
from models.state import State


@pytest.fixture(scope="module")
def base() -> Run:
    return build_run(small_config())


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(3, 2, generator=generator)),
        "b": nn.Parameter(torch.randn(4, generator=generator)),
    }


def like(values: dict[str, nn.Parameter], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in values.items()}


# ---- the terms


def test_the_proximal_term_is_squared_and_pulls_back_in_proportion() -> None:
    live = parameters()
    start = {name: p.detach().clone() for name, p in live.items()}
    term = proximal_term(live.values(), mu=0.3)
    assert float(term().detach()) == 0.0
    with torch.no_grad():
        for p in live.values():
            p.add_(2.0)
    value = term()
    assert float(value.detach()) == pytest.approx(0.5 * 0.3 * 4.0 * 10)
    value.backward()
    for name, p in live.items():
        torch.testing.assert_close(p.grad, 0.3 * (p.detach() - start[name]))


def test_the_drift_correction_adds_c_minus_c_k_and_averages_the_raw_gradients() -> None:
    live = parameters()
    variates = ControlVariates(like(live, 1), like(live, 2))
    correction = DriftCorrection(live, variates)
    raw = []
    for step in range(3):
        for p in live.values():
            p.grad = None
        loss = sum((p * (step + 1)).sum() for p in live.values())
        loss.backward()
        raw.append({name: p.grad.clone() for name, p in live.items() if p.grad is not None})
        correction().backward()
        for name, p in live.items():
            torch.testing.assert_close(p.grad, raw[-1][name] + variates.server[name] - variates.own[name])
    for name, value in correction.mean_gradient().items():
        torch.testing.assert_close(value, sum(g[name] for g in raw) / 3)


def test_the_mean_gradient_is_option_two_of_the_paper_for_plain_sgd() -> None:
    """c_k - c + (theta_t - theta_K) / (K eta), with the steps taken along the corrected gradients."""
    live, eta = parameters(), 0.05
    start = {name: p.detach().clone() for name, p in live.items()}
    variates = ControlVariates(like(live, 1), like(live, 2))
    correction = DriftCorrection(live, variates)
    optimizer = torch.optim.SGD(live.values(), lr=eta)
    for _ in range(4):
        optimizer.zero_grad()
        sum((p**2).sum() for p in live.values()).backward()  # type: ignore[union-attr]
        correction().backward()
        optimizer.step()
    for name, value in correction.mean_gradient().items():
        moved = (start[name] - live[name].detach()) / (4 * eta)
        torch.testing.assert_close(value, variates.own[name] - variates.server[name] + moved)


def test_the_servers_variate_moves_by_the_share_of_all_clients() -> None:
    control = {"a": torch.tensor([1.0, 2.0])}
    changes = [{"a": torch.tensor([4.0, 0.0])}, {"a": torch.tensor([0.0, -8.0])}]
    torch.testing.assert_close(next_control(control, changes, 4)["a"], torch.tensor([2.0, 0.0]))
    assert same(next_control(control, [], 4), control)


def test_terms_add_up_and_none_is_none() -> None:
    terms: list[Callable[[], torch.Tensor]] = [lambda: torch.tensor(2.0), lambda: torch.tensor(3.0)]
    assert sum_of_terms([]) is None
    assert sum_of_terms(terms[:1]) is terms[0]
    both = sum_of_terms(terms)
    assert both is not None
    assert float(both()) == 5.0


def test_variates_travel_under_names_of_their_own() -> None:
    state = {"m.lora_A.weight": torch.ones(1), "head.bias": torch.zeros(2)}
    others, control = split_auxiliary(join_auxiliary(state, state))
    assert same(others, state)
    assert same(control, state)


# ---- FedProx in real training


@pytest.mark.parametrize("method", ["fedavg", "ffa", "fed_sb", "fedsa"])
def test_a_strong_proximal_term_keeps_clients_near_the_start(method: str, base: Run) -> None:
    settings = {"local_steps": 8, "optimizer": "sgd", "learning_rate": 0.01}
    held = with_method(base, method).wire_state()
    ends = []
    for mu in (0.0, 50.0):
        experiment = with_method(base, method, proximal_mu=mu, **settings)
        result = train_locally(experiment, Assignment(0, 1), held)
        shared = experiment.aggregator.uplink(held, 1)
        ends.append({n: result.state[n] for n in shared})
    start = {n: held[n] for n in ends[0]}
    assert 0 < distance(ends[1], start) < 0.9 * distance(ends[0], start)


def test_the_proximal_term_leaves_private_parts_alone(base: Run) -> None:
    """The second step is the first to feel the term; B of fedsa still sees the A of the first."""
    held = with_method(base, "fedsa").wire_state()
    settings = {"local_steps": 2, "optimizer": "sgd", "learning_rate": 0.01}
    plain, pulled = (
        train_locally(with_method(base, "fedsa", proximal_mu=mu, **settings), Assignment(0, 1), held).state
        for mu in (0.0, 1.0)
    )
    private = base.aggregator.private(held) or with_method(base, "fedsa").aggregator.private(held)
    assert same({n: plain[n] for n in private}, {n: pulled[n] for n in private})


# ---- SCAFFOLD in real rounds


def scaffold(experiment: Run, method: str = "fedavg", **changes: Any) -> Run:
    return with_method(experiment, method, scaffold=True, **changes)


def test_equal_variates_correct_nothing(base: Run) -> None:
    held = base.wire_state()
    variate = {n: torch.full_like(t, 0.01) for n, t in held.items()}
    assignment = Assignment(0, 1, auxiliary=variate, memory=variate)
    plain = train_locally(base, Assignment(0, 1), held)
    corrected = train_locally(scaffold(base), assignment, held)
    assert distance(corrected.state, plain.state) < 1e-6
    assert corrected.auxiliary.keys() == variate.keys()
    assert corrected.train_loss == pytest.approx(plain.train_loss, abs=1e-6)


@pytest.mark.parametrize("uplink", ["fp32", "int8"])
def test_the_servers_variate_stays_the_mean_of_all_clients(uplink: str, base: Run) -> None:
    """Also when the codec loses something: a client keeps what the server decoded."""
    communication = base.config.communication.model_copy(update={"uplink": uplink})
    experiment = scaffold(
        replace(base, config=base.config.model_copy(update={"communication": communication}))
    )
    with pytest.MonkeyPatch.context() as patch:
        fed = RealFederation(experiment, patch)
        for server_round, cohort in enumerate(((0, 1), (1, 2)), start=1):
            fed.play(server_round, cohort)
            assert not fed.strategy.record.failed
        control = control_of(fed.strategy.server_state)
        own = [recall(fed.grid.context(i), METHOD_MEMORY) for i in range(3)]
    assert any(value.any() for value in control.values())
    for name, value in control.items():
        mean = sum(variate[name] for variate in own) / fed.experiment.num_clients
        torch.testing.assert_close(value, mean, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("method", "share"), [("fedavg", 1.0), ("ffa", 0.0), ("fedsa", 0.0)])
def test_variates_double_the_uplink_and_are_counted(method: str, share: float, base: Run) -> None:
    payloads = []
    for experiment in (with_method(base, method), scaffold(base, method)):
        with pytest.MonkeyPatch.context() as patch:
            fed = RealFederation(experiment, patch)
            fed.play(1, (0, 1))
            rows = {(r.client_id, r.direction): r.payload_bytes for r in fed.ledger.rows}
        payloads.append((rows[0, "uplink"], rows[0, "downlink"]))
    (plain_up, plain_down), (up, down) = payloads
    assert up == 2 * plain_up
    assert down == plain_down + plain_up
    assert share in (0.0, 1.0)


def test_scaffold_repeats_bitwise_in_another_client_order(base: Run) -> None:
    states = []
    for order in (None, lambda messages: list(reversed(messages))):
        with pytest.MonkeyPatch.context() as patch:
            fed = RealFederation(scaffold(base), patch, order)
            for server_round, cohort in enumerate(((0, 1, 2), (1, 2, 3)), start=1):
                fed.play(server_round, cohort)
            states.append(fed.strategy.server_state)
    assert same(states[0].state, states[1].state)
    assert same(states[0].memory, states[1].memory)


@pytest.mark.parametrize("uplink", ["topk:0.1", "topk:0.1:ef+int8"])
def test_a_sparse_uplink_brings_the_same_update_with_variates_beside_it(uplink: str, base: Run) -> None:
    """In round 1 all variates are zero and correct nothing, whatever is sent of their changes."""
    communication = base.config.communication.model_copy(update={"uplink": uplink})
    sparse = replace(base, config=base.config.model_copy(update={"communication": communication}))
    states, payloads = [], []
    for experiment in (with_method(sparse, "fedavg", local_steps=1), scaffold(sparse, local_steps=1)):
        with pytest.MonkeyPatch.context() as patch:
            fed = RealFederation(experiment, patch)
            start = fed.strategy.server_state.state
            fed.play(1, (0, 1))
            states.append(fed.strategy.server_state.state)
            payloads += [r.payload_bytes for r in fed.ledger.rows if r.direction == "uplink"]
    assert distance(states[0], start) > 1e-4
    assert distance(states[1], states[0]) < 1e-6
    assert payloads[2] == payloads[3] == 2 * payloads[0] == 2 * payloads[1]


# ---- any method of this kind


def counting(method: Aggregator) -> Aggregator:
    """A method whose clients say that they trained, and remember how often; it adds nothing to their loss."""

    def auxiliary(server: ServerState) -> State:
        return {"trainings": server.memory.get("trainings", torch.zeros(1))}

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        told = sum(update.auxiliary["trainings"] for update in updates)
        memory = {"trainings": auxiliary(server)["trainings"] + told}
        return replace(method.apply(server, updates), memory=memory)

    def term(start: LocalStart) -> LossTerm:
        return LossTerm(lambda: torch.zeros((), requires_grad=True), lambda: {"trainings": torch.ones(1)})

    def remember(memory: State, sent: State) -> State:
        return {name: value + memory.get(name, 0.0) for name, value in sent.items()}

    counted = with_loss_term(method, term)
    client = replace(counted.client, remember=remember)
    return replace(counted, auxiliary=auxiliary, apply=apply, client=client)


def test_what_a_method_sends_beside_the_model_and_remembers_is_its_own_affair(base: Run) -> None:
    """Server and clients carry it without knowing what it is."""
    with pytest.MonkeyPatch.context() as patch:
        fed = RealFederation(replace(base, aggregator=counting(base.aggregator)), patch)
        for server_round, cohort in enumerate(((0, 1), (1, 2), (1,)), start=1):
            fed.play(server_round, cohort)
            assert not fed.strategy.record.failed
        assert float(fed.strategy.server_state.memory["trainings"]) == 5.0
        own = [recall(fed.grid.context(i), METHOD_MEMORY) for i in range(3)]
    assert [float(memory["trainings"]) for memory in own] == [1.0, 3.0, 1.0]


def test_neither_the_server_nor_the_client_names_a_method() -> None:
    rounds = Path(federated.rounds.client.__file__).parent
    for module in ("strategy", "server", "replies", "client", "client_state", "local_training"):
        text = (rounds / f"{module}.py").read_text(encoding="utf-8").lower()
        assert not [name for name in ("scaffold", "fedprox", "proximal", "hetlora") if name in text], module

"""flora and fedex where every client message may reach another process: the run of the in-process engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from flwr.app import ArrayRecord, ConfigRecord
from real_federation import NUM_CLIENTS, RealFederation, same, small_config, with_method

from federated.rounds.base_weights import BaseWeights
from federated.rounds.client_state import MERGED, MERGED_VERSION
from federated.rounds.local_training import Assignment, LocalResult, train_locally
from federated.rounds.run import Run, build_run
from models.state import State

COHORTS = ((0, 1), (1, 2), (0, 1), (0, 2, 3))
"""Clients 0 and 2 miss a round, 3 comes late; all evaluate after the second."""

ProcessOf = Callable[[int], int | None]
"""Number of a message -> the process that it reaches; None: one that has just been started."""

PROCESSES: dict[str, ProcessOf] = {
    "a new process a message": lambda message: None,
    "three processes, one of them new": lambda message: (0, None, 1, 1)[message % 4],
}


@pytest.fixture(scope="module")
def on_server() -> Run:
    return build_run(small_config("client.local_steps=1"))


def another_process(experiment: Run) -> Run:
    """The experiment as a process builds it that has seen nothing yet."""
    experiment.reset()
    model = copy.deepcopy(experiment.model)
    return replace(experiment, model=model, base=BaseWeights(model))


@dataclass
class Seen:
    """What a run shows: the server's state after each round, and what each client computed with."""

    server: list[State] = field(default_factory=list)
    clients: list[tuple[int, int, State, State]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def note(seen: Seen, fed: RealFederation) -> None:
    def watched(experiment: Run, assignment: Assignment, held: State) -> LocalResult:
        weights, key = experiment.base.current(), (assignment.server_round, assignment.client_id)
        seen.clients.append((*key, weights, {name: tensor.clone() for name, tensor in held.items()}))
        return train_locally(experiment, assignment, held)

    fed.local_training = watched


def play(fed: RealFederation, seen: Seen) -> None:
    for server_round, cohort in enumerate(COHORTS, start=1):
        fed.cohort = sorted(cohort)
        messages = fed.strategy.configure_train(server_round, ArrayRecord(), ConfigRecord(), fed.metered)
        fed.strategy.aggregate_train(server_round, fed.metered.send_and_receive(messages))
        seen.failed += [failure.reason for failure in fed.strategy.record.failed]
        seen.server.append(fed.strategy.server_state.state)
        if server_round == 2:
            fed.evaluate(server_round, range(NUM_CLIENTS))
            seen.failed += [failure.reason for failure in fed.strategy.record.failed]


@pytest.fixture(scope="module")
def in_process(on_server: Run) -> Callable[[str], Seen]:
    known: dict[str, Seen] = {}

    def run(method: str) -> Seen:
        if method not in known:
            with pytest.MonkeyPatch.context() as patch:
                fed = RealFederation(with_method(on_server, method), patch)
                known[method] = Seen()
                note(known[method], fed)
                play(fed, known[method])
                assert not any(MERGED in fed.grid.context(i).state for i in range(NUM_CLIENTS))
        return known[method]

    return run


@pytest.mark.parametrize("process_of", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("method", ["flora", "fedex(rank_cap=2)"])
def test_merging_methods_give_the_bits_of_the_inprocess_engine_whatever_process_a_message_reaches(
    method: str,
    process_of: ProcessOf,
    on_server: Run,
    in_process: Callable[[str], Seen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = with_method(on_server, method)
    pristine = another_process(experiment)
    fed, seen = RealFederation(experiment, monkeypatch), Seen()
    running: dict[int, Run] = {}
    messages = itertools.count()

    def run_of_process() -> Run:
        number = process_of(next(messages))
        if number is None:
            return another_process(pristine)
        if number not in running:
            running[number] = another_process(pristine)
        return running[number]

    fed.run_of_process = run_of_process
    note(seen, fed)
    play(fed, seen)
    wanted = in_process(method)
    assert seen.failed == wanted.failed == []
    assert len(seen.server) == len(wanted.server) == len(COHORTS)
    assert all(same(one, other) for one, other in zip(seen.server, wanted.server, strict=True))
    assert len(seen.clients) == len(wanted.clients) == sum(map(len, COHORTS))
    for one, other in zip(seen.clients, wanted.clients, strict=True):
        assert one[:2] == other[:2]
        assert same(one[2], other[2]), f"base weights of round and client {one[:2]}"
        assert same(one[3], other[3])


def test_a_client_whose_kept_sum_is_lost_says_so_and_then_receives_everything(
    on_server: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = with_method(on_server, "flora")
    elsewhere = another_process(experiment)
    fed, seen = RealFederation(experiment, monkeypatch), Seen()
    fed.run_of_process = lambda: elsewhere
    note(seen, fed)
    for server_round in (1, 2, 3):
        fed.play(server_round, (0, 1))
        if server_round == 1:
            del fed.grid.context(1).state[MERGED_VERSION]
        failed = [(failure.client_id, failure.reason) for failure in fed.strategy.record.failed]
        assert [client_id for client_id, _ in failed] == ([1] if server_round == 2 else [])
        assert all("lost its state" in reason for _, reason in failed)
    first, second = (weights for server_round, _, weights, _ in seen.clients if server_round == 3)
    assert same(first, second)


def test_a_worker_that_was_forked_before_a_round_without_a_merge_goes_on(
    on_server: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a round changes the server's version and no weight, so that workers are not forked anew."""
    experiment = with_method(on_server, "flora")
    fed = RealFederation(experiment, monkeypatch)
    fed.evaluate(0, (0, 1))
    fed.play(1, ())
    assert fed.strategy.server_state.server_round == 1

    def in_worker() -> Run:
        experiment.base.version = 0
        return experiment

    fed.run_of_process = in_worker
    fed.play(2, (0, 1))
    assert not fed.strategy.record.failed

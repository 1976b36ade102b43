"""Forked workers: the result of one process, failures contained, refused where forking is unsafe."""

from __future__ import annotations

import gc
import os
import signal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.client import app as client_app
from federated.config import dump_config, load_config
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.workers import check_workers
from federated.experiment import CONFIG_KEY, experiment_of
from federated.payload import ARRAYS, CONFIG
from federated.server import build_strategy
from models.errors import UserError

SMALL = (
    "federation.rounds=2",
    "partition.num_clients=3",
    "client.local_steps=2",
    "client.batch_size=8",
    "data.max_train_samples=200",
    "data.max_test_samples=40",
)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counting_app(dies: int | None = None) -> ClientApp:
    """Adds 1 to what came, counts its own messages, tells its process; one client raises, one may die."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client_id = context.node_config["partition-id"]
        calls = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1
        context.state["calls"] = MetricRecord({"n": calls})
        if client_id == 2:
            raise RuntimeError("client 2 always fails")
        if client_id == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        values = message.content[ARRAYS]["state"].numpy()
        content = RecordDict({ARRAYS: ArrayRecord({"state": Array(values + client_id)})})
        content["metrics"] = MetricRecord({"process": os.getpid(), "calls": calls})
        return Message(content, reply_to=message)

    return app


def send(grid: InProcessGrid, client_ids: list[int], timeout: float | None = None) -> list[Message]:
    arrays = ArrayRecord({"state": Array(np.linspace(0, 1, 50_000))})  # more than a pipe holds
    content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({"server-round": 1})})
    messages = [grid.create_message(content, "train", node_id_of(i), "1") for i in client_ids]
    return list(grid.send_and_receive(messages, timeout=timeout))


def assert_no_process_is_left() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_replies_and_client_states_are_those_of_one_process() -> None:
    alone, forked = InProcessGrid(counting_app(), 5), InProcessGrid(counting_app(), 5, num_workers=2)
    processes: set[int] = set()
    for expected_calls in (1, 2):
        for one, other in zip(send(alone, [0, 1, 2, 3, 4]), send(forked, [0, 1, 2, 3, 4]), strict=True):
            assert other.metadata.src_node_id == one.metadata.src_node_id
            assert other.has_error() == one.has_error()
            if one.has_error():
                assert other.error.reason == one.error.reason
                continue
            theirs, ours = (m.content[ARRAYS]["state"].numpy() for m in (one, other))
            np.testing.assert_array_equal(ours, theirs)
            assert other.content["metrics"]["calls"] == expected_calls
            processes.add(other.content["metrics"]["process"])
    assert len(processes) == 2  # the second batch found those that the first had forked
    assert os.getpid() not in processes
    assert forked.context(2).state == alone.context(2).state == RecordDict()
    assert forked.context(3).state == alone.context(3).state
    forked.close()


def test_a_killed_worker_gives_error_replies_for_its_clients_alone() -> None:
    seen: list[tuple[int, str]] = []
    grid = InProcessGrid(counting_app(dies=3), 5, num_workers=2, on_reply=lambda *answer: seen.append(answer))
    replies = send(grid, [0, 1, 3, 4])  # 0 and 3 are one worker's, 1 and 4 the other's
    failed = [reply for reply in replies if reply.has_error()]
    assert [reply.metadata.src_node_id for reply in failed] == [node_id_of(3)]
    assert f"killed by signal {signal.SIGKILL}" in failed[0].error.reason
    assert sorted(seen) == [(0, "ok"), (1, "ok"), (3, "failed"), (4, "ok")]
    assert "calls" not in grid.context(3).state
    assert not any(reply.has_error() for reply in send(grid, [0, 1, 4]))  # another has taken its place
    grid.close()
    assert_no_process_is_left()


def test_workers_are_forked_anew_when_what_they_inherited_changes() -> None:
    version = [0]
    grid = InProcessGrid(counting_app(), 4, num_workers=2, inherited=lambda: version[0])
    seen = []
    for version[0] in (1, 1, 2):
        seen.append({reply.content["metrics"]["process"] for reply in send(grid, [0, 1])})
    assert seen[0] == seen[1]
    assert not seen[1] & seen[2]
    assert [grid.context(i).state["calls"]["n"] for i in (0, 1)] == [3, 3]
    grid.close()
    assert_no_process_is_left()


def test_a_worker_killed_between_two_batches_is_replaced_or_its_clients_fail() -> None:
    grid = InProcessGrid(counting_app(), 5, num_workers=2)
    process = send(grid, [0, 1])[0].content["metrics"]["process"]
    os.kill(process, signal.SIGKILL)
    replies = send(grid, [0, 1, 3, 4])
    assert [reply.has_error() for reply in replies] == [True, False, True, False]
    assert not any(reply.has_error() for reply in send(grid, [0, 1, 3, 4]))
    grid.close()


def test_giving_up_in_the_middle_ends_the_workers() -> None:
    def interrupted(client_id: int, status: str) -> None:
        raise KeyboardInterrupt

    grid = InProcessGrid(counting_app(), 5, num_workers=2, on_reply=interrupted)
    with pytest.raises(KeyboardInterrupt):
        send(grid, [0, 1, 3, 4])
    gc.collect()
    assert_no_process_is_left()


def test_workers_end_with_the_grid() -> None:
    grid = InProcessGrid(counting_app(), 2, num_workers=2)
    send(grid, [0, 1])
    del grid
    gc.collect()
    assert_no_process_is_left()


def test_clients_beyond_the_timeout_stay_silent() -> None:
    grid = InProcessGrid(counting_app(), 4, num_workers=2)
    assert send(grid, [0, 1, 3], timeout=0.0) == []


def test_workers_are_refused_where_forking_is_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    with pytest.raises(UserError, match=r"engine\.threads=2"):
        check_workers(2)
    check_workers(1)
    torch.set_num_threads(1)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="needs Linux"):
        InProcessGrid(counting_app(), 2, num_workers=2)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart", ("communication.uplink=int4",)),
        ("head_only", ()),  # features computed by one worker serve the others
        ("quickstart", ("aggregation.name=flora",)),  # merges into the base weights that workers inherit
        ("quickstart", ("client.scaffold=true",)),  # clients remember something
    ],
)
def test_rounds_with_two_workers_are_bitwise_those_of_one(name: str, overrides: tuple[str, ...]) -> None:
    run_config = {CONFIG_KEY: dump_config(load_config(name, [*SMALL, *overrides]))}
    experiment = experiment_of(run_config)
    clients = {client_id: node_id_of(client_id) for client_id in range(experiment.num_clients)}
    states, metrics = [], []
    for num_workers in (2, 1):
        experiment.reset()
        grid = InProcessGrid(
            client_app,
            len(clients),
            run_config=run_config,
            num_workers=num_workers,
            inherited=lambda: experiment.base.num_changes,
        )
        strategy = build_strategy(experiment, clients)
        strategy.start(grid, strategy.packed_state(), num_rounds=2)
        states.append(strategy.server_state.state)
        metrics.append(strategy.record.clients)
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert metrics[0] == metrics[1]
    assert all("accuracy" in entry for entry in metrics[0].values())

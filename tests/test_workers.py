"""Forked workers: the result of one process, failures contained, refused where forking is unsafe."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.communication.payload import ARRAYS, CONFIG
from federated.config.config_files import load_config
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.workers import check_workers
from federated.results.run_place import claim
from federated.rounds.client import client_app
from federated.rounds.run import build_run
from federated.rounds.run_strategy import build_strategy
from models.errors import UserError

SMALL = (
    "federation.rounds=3",
    "partition.num_clients=4",
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


def counting_app(dies: int | None = None, sleeps: Mapping[int, float] | None = None) -> ClientApp:
    """Adds to what came, counts its own messages, tells its process; one raises, others may die or sleep."""
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
        time.sleep((sleeps or {}).get(client_id, 0.0))
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


def assert_ended(processes: set[int]) -> None:
    assert processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def processes_of(replies: list[Message]) -> set[int]:
    return {int(reply.content["metrics"]["process"]) for reply in replies if not reply.has_error()}


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
    later = send(grid, [0, 1, 4])  # another has taken its place
    assert not any(reply.has_error() for reply in later)
    grid.close()
    assert_ended(processes_of(replies) | processes_of(later))


def test_a_dead_worker_fails_the_client_that_it_was_on_and_no_other() -> None:
    grid = InProcessGrid(counting_app(dies=1), 8, num_workers=2)
    for _ in range(2):  # the second batch finds a whole pool
        replies = send(grid, [0, 1, 3, 5, 4, 6, 7])  # 1, 5 and 6 are one worker's
        failed = [reply.metadata.src_node_id for reply in replies if reply.has_error()]
        assert failed == [node_id_of(1)]
        assert len(replies) == 7
    assert {grid.context(i).state["calls"]["n"] for i in (0, 3, 4, 5, 6, 7)} == {2}
    grid.close()


def test_sleeping_clients_are_ended_at_the_deadline_and_the_others_of_their_shares_answer() -> None:
    """0 and 1 stop both workers; 5 sleeps long enough for 6 to go on without it, and answers in time."""
    grid = InProcessGrid(counting_app(sleeps={0: 3600, 1: 3600, 5: 1.5}), 8, num_workers=2)
    replies = send(grid, [0, 1, 3, 5, 4, 6, 7], timeout=4.0)  # 1, 5 and 6 are one worker's
    answered = [3, 5, 4, 6, 7]
    assert [reply.metadata.src_node_id for reply in replies] == [node_id_of(i) for i in answered]
    values = [reply.content[ARRAYS]["state"].numpy()[0] for reply in replies]
    assert values == answered  # each has its own answer, once
    assert all(grid.context(i).state["calls"]["n"] == 1 for i in answered)
    later = send(grid, [3, 4], timeout=60.0)
    assert [int(reply.content["metrics"]["calls"]) for reply in later] == [2, 2]
    assert len(processes_of(later)) == 2
    grid.close()
    assert_ended(processes_of(replies) | processes_of(later))


def test_a_sleeping_client_that_is_alone_is_ended_too() -> None:
    grid = InProcessGrid(counting_app(sleeps={1: 3600}), 2, num_workers=2)
    assert send(grid, [1], timeout=0.5) == []
    grid.close()


def test_workers_are_forked_anew_when_what_they_inherited_changes() -> None:
    version = [0]
    grid = InProcessGrid(counting_app(), 4, num_workers=2, inherited=lambda: version[0])
    seen = []
    for version[0] in (1, 1, 2):
        seen.append(processes_of(send(grid, [0, 1])))
    assert seen[0] == seen[1]
    assert not seen[1] & seen[2]
    assert [grid.context(i).state["calls"]["n"] for i in (0, 1)] == [3, 3]
    assert_ended(seen[0])
    grid.close()
    assert_ended(seen[2])


def test_a_worker_that_died_between_two_batches_is_replaced() -> None:
    grid = InProcessGrid(counting_app(), 5, num_workers=2)
    process = int(send(grid, [0, 1])[0].content["metrics"]["process"])
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    replies = send(grid, [0, 1, 3, 4])
    assert not any(reply.has_error() for reply in replies)
    assert process not in processes_of(replies)
    grid.close()


def test_giving_up_in_the_middle_ends_the_workers_and_their_answers() -> None:
    def interrupted(client_id: int, status: str) -> None:
        if len(replied) == 4:
            raise KeyboardInterrupt
        replied.append(client_id)

    replied: list[int] = []
    grid = InProcessGrid(counting_app(), 6, num_workers=2, on_reply=interrupted)
    first = processes_of(send(grid, [0, 1]))
    with pytest.raises(KeyboardInterrupt):
        send(grid, [0, 1, 3, 4])
    assert_ended(first)
    replied.clear()
    replies = send(grid, [5, 4])  # no answer of the batch that was given up is taken for theirs
    values = [reply.content[ARRAYS]["state"].numpy()[0] for reply in replies]
    assert values == [5, 4]
    grid.close()


def test_a_worker_keeps_no_state_of_its_clients() -> None:
    """What one worker has seen of a client must not reach it again from there."""
    grid = InProcessGrid(counting_app(), 4, num_workers=2)
    for clients in ([0, 1], [1, 0], [0, 1]):  # each client at both workers
        send(grid, clients)
    assert [grid.context(i).state["calls"]["n"] for i in (0, 1)] == [3, 3]
    grid.context(0).state = RecordDict()
    assert int(send(grid, [0, 1])[0].content["metrics"]["calls"]) == 1
    grid.close()


def test_two_messages_to_one_client_run_one_after_the_other() -> None:
    grid = InProcessGrid(counting_app(), 4, num_workers=2)
    replies = send(grid, [0, 1, 0])
    assert [reply.content["metrics"]["calls"] for reply in replies] == [1, 1, 2]
    grid.close()


def test_workers_end_with_the_grid() -> None:
    grid = InProcessGrid(counting_app(), 2, num_workers=2)
    processes = processes_of(send(grid, [0, 1]))
    del grid
    gc.collect()
    assert_ended(processes)


def test_no_more_workers_are_forked_than_there_are_clients() -> None:
    grid = InProcessGrid(counting_app(), 3, num_workers=1000)
    assert len(processes_of(send(grid, [0, 1]))) == 2
    assert len(children_of_this_process()) == 2
    grid.close()


def children_of_this_process() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_timeout_beyond_all_clocks_is_none(num_workers: int, recwarn: pytest.WarningsRecorder) -> None:
    grid = InProcessGrid(counting_app(), 2, num_workers=num_workers)
    assert len(send(grid, [0, 1], timeout=1e300)) == 2
    assert not [w for w in recwarn if "Exception" in str(w.category)]  # of a thread that ended with one
    grid.close()


def test_a_killed_run_leaves_no_worker_and_no_lock_behind(tmp_path: Path) -> None:
    app, told = ClientApp(), tmp_path / "worker"

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (tmp_path / "part").write_text(str(os.getpid()))
        (tmp_path / "part").rename(told)
        time.sleep(60)
        return Message(RecordDict(), reply_to=message)

    run = os.fork()
    if run == 0:
        claim(tmp_path / "run", overwrite=False)
        send(InProcessGrid(app, 1, num_workers=2), [0])
        os._exit(0)
    while not told.exists():
        time.sleep(0.01)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert_ends(int(told.read_text()))
    os.close(claim(tmp_path / "run", overwrite=True))


def assert_ends(process: int) -> None:
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody has waited for it
            return
        time.sleep(0.01)
    pytest.fail(f"process {process} is still there")


def test_clients_beyond_the_timeout_stay_silent() -> None:
    grid = InProcessGrid(counting_app(), 4, num_workers=2)
    assert send(grid, [0, 1, 3], timeout=0.0) == []
    assert len(send(grid, [0, 1, 3])) == 3
    grid.close()


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
        # merges into the base weights that workers inherit; a worker may miss a round
        ("quickstart", ("aggregation.name=flora", "federation.cohort_size=2")),
        ("quickstart", ("client.scaffold=true",)),  # clients remember something
    ],
)
def test_rounds_with_two_workers_are_bitwise_those_of_one(name: str, overrides: tuple[str, ...]) -> None:
    experiment = build_run(load_config(name, [*SMALL, *overrides]))
    clients = {client_id: node_id_of(client_id) for client_id in range(experiment.num_clients)}
    ends, metrics = [], []
    for num_workers in (2, 1):
        experiment.reset()
        grid = InProcessGrid(
            client_app(experiment),
            len(clients),
            num_workers=num_workers,
            inherited=lambda: experiment.base.num_changes,
        )
        strategy = build_strategy(experiment, clients)
        strategy.start(grid, strategy.packed_state(), num_rounds=3)
        grid.close()
        assert not strategy.record.failed
        merged = {module: delta.total() for module, delta in strategy.server_state.base_delta.items()}
        ends.append({**strategy.server_state.state, **merged})
        metrics.append(strategy.record.clients)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())
    assert metrics[0] == metrics[1]
    assert all("accuracy" in entry for entry in metrics[0].values())

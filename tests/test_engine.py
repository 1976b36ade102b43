"""The in-process grid and the metered grid: isolation, failures, stable ids, counted bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import flwr
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.byte_counts import payload_bytes, wire_bytes
from federated.engines.inprocess import TESTED_FLOWER, InProcessGrid, node_id_of
from federated.engines.metered import MeteredGrid
from federated.ledger import Ledger
from federated.messages import NUM_VALUES, SERVER_ROUND
from federated.payload import ARRAYS, CONFIG


def broadcast(grid: InProcessGrid, values: np.ndarray, client_ids: list[int]) -> list[Message]:
    config = ConfigRecord({SERVER_ROUND: 1, NUM_VALUES: int(values.size)})
    content = RecordDict({ARRAYS: ArrayRecord({"state": Array(values)}), CONFIG: config})
    return [grid.create_message(content, "train", node_id_of(i), "1") for i in client_ids]


def counting_app() -> ClientApp:
    """Each client adds 1 to what it received and counts its own messages."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        calls = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1
        context.state["calls"] = MetricRecord({"n": calls})
        received = message.content[ARRAYS]["state"].numpy()
        if context.node_config["partition-id"] == 2:
            raise RuntimeError("client 2 always fails")
        message.content[ARRAYS]["state"] = Array(received + 1)  # a careless client edits its message in place
        message.content[CONFIG]["calls"] = calls
        return Message(message.content, reply_to=message)

    return app


def test_the_installed_flower_is_in_the_tested_range() -> None:
    assert any(flwr.__version__.startswith(f"{tested}.") for tested in TESTED_FLOWER), (
        f"flwr {flwr.__version__} is not tested: run the suite with it, then extend TESTED_FLOWER"
    )


def test_clients_do_not_reach_each_other_through_a_shared_message() -> None:
    grid = InProcessGrid(counting_app(), 3)
    replies = grid.send_and_receive(broadcast(grid, np.zeros(4, np.float32), [0, 1]))
    for reply in replies:
        np.testing.assert_array_equal(reply.content[ARRAYS]["state"].numpy(), np.ones(4))


def test_a_raising_client_becomes_an_error_reply_and_the_others_answer() -> None:
    grid = InProcessGrid(counting_app(), 4)
    replies = list(grid.send_and_receive(broadcast(grid, np.zeros(4, np.float32), [0, 1, 2, 3])))
    failed = [reply for reply in replies if reply.has_error()]
    assert [reply.metadata.src_node_id for reply in failed] == [node_id_of(2)]
    assert "client 2 always fails" in failed[0].error.reason
    assert len(replies) == 4


class _OwnKind(BaseException):
    """What is no Exception, as some libraries use it."""


def _exits(message: Message, context: Context) -> object:
    sys.exit("the client has had enough")


def _raises_its_own_kind(message: Message, context: Context) -> object:
    raise _OwnKind("no Exception")


def _returns_nothing(message: Message, context: Context) -> object:
    return None


def _returns_records(message: Message, context: Context) -> object:
    return message.content


def _spoils_its_state(message: Message, context: Context) -> object:
    context.state = {"not": "records"}  # type: ignore[assignment]
    return Message(RecordDict(), reply_to=message)


def _writes_to_the_terminal(message: Message, context: Context) -> object:
    raise RuntimeError("\x1b[2J\x1b]0;title\x07\u202eno\n" + "x" * 10_000_000)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (_exits, "SystemExit: the client has had enough"),
        (_raises_its_own_kind, "_OwnKind: no Exception"),
        (_returns_nothing, "this one: NoneType"),
        (_returns_records, "this one: RecordDict"),
        (_spoils_its_state, "state: dict"),
        (_writes_to_the_terminal, "RuntimeError: no xxx"),
    ],
)
def test_whatever_a_client_does_it_alone_has_failed(
    does: Callable[[Message, Context], object],
    reason: str,
    num_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.set_num_threads(1)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            return does(message, context)  # type: ignore[return-value]
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, num_workers=num_workers)
    for _ in range(2):
        replies = list(grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [0, 1, 2])))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert reason in replies[1].error.reason
        assert len(replies[1].error.reason) < 1000
    assert "\x1b" not in caplog.text + replies[1].error.reason
    assert len(caplog.text) < 10_000
    grid.close()


def test_the_users_interrupt_ends_the_run_though_a_client_is_running() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = InProcessGrid(app, 2)
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [0, 1]))


def test_a_client_that_the_deadline_finds_running_in_one_process_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, ended = ClientApp(), threading.Event()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            while "still runs" not in caplog.text:  # it is named while it runs, for it may never end
                ended.wait(0.01)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3)
    messages = broadcast(grid, np.zeros(2, np.float32), [0, 1, 2])
    replies = list(grid.send_and_receive(messages, timeout=0.2))
    assert [reply.metadata.src_node_id for reply in replies] == [node_id_of(0), node_id_of(1)]
    assert "client 1 still runs after federation.timeout_seconds" in caplog.text
    assert "client 1 ended" in caplog.text
    assert "no reply from clients [2]" in caplog.text


def test_client_state_persists_between_messages_and_is_not_committed_on_failure() -> None:
    grid = InProcessGrid(counting_app(), 3)
    for expected in (1, 2, 3):
        replies = list(grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [0, 2])))
        assert replies[0].content[CONFIG]["calls"] == expected
    assert "calls" not in grid.context(2).state


def test_a_context_exists_only_once_its_client_was_called() -> None:
    grid = InProcessGrid(counting_app(), 10_000)
    list(grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [7])))
    assert len(list(grid.get_node_ids())) == 10_000
    assert len(grid._contexts) == 1


def test_the_order_of_execution_does_not_change_the_order_of_replies() -> None:
    executed: list[int] = []
    grid = InProcessGrid(
        counting_app(),
        3,
        execution_order=lambda messages: list(reversed(messages)),
        on_reply=lambda client_id, status: executed.append(client_id),
    )
    replies = grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [0, 1]))
    assert executed == [1, 0]
    assert [reply.metadata.src_node_id for reply in replies] == [node_id_of(0), node_id_of(1)]


def test_a_timeout_leaves_clients_without_a_reply() -> None:
    grid = InProcessGrid(counting_app(), 3)
    assert list(grid.send_and_receive(broadcast(grid, np.zeros(2, np.float32), [0, 1]), timeout=0.0)) == []


def test_the_ledger_holds_the_length_of_what_was_sent() -> None:
    inner = InProcessGrid(counting_app(), 4)
    ledger = Ledger()
    grid = MeteredGrid(inner, ledger, {node_id_of(i): i for i in range(4)}.__getitem__)
    messages = broadcast(inner, np.zeros(1000, np.float32), [0, 1, 2])
    sent = wire_bytes(messages[0].content)
    replies = list(grid.send_and_receive(messages))
    downlinks = list(ledger.select(direction="downlink"))
    assert [row.payload_bytes for row in downlinks] == [4000] * 3
    assert [row.wire_bytes for row in downlinks] == [sent] * 3
    assert [row.parameters for row in downlinks] == [1000] * 3
    assert [row.status for row in downlinks] == ["ok", "ok", "failed"]
    answered = {reply.metadata.src_node_id: reply for reply in replies}
    for row in ledger.select(direction="uplink", status="ok"):
        reply = answered[node_id_of(row.client_id)]
        assert row.wire_bytes == wire_bytes(reply.content)
        assert row.payload_bytes == payload_bytes(reply.content) == 4000


def test_a_silent_client_still_costs_its_downlink() -> None:
    inner = InProcessGrid(counting_app(), 2)
    ledger = Ledger()
    grid = MeteredGrid(inner, ledger, {node_id_of(i): i for i in range(2)}.__getitem__)
    list(grid.send_and_receive(broadcast(inner, np.zeros(10, np.float32), [0, 1]), timeout=0.0))
    assert [(row.direction, row.status, row.payload_bytes) for row in ledger.rows] == [
        ("downlink", "failed", 40),
        ("downlink", "failed", 40),
    ]


@pytest.mark.parametrize("told", ["many", [1, 2], -3, 0.5])
def test_a_reply_that_miscounts_its_values_does_not_stop_the_ledger(told: str | list[int] | float) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({CONFIG: ConfigRecord({NUM_VALUES: told})}), reply_to=message)

    grid, ledger = InProcessGrid(app, 2), Ledger()
    metered = MeteredGrid(grid, ledger, lambda node_id: node_id - node_id_of(0))
    list(metered.send_and_receive(broadcast(grid, np.zeros(4, np.float32), [0])))
    assert [(row.direction, row.parameters) for row in ledger.rows] == [("downlink", 4), ("uplink", 0)]

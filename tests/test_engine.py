"""The in-process grid and the metered grid: isolation, failures, stable ids, counted bytes."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterable

import flwr
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from federated.communication.ledger import Ledger
from federated.communication.messages import NUM_VALUES, SERVER_ROUND
from federated.communication.metered_grid import MeteredGrid
from federated.communication.payload import ARRAYS, CONFIG
from federated.engines.inprocess import TESTED_FLOWER, InProcessGrid, node_id_of


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


class _SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def _raises_without_words(message: Message, context: Context) -> object:
    raise _SpeechlessError


def _answers_what_cannot_be_sent(message: Message, context: Context) -> object:
    return Message(RecordDict({"config": ConfigRecord({"text": "\udcff"})}), reply_to=message)


def _keeps_what_cannot_be_sent(message: Message, context: Context) -> object:
    context.state["config"] = ConfigRecord({"number": 2**70})
    return Message(RecordDict(), reply_to=message)


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
        (_raises_without_words, "_SpeechlessError"),
        (_answers_what_cannot_be_sent, "surrogates not allowed"),
        (_keeps_what_cannot_be_sent, "ValueError"),
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
    replies = list(grid.send_and_receive(messages))
    downlinks = list(ledger.select(direction="downlink"))
    assert [row.payload_bytes for row in downlinks] == [4000] * 3
    assert [row.wire_bytes for row in downlinks] == [as_flower_serialises(m) for m in messages]
    assert [row.parameters for row in downlinks] == [1000] * 3
    assert [row.status for row in downlinks] == ["ok", "ok", "failed"]
    uplinks = list(ledger.select(direction="uplink"))
    assert [row.wire_bytes for row in uplinks] == [as_flower_serialises(reply) for reply in replies]
    assert [row.payload_bytes for row in uplinks] == [4000, 4000, 0]
    assert [row.parameters for row in uplinks] == [1000, 1000, 0]
    assert [row.status for row in uplinks] == ["ok", "ok", "failed"]
    assert uplinks[2].wire_bytes > len("client 2 always fails")


def as_flower_serialises(message: Message) -> int:
    """The bytes of all objects that Flower pushes for a message: records, arrays, chunks and the message."""
    return sum(len(item.deflate()) for item in get_all_nested_objects(message).values())


class TwiceGrid(InProcessGrid):
    """Delivers every reply twice, and one from a node that nobody knows."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        stranger = copy.deepcopy(replies[0])
        stranger.metadata.__dict__["_src_node_id"] = 5
        return [*replies, stranger, *replies]


def test_replies_that_come_twice_are_counted_twice(caplog: pytest.LogCaptureFixture) -> None:
    grid, ledger = TwiceGrid(counting_app(), 4), Ledger()
    metered = MeteredGrid(grid, ledger, lambda node_id: node_id - node_id_of(0))
    replies = metered.send_and_receive(broadcast(grid, np.zeros(10, np.float32), [0, 2]))
    uplinks = [(row.client_id, row.status, row.wire_bytes) for row in ledger.select(direction="uplink")]
    ok, error = (as_flower_serialises(reply) for reply in list(replies)[:2])
    assert uplinks == [(0, "ok", ok)] * 2 + [(2, "failed", error)] * 2
    assert len(list(ledger.select(direction="downlink"))) == 2
    assert "bytes came from a node that nothing was sent to" in caplog.text


def test_a_silent_client_still_costs_its_downlink() -> None:
    inner = InProcessGrid(counting_app(), 2)
    ledger = Ledger()
    grid = MeteredGrid(inner, ledger, {node_id_of(i): i for i in range(2)}.__getitem__)
    list(grid.send_and_receive(broadcast(inner, np.zeros(10, np.float32), [0, 1]), timeout=0.0))
    assert [(row.direction, row.status, row.payload_bytes) for row in ledger.rows] == [
        ("downlink", "failed", 40),
        ("downlink", "failed", 40),
    ]


@pytest.mark.parametrize("told", ["many", [1, 2], -3, 0.5, 10**12])
def test_what_a_reply_says_of_its_values_counts_for_nothing(told: str | list[int] | float) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        array = Array(np.zeros(6, np.float32))
        array.shape = (10**12,)  # neither does this
        content = RecordDict({CONFIG: ConfigRecord({NUM_VALUES: told}), ARRAYS: ArrayRecord({"a": array})})
        return Message(content, reply_to=message)

    grid, ledger = InProcessGrid(app, 2), Ledger()
    metered = MeteredGrid(grid, ledger, lambda node_id: node_id - node_id_of(0))
    list(metered.send_and_receive(broadcast(grid, np.zeros(4, np.float32), [0])))
    rows = [(row.direction, row.parameters, row.payload_bytes) for row in ledger.rows]
    assert rows == [("downlink", 4, 16), ("uplink", 6, 24)]


def test_records_of_another_kind_do_not_stop_the_ledger() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({ARRAYS: MetricRecord({"a": 1}), CONFIG: MetricRecord()}), reply_to=message)

    grid, ledger = InProcessGrid(app, 2), Ledger()
    metered = MeteredGrid(grid, ledger, lambda node_id: node_id - node_id_of(0))
    list(metered.send_and_receive(broadcast(grid, np.zeros(4, np.float32), [0])))
    assert [(row.direction, row.payload_bytes) for row in ledger.rows] == [("downlink", 16), ("uplink", 0)]

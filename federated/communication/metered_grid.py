"""A grid around any other grid: every message that crosses it becomes a row of the ledger.

Outside the engine, so that the in-process grid and Flower's own engines are counted by the same code, from
the very messages that were sent and received. A client that fails or never answers still received its
downlink: its row says ``failed`` and its bytes count.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from federated.communication.byte_counts import message_object_bytes, num_items, payload_bytes, wire_bytes
from federated.communication.ledger import Direction, Ledger, Phase, Transfer
from federated.communication.messages import NUM_VALUES, SERVER_ROUND
from federated.communication.payload import CONFIG
from federated.communication.simulated_clock import SimulatedClock

log = logging.getLogger(__name__)

Delivery = Callable[[Sequence[Message], float | None], Iterable[Message]]
"""(messages, timeout in seconds) -> the replies."""

Entered = dict[int, list[tuple[Transfer, Message | None]]]
"""Node id -> the rows of a broadcast, each with the reply that it is of."""

_PHASE_OF: dict[str, Phase] = {"train": "train", "evaluate": "evaluate", "query": "setup"}


class MeteredGrid(Grid):
    """Forwards to ``grid`` and enters each transfer of ``send_and_receive`` into ``ledger``.

    Args:
        grid: The grid that carries the messages.
        ledger: Where the rows go, in the order of the client ids.
        client_of: Client id of a node id.
        num_values: How many values a reply carries; by default the items of its arrays.
        deliver: (messages, timeout) -> their replies, where that is not the grid's own way.
        clock: Times the messages, and refuses late ones once they are counted.
    """

    def __init__(
        self,
        grid: Grid,
        ledger: Ledger,
        client_of: Callable[[int], int],
        num_values: Callable[[Message], int] = num_items,
        *,
        deliver: Delivery | None = None,
        clock: SimulatedClock | None = None,
    ) -> None:
        self._grid = grid
        self._deliver = delivery_by(grid) if deliver is None else deliver
        self._ledger = ledger
        self._client_of = client_of
        self._num_values = num_values
        self._clock = clock

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, wait, and count both directions."""
        sent = sorted(messages, key=lambda message: self._client_of(message.metadata.dst_node_id))
        if not sent:
            return []
        sizes = wire_sizes(sent)
        replies = list(self._deliver(sent, timeout))
        pairs = list(zip(sent, sizes, strict=True))
        entered = enter(self._ledger, pairs, replies, self._client_of, self._num_values, clock=self._clock)
        return replies if self._clock is None else self._clock.on_time(sent, entered)

    # ---- the rest of the interface is the inner grid's

    def set_run(self, run: Run) -> None:
        """Forward."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Forward."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Forward."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Forward."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse: messages pushed and pulled apart would escape the ledger."""
        raise NotImplementedError("a metered run sends with send_and_receive, so that each byte is counted")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse, as ``push_messages``."""
        raise NotImplementedError("a metered run sends with send_and_receive, so that each byte is counted")


def delivery_by(grid: Grid) -> Delivery:
    """Return a grid's own way to deliver messages."""
    return lambda messages, timeout: grid.send_and_receive(messages, timeout=timeout)


def wire_sizes(messages: Sequence[Message]) -> list[int]:
    """Return the wire bytes of each message; the records of a broadcast are serialised once."""
    contents = {id(message.content): message.content for message in messages}
    sizes = {key: wire_bytes(content) for key, content in contents.items()}
    return [sizes[id(message.content)] + message_object_bytes(message) for message in messages]


def enter(
    ledger: Ledger,
    sent: Sequence[tuple[Message, int]],
    replies: Sequence[Message],
    client_of: Callable[[int], int],
    num_values: Callable[[Message], int] = num_items,
    *,
    clock: SimulatedClock | None = None,
) -> Entered:
    """Enter what was sent and every reply that came, second ones and errors too, into a ledger.

    Args:
        ledger: Where the rows go, client by client.
        sent: Messages and their wire bytes, one a client.
        replies: In any order. What comes from elsewhere can be ascribed to no client and is only logged.
        client_of: Client id of a node id.
        num_values: How many values a reply carries.
        clock: Times the rows; None: they have no times.

    Returns:
        Node id -> its rows, each with its reply; the downlink's has none.
    """
    entered: Entered = {}
    of_node: dict[int, list[Message]] = {message.metadata.dst_node_id: [] for message, _ in sent}
    for reply in replies:
        if reply.metadata.src_node_id in of_node:
            of_node[reply.metadata.src_node_id].append(reply)
        else:
            log.warning("%d bytes came from a node that nothing was sent to", wire_bytes(reply))
    for message, wire in sent:
        answers = of_node[message.metadata.dst_node_id]
        row = functools.partial(_row, message, client_of(message.metadata.dst_node_id))
        told = cast(Mapping[str, int], message.content[CONFIG]).get(NUM_VALUES, 0)
        counts = (told, payload_bytes(message), wire)
        rows = [row("downlink", counts, failed=not any(reply.has_content() for reply in answers))]
        for reply in answers:
            counts = (num_values(reply), payload_bytes(reply), wire_bytes(reply))
            rows.append(row("uplink", counts, failed=not reply.has_content()))
        rows = rows if clock is None else clock.timed(rows)
        for each in rows:
            ledger.append(each)
        entered[message.metadata.dst_node_id] = list(zip(rows, [None, *answers], strict=True))
    return entered


def _row(
    request: Message, client_id: int, direction: Direction, counts: tuple[int, int, int], *, failed: bool
) -> Transfer:
    server_round = int(cast(Mapping[str, int], request.content[CONFIG])[SERVER_ROUND])
    phase = _PHASE_OF[request.metadata.message_type.partition(".")[0]]
    return Transfer(server_round, client_id, direction, phase, "failed" if failed else "ok", *counts)

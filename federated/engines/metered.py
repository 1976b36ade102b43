"""A grid around any other grid: every message that crosses it becomes a row of the ledger.

Where it stands in a round: outside the engine, so that the in-process grid and Flower's own engines are
counted by the same code, from the very messages that were sent and received. A client that fails or never
answers still received its downlink: its row says ``failed`` and its bytes count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from federated.byte_counts import payload_bytes, wire_bytes
from federated.ledger import Direction, Ledger, Phase, Transfer
from federated.messages import NUM_VALUES, SERVER_ROUND
from federated.payload import CONFIG


class MeteredGrid(Grid):
    """Forwards to ``grid`` and enters each transfer of ``send_and_receive`` into ``ledger``.

    Args:
        grid: The grid that carries the messages.
        ledger: Where the rows go, in the order of the client ids.
        client_of: Client id of a node id.
    """

    def __init__(self, grid: Grid, ledger: Ledger, client_of: Callable[[int], int]) -> None:
        self._grid = grid
        self._ledger = ledger
        self._client_of = client_of

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, wait, and count both directions."""
        sent = sorted(messages, key=lambda message: self._client_of(message.metadata.dst_node_id))
        if not sent:
            return []
        # The records of a broadcast are shared between its messages: serialise them once.
        contents = {id(message.content): message.content for message in sent}
        sizes = {key: wire_bytes(content) for key, content in contents.items()}
        replies = list(self._grid.send_and_receive(sent, timeout=timeout))
        answered = {reply.metadata.src_node_id: reply for reply in replies}
        for message in sent:
            reply = answered.get(message.metadata.dst_node_id)
            failed = reply is None or reply.has_error()
            self._enter(message, message.content, "downlink", wire=sizes[id(message.content)], failed=failed)
            if reply is not None:
                content = reply.content if reply.has_content() else None
                wire = wire_bytes(content) if content is not None else 0
                self._enter(message, content, "uplink", wire=wire, failed=failed)
        return replies

    def _enter(
        self, request: Message, content: RecordDict | None, direction: Direction, *, wire: int, failed: bool
    ) -> None:
        config = None if content is None else content.get(CONFIG)
        told = config.get(NUM_VALUES) if isinstance(config, ConfigRecord) else 0
        self._ledger.append(
            Transfer(
                server_round=int(cast(Mapping[str, int], request.content[CONFIG])[SERVER_ROUND]),
                client_id=self._client_of(request.metadata.dst_node_id),
                direction=direction,
                phase=cast(Phase, request.metadata.message_type.partition(".")[0]),
                status="failed" if failed else "ok",
                parameters=told if isinstance(told, int) and told >= 0 else 0,  # a client may write nonsense
                payload_bytes=0 if content is None else payload_bytes(content),
                wire_bytes=wire,
            )
        )

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

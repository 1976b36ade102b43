"""Which client each node of Flower's own engines is: asked before round 1."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from federated.communication.foreign_text import shown
from federated.communication.ledger import Ledger
from federated.communication.messages import CLIENT_ID, SERVER_ROUND
from federated.communication.metered_grid import enter, wire_sizes
from federated.communication.payload import CONFIG, METRICS
from models.errors import UserError


def ask_client_ids(grid: Grid, num_clients: int, ledger: Ledger, *, timeout: float) -> dict[int, int]:
    """Ask every node which client it is, so that cohorts are the same on every engine.

    Question and answers are the phase ``setup`` of the ledger.

    Raises:
        UserError: Too few nodes came, or two nodes are the same client.
    """
    deadline = time.monotonic() + timeout
    while len(node_ids := list(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(node_ids)} nodes connected within {timeout:.0f} s for {num_clients} clients: "
                "start one SuperNode a client, or set partition.num_clients"
            )
        time.sleep(1.0)
    question = RecordDict({CONFIG: ConfigRecord({SERVER_ROUND: 0})})
    messages = [
        Message(question, dst_node_id=node_id, message_type=MessageType.QUERY) for node_id in node_ids
    ]
    sizes = wire_sizes(messages)
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    clients = _clients_that_answered(replies)
    client_of = {node_id: client_id for client_id, node_id in clients.items()}
    sent = [(m, size) for m, size in zip(messages, sizes, strict=True) if m.metadata.dst_node_id in client_of]
    sent.sort(key=lambda pair: client_of[pair[0].metadata.dst_node_id])
    enter(ledger, sent, replies, client_of.__getitem__)
    missing = [client_id for client_id in range(num_clients) if client_id not in clients]
    if missing:
        raise UserError(f"no node answered for client {missing[0]}: give one the partition-id {missing[0]}")
    return clients


def _clients_that_answered(replies: Iterable[Message]) -> dict[int, int]:
    """Return the node of each client, from the answers of the nodes.

    Raises:
        UserError: A node failed or gave no client id, or two nodes are the same client.
    """
    clients: dict[int, int] = {}
    for reply in replies:
        node_id = reply.metadata.src_node_id
        if not reply.has_content():
            reason = shown(str(reply.error.reason)) if reply.has_error() else "its reply is empty"
            raise UserError(f"node {node_id} failed at start: {reason}")
        metrics = reply.content.get(METRICS)
        client_id = metrics.get(CLIENT_ID) if isinstance(metrics, MetricRecord) else None
        if not isinstance(client_id, int):
            raise UserError(f"node {node_id} did not say which client it is: install the same fedlora on it")
        if client_id in clients:
            raise UserError(f"two nodes say they are client {client_id}: give each its own partition-id")
        clients[client_id] = node_id
    return clients

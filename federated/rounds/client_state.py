"""What a client keeps between rounds, in its own ``Context.state``: named arrays and their versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from federated.methods import NEVER
from models.errors import UserError
from models.state import State

HELD, VERSION, CODEC_MEMORY, METHOD_MEMORY = "held", "version", "codec-memory", "method-memory"
MERGED, MERGED_VERSION = "merged", "merged-version"
"""Keys in ``Context.state``: the wire state a client holds, its version, what its codec still owes and what
its method remembers; what has been merged into each base weight, as one sum, and the version of that."""


def keep(context: Context, key: str, state: State) -> None:
    """Store named arrays in the client's own state; they reach it again with its next message."""
    context.state[key] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})


def recall(context: Context, key: str) -> State:
    """Return what ``keep`` stored under ``key``; empty when this client has stored nothing yet."""
    if key not in context.state:
        return {}
    record = cast(Mapping[str, Array], context.state[key])
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def check_version(context: Context, key: str, since: int) -> None:
    """Refuse a downlink that holds only what changed since a version that this client never had.

    Args:
        context: The client's.
        key: ``VERSION`` or ``MERGED_VERSION``.
        since: That version.

    Raises:
        UserError: It is newer than what the client holds.
    """
    if since > (version := held_version(context, key)):
        raise UserError(
            f"client {client_id_of(context)} has lost its state: it was sent what changed since round "
            f"{since}, and holds round {version}; the server's next message to it will bring everything"
        )


def held_version(context: Context, key: str) -> int:
    """Return the version kept under a key; ``NEVER`` where there is none."""
    if key not in context.state:
        return NEVER
    return int(cast(Mapping[str, int], context.state[key])[key])


def keep_version(context: Context, key: str, version: int) -> None:
    """Store a version under a key."""
    context.state[key] = ConfigRecord({key: version})


def client_id_of(context: Context) -> int:
    """Return which client a context is of."""
    return int(cast(int, context.node_config["partition-id"]))

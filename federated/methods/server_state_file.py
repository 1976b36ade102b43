"""The server's state as one set of named tensors and a few numbers, and back: what a checkpoint stores.

After it. Whoever writes the file (safetensors, JSON) need not know what an aggregator remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from federated.methods.base_delta import BaseDelta, BaseUpdate, split_updates, updates_to_state
from federated.methods.protocol import NEVER, ServerState
from models.state import State

_STATE, _MEMORY, _DENSE = "state/", "memory/", "dense/"


def save_server(server: ServerState) -> tuple[State, dict[str, Any]]:
    """Return everything a server carries: tensors by name, and the rest as JSON values."""
    tensors = {_STATE + name: tensor for name, tensor in server.state.items()}
    tensors |= {_MEMORY + name: tensor for name, tensor in server.memory.items()}
    dense_versions = {}
    for module, delta in server.base_delta.items():
        tensors |= updates_to_state({module: BaseUpdate(delta.terms)})
        if delta.dense is not None:
            tensors[_DENSE + module] = delta.dense
            dense_versions[module] = delta.dense_version
    numbers = {
        "server_round": server.server_round,
        "scaling": dict(server.scaling),
        "dense_versions": dense_versions,
    }
    return {name: tensors[name].contiguous() for name in sorted(tensors)}, numbers


def load_server(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> ServerState:
    """Undo ``save_server``; the result continues bit for bit."""
    others, updates = split_updates(tensors)
    dense_versions = numbers["dense_versions"]
    base_delta = {
        module: BaseDelta(update.terms, others.get(_DENSE + module), dense_versions.get(module, NEVER))
        for module, update in sorted(updates.items())
    }
    return ServerState(
        state=_under(_STATE, others),
        scaling=dict(numbers["scaling"]),
        server_round=int(numbers["server_round"]),
        base_delta=base_delta,
        memory=_under(_MEMORY, others),
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(prefix): tensors[name] for name in sorted(tensors) if name.startswith(prefix)}

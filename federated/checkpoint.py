"""The server's part of a checkpoint: everything a later round needs beyond the configuration.

Where it stands in a round: written at its end, beside ``checkpoint/state.safetensors`` (the global adapter
and head alone, for whoever wants to look at them). ``server.safetensors`` holds the aggregator's whole state,
with what was merged into the base and the memory of server optimizer and SCAFFOLD, and what the server knows
of its clients: which version each holds and its present rank. What clients keep lives in their
``Context.state``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from federated.aggregators import ServerState, load_server, save_server
from models.errors import UserError
from models.state import save_state

SERVER_FILE = "server.safetensors"


@dataclass(frozen=True, eq=False)
class ServerCheckpoint:
    """What the server carries from round to round.

    Attributes:
        server: The aggregator's state.
        versions: Client id -> version of the last downlink that it answered.
        ranks: Client id -> present adapter rank, where it has changed.
    """

    server: ServerState
    versions: dict[int, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)


def save_server_checkpoint(folder: Path, checkpoint: ServerCheckpoint) -> None:
    """Write ``server.safetensors`` into a checkpoint folder, whole or not at all."""
    tensors, numbers = save_server(checkpoint.server)
    notes = {"server": numbers, "versions": checkpoint.versions, "ranks": checkpoint.ranks}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in notes.items()}
    save_state(tensors, folder / SERVER_FILE, metadata)


def load_server_checkpoint(folder: Path) -> ServerCheckpoint:
    """Read what ``save_server_checkpoint`` wrote; the rounds that follow are bit for bit the same.

    Raises:
        UserError: There is no such file.
    """
    path = folder / SERVER_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: the run stopped before its first round, start it again")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}  # noqa: SIM118
        notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    return ServerCheckpoint(
        server=load_server(tensors, notes["server"]),
        versions={int(client_id): version for client_id, version in notes["versions"].items()},
        ranks={int(client_id): rank for client_id, rank in notes["ranks"].items()},
    )

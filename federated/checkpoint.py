"""The server's part of a checkpoint: everything a later round needs beyond the configuration.

Where it stands in a round: written at its end, beside ``checkpoint/state.safetensors`` (the global adapter
and head alone, for whoever wants to look at them); the folder is committed whole. ``server.safetensors``
holds the aggregator's whole state, with what was merged into the base and the memory of server optimizer and
SCAFFOLD, and what the server knows of its clients: which version each holds and its present rank. What
clients keep lives in their ``Context.state``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from federated.aggregators import ServerState, load_server, save_server
from models.committed_folders import check_committed, committed_folder, current_folder
from models.errors import UserError
from models.state import State, save_state

SERVER_FILE, STATE_FILE = "server.safetensors", "state.safetensors"
CHECKPOINT_FILES = (SERVER_FILE, STATE_FILE)


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


def save_checkpoint(
    folder: Path,
    state: State,
    *,
    server_round: int,
    server: ServerCheckpoint | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Replace a run's checkpoint, whole or not at all.

    Args:
        folder: ``checkpoint/``.
        state: The global state.
        server_round: The round that it is of.
        server: What the server carries besides; None for central training.
        notes: What the manifest says of the run.
    """
    with committed_folder(folder, CHECKPOINT_FILES, notes=notes) as fresh:
        save_state(state, fresh / STATE_FILE, {"server_round": str(server_round)})
        if server is not None:
            save_server_checkpoint(fresh, server)


def save_server_checkpoint(folder: Path, checkpoint: ServerCheckpoint) -> None:
    """Write ``server.safetensors`` into a folder."""
    tensors, numbers = save_server(checkpoint.server)
    notes = {"server": numbers, "versions": checkpoint.versions, "ranks": checkpoint.ranks}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in notes.items()}
    save_state(tensors, folder / SERVER_FILE, metadata)


def load_server_checkpoint(folder: Path) -> ServerCheckpoint:
    """Read what ``save_server_checkpoint`` wrote; the rounds that follow are bit for bit the same.

    Raises:
        UserError: There is no such file, or the folder is not as it was committed.
    """
    folder = current_folder(folder)
    check_committed(folder, CHECKPOINT_FILES)
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

"""The server's part of a checkpoint: everything a later round needs beyond the configuration.

``server.safetensors`` holds the aggregator's whole state, with what was merged into the base and the memory
of server optimizer and SCAFFOLD, and what the server knows of its clients: which version each holds and its
present rank. What clients keep lives in their ``Context.state``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from federated.methods import NEVER, ServerState, load_server, save_server
from lora.config import MAX_RANK
from models.committed_folders import check_committed, committed_folder, current_folder
from models.errors import UserError
from models.state import State, save_state
from models.untrusted import check, parse_json, parsing, read_tensors

SERVER_FILE, STATE_FILE = "server.safetensors", "state.safetensors"
CHECKPOINT_FILES = (SERVER_FILE, STATE_FILE)

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Version = Annotated[int, Field(ge=NEVER, lt=2**63)]
_ClientId = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]


class _Numbers(TypedDict):
    """The aggregator's part of the metadata, ``save_server``'s numbers."""

    server_round: _Count
    scaling: dict[str, Annotated[float, Field(allow_inf_nan=False)]]
    dense_versions: dict[str, _Version]


class _Notes(TypedDict):
    """The metadata of ``server.safetensors``."""

    server: _Numbers
    versions: dict[_ClientId, _Version]
    ranks: dict[_ClientId, Annotated[int, Field(ge=1, le=MAX_RANK)]]
    parts: dict[str, Any]


_NOTES = TypeAdapter(_Notes)


class Part(Protocol):
    """Something of the server's that crosses rounds besides the aggregator's state: one entry in a commit.

    Whoever remembers something from round to round (early stopping, a clock) has these two methods and an
    entry in ``federated.rounds.server.Served.parts``. ``state`` is asked at the end of every round, round 0
    included; ``restore`` is told it, once, before the first round that is played after a resumption.
    """

    def state(self) -> Any:
        """Return what the rounds to come need, JSON values (numbers, texts, lists, mappings by text)."""

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned.

        Raises:
            UserError: It is not such a state.
        """


@dataclass(frozen=True, eq=False)
class ServerCheckpoint:
    """What the server carries from round to round.

    Attributes:
        server: The aggregator's state.
        versions: Client id -> version of the last downlink that it answered.
        ranks: Client id -> present adapter rank, where it has changed.
        parts: Name -> what that ``Part`` remembers.
    """

    server: ServerState
    versions: dict[int, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)


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
    notes["parts"] = checkpoint.parts
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
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the run stopped before its first round, start it again")
    tensors, metadata = read_tensors(path)
    found = {name: parse_json(text.encode(), f"{path}, {name}") for name, text in metadata.items()}
    notes = check(_NOTES, found, path)
    with parsing(path, "is no server's state", "copy the checkpoint again"):
        server = load_server(tensors, notes["server"])
    return ServerCheckpoint(
        server=server,
        versions={int(client_id): version for client_id, version in notes["versions"].items()},
        ranks={int(client_id): rank for client_id, rank in notes["ranks"].items()},
        parts=notes["parts"],
    )

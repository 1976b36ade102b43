"""What clients keep between rounds, on the disk: written for those that changed, alike arrays once.

At the end of a round the states of the clients that took part go into one new file. It names each array by
its content: an array that an earlier file holds, as the one that every client of the same version received,
is not written again. A commit lists the files that it needs with their SHA-256. A file of which most is no
longer needed is dropped; what is still needed of it goes into the newest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from models.committed_folders import sha256_of
from models.errors import UserError
from models.state import State, save_state
from models.untrusted import parse_json, read_tensors

CLIENT_FILES = "clients_*.safetensors"

Records = Mapping[str, State | dict[str, Any]]
"""Key in ``Context.state`` -> named arrays, or JSON values by name."""

_ENTRIES = "clients"
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Record(TypedDict, total=False):
    """One key of a client's state: the digests of its arrays by name, or its values."""

    arrays: dict[str, _Digest]
    values: dict[str, Any]


_READ_ENTRIES = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], dict[str, _Record]])


class ClientStates(Protocol):
    """An engine that keeps the clients' states, as ``federated.engines.inprocess`` does."""

    def context(self, client_id: int) -> Context:
        """Return a client's context."""

    def changed_clients(self) -> set[int]:
        """Return the clients whose state has changed since this was asked last."""


@dataclass(frozen=True)
class ClientIndex:
    """Where a commit's client states are.

    Attributes:
        files: Name -> SHA-256 of the files that hold them.
        entries: Client id -> the file that says what this client keeps.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[int, str] = field(default_factory=dict)


def records_of(state: RecordDict) -> dict[str, State | dict[str, Any]]:
    """Return a ``Context.state`` as named tensors and JSON values."""
    return {
        key: {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
        if isinstance(record, ArrayRecord)
        else dict(record)
        for key, record in state.items()
    }


def state_from(records: Records) -> RecordDict:
    """Undo ``records_of``."""
    state = RecordDict()
    for key, record in records.items():
        if any(isinstance(value, torch.Tensor) for value in record.values()):
            state[key] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in record.items()})
        else:
            values: dict[str, Any] = dict(record)
            state[key] = ConfigRecord(values)
    return state


@dataclass
class _File:
    """A file in use: the arrays in it with their bytes, and how many of those are still needed."""

    sha256: str
    arrays: dict[str, int]
    needed_bytes: int = 0

    @property
    def is_mostly_waste(self) -> bool:
        return 0 < 2 * self.needed_bytes < sum(self.arrays.values())


class ClientStore:
    """The files with the clients' states of one run.

    Args:
        folder: ``checkpoint/``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, _File] = {}
        self._entries: dict[int, str] = {}
        self._arrays: dict[int, frozenset[str]] = {}
        self._num_users: Counter[str] = Counter()
        self._place: dict[str, str] = {}

    @property
    def index(self) -> ClientIndex:
        """What a commit keeps of this store."""
        return ClientIndex({name: file.sha256 for name, file in self._files.items()}, dict(self._entries))

    def write(self, name: str, clients: Iterable[int], records_of_client: Callable[[int], Records]) -> None:
        """Write the states of clients into a new file; nothing where there is nothing to write.

        Args:
            name: Of the file, another one at each call.
            clients: Those whose state may have changed.
            records_of_client: Their states; asked for others, too, whose arrays move.
        """
        moving = {file for file, held in self._files.items() if held.is_mostly_waste}
        movers = {client for client, file in self._entries.items() if file in moving}
        if moving:
            movers |= {
                c for c, arrays in self._arrays.items() if any(self._place[a] in moving for a in arrays)
            }
        entries: dict[str, dict[str, Any]] = {}
        fresh: dict[str, torch.Tensor] = {}
        for client in sorted({*clients, *movers}):
            records = records_of_client(client)
            if not records and client not in self._entries:
                continue
            entries[str(client)], found = _entry_of(records)
            fresh |= {a: t for a, t in found.items() if a not in self._place or self._place[a] in moving}
            self._use(client, frozenset(found))
            self._entries[client] = name
        if entries:
            path = self._folder / name
            save_state(dict(sorted(fresh.items())), path, {_ENTRIES: json.dumps(entries)})
            self._add(name, sha256_of(path), fresh)
        self._drop_unused()

    def read(self, index: ClientIndex) -> dict[int, Records]:
        """Return the clients' states of a commit, and go on from there.

        Raises:
            UserError: A file is missing, or is not as it was written.
        """
        pool: dict[str, torch.Tensor] = {}
        written: dict[str, dict[str, dict[str, _Record]]] = {}
        for name, digest in sorted(index.files.items()):
            path = self._folder / name
            if not path.is_file() or sha256_of(path) != digest:
                raise UserError(f"{path} is missing, or is not the file that was committed")
            tensors, metadata = read_tensors(path)
            written[name] = parse_json(metadata.get(_ENTRIES, "").encode(), path, _READ_ENTRIES)
            pool |= tensors
            self._add(name, digest, tensors)
        states: dict[int, Records] = {}
        for client, name in index.entries.items():
            entry = written.get(name, {}).get(str(client))
            digests = (
                {a for record in entry.values() for a in record.get("arrays", {}).values()}
                if entry
                else set()
            )
            if entry is None or not digests <= pool.keys():
                raise UserError(f"{self._folder / name} does not hold the state of client {client}")
            self._use(client, frozenset(digests))
            self._entries[client] = name
            states[client] = {
                key: {array: pool[digest] for array, digest in record["arrays"].items()}
                if "arrays" in record
                else record["values"]
                for key, record in entry.items()
            }
        return states

    def _add(self, name: str, digest: str, tensors: State) -> None:
        self._files[name] = _File(digest, {a: max(t.nbytes, 1) for a, t in tensors.items()})
        for array in tensors:
            if array in self._place and self._num_users[array]:
                held = self._files[self._place[array]]
                held.needed_bytes -= held.arrays[array]
            self._place[array] = name
            if self._num_users[array]:
                self._files[name].needed_bytes += self._files[name].arrays[array]

    def _use(self, client: int, arrays: frozenset[str]) -> None:
        before = self._arrays.get(client, frozenset())
        for array in arrays - before:
            self._num_users[array] += 1
            if self._num_users[array] == 1 and array in self._place:
                file = self._files[self._place[array]]
                file.needed_bytes += file.arrays[array]
        for array in before - arrays:
            self._num_users[array] -= 1
            if not self._num_users[array]:
                del self._num_users[array]
                file = self._files[self._place[array]]
                file.needed_bytes -= file.arrays[array]
        self._arrays[client] = arrays

    def _drop_unused(self) -> None:
        named = set(self._entries.values())
        for name in [n for n, file in self._files.items() if not file.needed_bytes and n not in named]:
            for array in self._files.pop(name).arrays:
                if self._place.get(array) == name:
                    del self._place[array]


def _entry_of(records: Records) -> tuple[dict[str, _Record], dict[str, torch.Tensor]]:
    """Return what a file says of one client, and its arrays by digest."""
    entry: dict[str, _Record] = {}
    arrays: dict[str, torch.Tensor] = {}
    for key, record in records.items():
        if not any(isinstance(value, torch.Tensor) for value in record.values()):
            entry[key] = {"values": dict(record)}
            continue
        digests = {}
        for name, tensor in record.items():
            digests[name] = _digest(tensor)
            arrays[digests[name]] = tensor
        entry[key] = {"arrays": digests}
    return entry, arrays


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

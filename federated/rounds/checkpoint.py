"""A commit: everything that crosses from one round to the next, written at its end, whole or not at all.

``checkpoint/commit_AAA_RRRRRR/`` is the commit of round R in attempt A (a run that is resumed begins another
attempt): ``server.safetensors`` with the aggregator's whole state, with what was merged into the base and the
memory of server optimizer and SCAFFOLD; in its metadata what the server knows of its clients, where their own
states are (``federated.rounds.client_store``), what other parts remember, and how long the files were that
grow. Central training keeps ``checkpoint/state.safetensors`` instead.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from federated.methods import NEVER, ServerState, load_server, save_server
from federated.rounds.client_store import CLIENT_FILES, ClientIndex, ClientStore, Records
from lora.config import MAX_RANK
from models.committed_folders import MANIFEST_FILE, check_committed, committed_folder, current_folder
from models.errors import UserError
from models.state import State, save_state
from models.untrusted import check, parse_json, parsing, read_tensors

log = logging.getLogger(__name__)

SERVER_FILE, STATE_FILE = "server.safetensors", "state.safetensors"
CHECKPOINT_FILES = (SERVER_FILE, STATE_FILE)
_COMMIT = re.compile(r"commit_(\d{3,9})_(\d{6,9})")

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Version = Annotated[int, Field(ge=NEVER, lt=2**63)]
_ClientId = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_ClientFile = Annotated[str, Field(pattern=r"^clients_[0-9_]{1,40}\.safetensors$")]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Numbers(TypedDict):
    """The aggregator's part of the metadata, ``save_server``'s numbers."""

    server_round: _Count
    scaling: dict[str, _Finite]
    dense_versions: dict[str, _Version]


class _Clients(TypedDict):
    """Where the clients' states are: a ``ClientIndex``."""

    files: dict[_ClientFile, _Sha256]
    entries: dict[_ClientId, _ClientFile]


class _Progress(TypedDict):
    """How far the run is, as ``Progress``."""

    attempt: Annotated[int, Field(ge=1, lt=10**9)]
    elapsed_seconds: Annotated[_Finite, Field(ge=0)]
    best: Annotated[list[_Count | _Finite], Field(min_length=2, max_length=2)] | None
    lengths: dict[str, _Count]


class _Origin(TypedDict):
    """What the rounds so far were made of."""

    config: dict[str, Any]
    fingerprints: dict[str, Any]
    forks: list[dict[str, Any]]


class _Notes(TypedDict):
    """The metadata of ``server.safetensors``."""

    server: _Numbers
    versions: dict[_ClientId, _Version]
    ranks: dict[_ClientId, Annotated[int, Field(ge=1, le=MAX_RANK)]]
    parts: NotRequired[dict[str, Any]]
    clients: NotRequired[_Clients]
    progress: NotRequired[_Progress]
    origin: NotRequired[_Origin]


_NOTES = TypeAdapter(_Notes)


class Part(Protocol):
    """Something of the server's that crosses rounds besides the aggregator's state: one entry in a commit.

    Whoever remembers something from round to round (early stopping, a clock) has these two methods and an
    entry in ``federated.rounds.run_in_progress.Served.parts``. ``state`` is asked at the end of every round,
    round 0 included; ``restore`` is told it, once, before the first round that is played after a resumption.
    """

    def state(self) -> Any:
        """Return what the rounds to come need, JSON values (numbers, texts, lists, mappings by text)."""

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned.

        Raises:
            UserError: It is not such a state.
        """


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        attempt: 1, and one more each time that the run was resumed.
        elapsed_seconds: Of all attempts, up to this commit.
        best: Round and headline metric of what ``adapter_best/`` is to hold.
        lengths: File of the run folder that grows -> its bytes at this commit.
    """

    attempt: int = 1
    elapsed_seconds: float = 0.0
    best: tuple[int, float] | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What the rounds so far were made of; a resumed run must be made of the same.

    Attributes:
        config: The resolved configuration.
        fingerprints: Of rows, base weights and versions (``federated.rounds.fingerprints``).
        forks: The runs that this one was branched from, oldest first.
    """

    config: Mapping[str, Any]
    fingerprints: Mapping[str, Any]
    forks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class ServerCheckpoint:
    """Everything that crosses from one round to the next.

    Attributes:
        server: The aggregator's state.
        versions: Client id -> version of the last downlink that it answered.
        ranks: Client id -> present adapter rank, where it has changed.
        parts: Name -> what that ``Part`` remembers.
        clients: Where the clients' own states are.
        progress: How far the run is; None in a file that no run can be resumed from.
        origin: What the rounds so far were made of; likewise.
    """

    server: ServerState
    versions: dict[int, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    clients: ClientIndex = ClientIndex()
    progress: Progress | None = None
    origin: Origin | None = None


# ---- one file


def save_checkpoint(
    folder: Path, state: State, *, server_round: int, notes: Mapping[str, Any] | None = None
) -> None:
    """Replace the checkpoint of a central training, whole or not at all.

    Args:
        folder: ``checkpoint/``.
        state: The trained state.
        server_round: The epoch that it is of.
        notes: What the manifest says of the run.
    """
    with committed_folder(folder, CHECKPOINT_FILES, notes=notes) as fresh:
        save_state(state, fresh / STATE_FILE, {"server_round": str(server_round)})


def save_server_checkpoint(folder: Path, checkpoint: ServerCheckpoint) -> None:
    """Write ``server.safetensors`` into a folder."""
    tensors, numbers = save_server(checkpoint.server)
    notes: dict[str, Any] = {
        "server": numbers,
        "versions": checkpoint.versions,
        "ranks": checkpoint.ranks,
        "parts": checkpoint.parts,
        "clients": vars(checkpoint.clients),
    }
    if checkpoint.progress is not None and checkpoint.origin is not None:
        notes |= {"progress": vars(checkpoint.progress), "origin": vars(checkpoint.origin)}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in notes.items()}
    save_state(tensors, folder / SERVER_FILE, metadata)


def load_server_checkpoint(folder: Path) -> ServerCheckpoint:
    """Read what ``save_server_checkpoint`` wrote; the rounds that follow are bit for bit the same.

    Raises:
        UserError: There is no such file, or the folder is not as it was committed.
    """
    check_committed(folder, CHECKPOINT_FILES)
    path = folder / SERVER_FILE
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: the run stopped before its first round, start it again")
    tensors, metadata = read_tensors(path)
    notes = _read_notes(metadata, path)
    with parsing(path, "is no server's state", "copy the checkpoint again"):
        server = load_server(tensors, notes["server"])
    clients, progress, origin = notes.get("clients"), notes.get("progress"), notes.get("origin")
    return ServerCheckpoint(
        server=server,
        versions=_by_number(notes["versions"]),
        ranks=_by_number(notes["ranks"]),
        parts=notes.get("parts", {}),
        clients=ClientIndex(clients["files"], _by_number(clients["entries"])) if clients else ClientIndex(),
        progress=_progress_from(progress) if progress else None,
        origin=Origin(origin["config"], origin["fingerprints"], tuple(origin["forks"])) if origin else None,
    )


def _progress_from(notes: _Progress) -> Progress:
    best = notes["best"]
    return Progress(
        attempt=notes["attempt"],
        elapsed_seconds=notes["elapsed_seconds"],
        best=None if best is None else (int(best[0]), float(best[1])),
        lengths=notes["lengths"],
    )


def _read_notes(metadata: Mapping[str, str], path: Path) -> _Notes:
    found = {name: parse_json(text.encode(), f"{path}, {name}") for name, text in metadata.items()}
    notes: _Notes = check(_NOTES, found, path)
    return notes


def _by_number(entries: Mapping[str, Any]) -> dict[int, Any]:
    return {int(client_id): value for client_id, value in entries.items()}


# ---- the commits of a run


def commit_name(attempt: int, server_round: int) -> str:
    """Return the name of a commit's folder; that of its client states ends alike."""
    return f"commit_{attempt:03d}_{server_round:06d}"


def client_file_name(attempt: int, server_round: int) -> str:
    """Return the name of the file with the client states that a commit adds."""
    return f"clients_{attempt:03d}_{server_round:06d}.safetensors"


def commits_of(checkpoint: Path) -> list[Path]:
    """Return the folders of a run's commits, the newest first; all are whole, or were damaged since."""
    found = [(match, path) for path in _entries(checkpoint) if (match := _COMMIT.fullmatch(path.name))]
    return [path for _, path in sorted((tuple(map(int, m.groups())), path) for m, path in found)][::-1]


def _entries(checkpoint: Path) -> list[Path]:
    return list(checkpoint.iterdir()) if checkpoint.is_dir() else []


def round_of(commit: Path) -> int:
    """Return the round that a commit's folder is of, by its name."""
    match = _COMMIT.fullmatch(commit.name)
    return int(match[2]) if match else 0


def latest_checkpoint(run: Path) -> Path:
    """Return the folder with a run's latest weights: its newest commit, or what central training keeps."""
    checkpoint = run / "checkpoint"
    commits = commits_of(checkpoint)
    return commits[0] if commits else current_folder(checkpoint)


def write_commit(
    checkpoint: Path, content: ServerCheckpoint, *, keep: int, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a commit, and remove those that are older than the ones to keep, with what they alone needed.

    Args:
        checkpoint: ``checkpoint/``; the client states are there.
        content: What the commit holds, its progress included.
        keep: How many commits stay.
        notes: What the manifest says of the run.
    """
    assert content.progress is not None
    folder = checkpoint / commit_name(content.progress.attempt, content.server.server_round)
    with committed_folder(folder, CHECKPOINT_FILES, notes=notes) as fresh:
        save_server_checkpoint(fresh, content)
    kept = commits_of(checkpoint)[:keep]
    needed = {name for commit in kept for name in _client_files(commit)}
    for path in _entries(checkpoint):
        if path.is_dir() and path not in kept and path.name.lstrip(".").startswith("commit_"):
            shutil.rmtree(path)
        elif path.match(CLIENT_FILES) and path.name not in needed:
            path.unlink()


def _client_files(commit: Path) -> Iterator[str]:
    """Yield the client files that a commit needs; none of one that cannot be read."""
    try:
        notes = _read_notes(read_tensors(commit / SERVER_FILE, only_metadata=True)[1], commit)
    except UserError:
        return
    if "clients" in notes:
        yield from notes["clients"]["files"]


def read_commit(commit: Path) -> tuple[ServerCheckpoint, ClientStore, dict[int, Records]]:
    """Return a commit, the store that goes on from its client states, and these states.

    Raises:
        UserError: A file of it is missing, damaged or another commit's.
    """
    manifest = commit / MANIFEST_FILE
    if not manifest.is_file():
        raise UserError(f"{manifest} is missing: {commit} is damaged")
    content = load_server_checkpoint(commit)
    if content.progress is None or content.origin is None:
        raise UserError(f"{commit} does not say how far its run was: no run can be resumed from it")
    if commit.name != commit_name(content.progress.attempt, content.server.server_round):
        raise UserError(f"{commit} holds another commit than its name says: it is damaged")
    store = ClientStore(commit.parent)
    return content, store, store.read(content.clients)


def read_latest(
    checkpoint: Path, server_round: int | None = None
) -> tuple[ServerCheckpoint, ClientStore, dict[int, Records]]:
    """Return the newest commit that is whole, with a warning where a newer one is not.

    Args:
        checkpoint: ``checkpoint/``.
        server_round: Only commits of this round; None: of any.

    Raises:
        UserError: There is none; names the first file at fault.
    """
    commits = [c for c in commits_of(checkpoint) if server_round in (None, round_of(c))]
    first: UserError | None = None
    for commit in commits:
        try:
            found = read_commit(commit)
        except UserError as error:
            first = first or error
            log.warning("%s", error)
            continue
        if first is not None:
            log.warning("the run goes on from %s instead", commit)
        return found
    if first is not None:
        raise UserError(f"no commit in {checkpoint} is whole. {first}") from first
    numbers = sorted({round_of(commit) for commit in commits_of(checkpoint)})
    there = ", ".join(map(str, numbers))
    is_to_come = server_round is not None and server_round > max(numbers, default=0)
    remedy = "; the run has not come to it" if is_to_come else ": see output.keep_checkpoints"
    wanted = "a commit" if server_round is None else f"a commit of round {server_round}"
    raise UserError(
        f"{checkpoint} has no {wanted.removeprefix('a ')}"
        + (f", but of round {there}{remedy}" if there else ": start the run again")
    )

"""A run in progress: what crosses rounds, committed at the end of each and put back when a run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from federated.communication.ledger import Ledger
from federated.results.callbacks import Display
from federated.results.run_folder import LEDGER_FILE, RunFolder
from federated.rounds.checkpoint import (
    Origin,
    Part,
    Progress,
    ServerCheckpoint,
    client_file_name,
    write_commit,
)
from federated.rounds.client_store import ClientStates, ClientStore, Records, records_of, state_from
from federated.rounds.conditions import Conditions
from federated.rounds.fingerprints import check_fingerprints
from federated.rounds.global_model import load_global_state, smallest_form
from federated.rounds.resumption import HELD_BY_SERVER, Resumption, cut_back, read_lines
from federated.rounds.run import Run
from federated.rounds.saving import save_adapter
from federated.rounds.strategy import LoRAStrategy
from models.errors import UserError
from models.files import errors_named


@dataclass
class Served:
    """A run in progress: what closing a round needs; ``parts`` (by name) go into every commit."""

    run: Run
    strategy: LoRAStrategy
    folder: RunFolder
    ledger: Ledger
    display: Display | None
    conditions: Conditions
    origin: Origin
    states: ClientStates | None = None
    attempt: int = 1
    started: float = field(default_factory=time.perf_counter)
    round_started: float = field(default_factory=time.perf_counter)
    lines: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    parts: dict[str, Part] = field(init=False)
    store: ClientStore = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.conditions.parts()
        self.store = ClientStore(self.folder.path / "checkpoint")


def go_on(served: Served, resumption: Resumption) -> None:
    """Put a run back to where it was at a commit, and commit that as the beginning of another attempt.

    Raises:
        UserError: Data or base weights are not what the run was made with.
    """
    strategy, folder, checkpoint = served.strategy, served.folder, resumption.checkpoint
    if served.states is None:
        raise UserError("this engine does not keep the clients' states: the run cannot go on here")
    check_fingerprints(resumption.origin.fingerprints, served.origin.fingerprints, folder.path)
    strategy.server_state = checkpoint.server
    strategy.versions, strategy.current_ranks = dict(checkpoint.versions), dict(checkpoint.ranks)
    strategy.rounds_before = resumption.server_round
    for client_id, records in resumption.states.items():
        own = {key: record for key, record in records.items() if key != HELD_BY_SERVER}
        served.states.context(client_id).state = state_from(own)
    if strategy.held is not None:
        held = {i: records.get(HELD_BY_SERVER, {}) for i, records in resumption.states.items()}
        strategy.held.restore({client_id: state for client_id, state in held.items() if state})
    for name, part in served.parts.items():
        if name in checkpoint.parts:
            part.restore(checkpoint.parts[name])
    served.store, served.attempt = resumption.store, resumption.attempt
    served.origin = replace(served.origin, forks=resumption.origin.forks)
    served.started -= resumption.progress.elapsed_seconds
    served.best = resumption.progress.best
    cut_back(folder.path, resumption.progress)
    served.ledger, served.lines = Ledger.continued(folder.path / LEDGER_FILE), read_lines(folder.path)
    folder.reopen_files(served.run.config, first_step=resumption.server_round + 1)
    commit(served)
    if served.best is not None and served.best[0] == resumption.server_round:
        save_global(served, "adapter_best", server_round=served.best[0], metric=served.best[1])


def commit(served: Served) -> None:
    """Write down everything that crosses to the next round: the one place that names it."""
    strategy, states = served.strategy, served.states
    checkpoint = served.folder.path / "checkpoint"
    if states is not None:
        failed = {failure.client_id for failure in strategy.record.failed}
        name = client_file_name(served.attempt, strategy.server_state.server_round)
        served.store.write(
            name, states.changed_clients() | failed, partial(records_of_client, strategy, states)
        )
    content = ServerCheckpoint(
        server=strategy.server_state,
        versions=strategy.versions,
        ranks=strategy.current_ranks,
        parts={name: part.state() for name, part in served.parts.items()},
        clients=served.store.index,
        progress=Progress(
            attempt=served.attempt,
            elapsed_seconds=round(time.perf_counter() - served.started, 3),
            best=served.best,
            lengths=served.folder.lengths_on_disk(),
        ),
        origin=None if states is None else served.origin,
    )
    write_commit(checkpoint, content, keep=served.run.config.output.keep_checkpoints, notes=served.run.notes)


def records_of_client(strategy: LoRAStrategy, states: ClientStates, client_id: int) -> Records:
    """Return what a client keeps, and what the server follows of it."""
    records = records_of(states.context(client_id).state)
    if strategy.held is not None and (held := strategy.held.kept(client_id)):
        records[HELD_BY_SERVER] = held
    return records


def write_ledger(served: Served) -> None:
    """Bring ``communication.csv`` up to date."""
    path = served.folder.path / LEDGER_FILE
    with errors_named(path):
        served.ledger.write_csv(path)


def save_global(served: Served, name: str, *, server_round: int, metric: float) -> None:
    """Write the global model's trained part into a folder of the run."""
    run, server_state = served.run, served.strategy.server_state
    load_global_state(run, server_state)
    save_adapter(
        run,
        served.folder.path / name,
        server_round=server_round,
        final=metric,
        products={module: smallest_form(delta) for module, delta in server_state.base_delta.items()},
    )

"""Going on with a run: its newest commit, and its growing files cut back to where they were at that commit.

What was sent after the commit is sent again, and was paid for: its rows go from ``communication.csv`` to
``lost.csv``. Cutting back can be cut short itself, at any point, and done again.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from federated.communication.ledger import Ledger
from federated.communication.run_files import checked_line, read_run_file
from federated.config.config_changes import check_changes
from federated.config.config_files import load_config, parse_config
from federated.config.schema import ExperimentConfig
from federated.results.run_folder import GROWING, LEDGER_FILE, LOST_FILE, METRICS_FILE
from federated.rounds.checkpoint import Origin, Progress, ServerCheckpoint, commits_of, read_latest
from federated.rounds.client_store import ClientStore, Records
from models.errors import UserError
from models.files import errors_named, sync, written_whole
from models.untrusted import read_text

log = logging.getLogger(__name__)

HELD_BY_SERVER = "held-by-server"
"""Beside the keys of a client's state: what the server follows of it (``HeldStates``)."""


@dataclass(frozen=True)
class Resumption:
    """A run that is to go on.

    Attributes:
        config: Its configuration from here on.
        checkpoint: Its newest whole commit.
        store: Goes on from the clients' states in it.
        states: Those states.
        attempt: The number of the attempt that begins.
    """

    config: ExperimentConfig
    checkpoint: ServerCheckpoint
    store: ClientStore
    states: Mapping[int, Records]
    attempt: int

    @property
    def server_round(self) -> int:
        """The last round that is done."""
        return self.checkpoint.server.server_round

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        assert self.checkpoint.progress is not None
        return self.checkpoint.progress

    @property
    def origin(self) -> Origin:
        """What the rounds so far were made of."""
        assert self.checkpoint.origin is not None
        return self.checkpoint.origin


def read_resumption(run: Path, overrides: Sequence[str]) -> Resumption:
    """Return how a run goes on.

    Args:
        run: Its folder, locked.
        overrides: ``key=value``, what is to be different from here on.

    Raises:
        UserError: There is no whole commit, a key may not change, or no round is left.
    """
    checkpoint, store, states = read_latest(run / "checkpoint")
    assert checkpoint.origin is not None
    config = load_config(run / "config.yaml", overrides)
    before = parse_config(dict(checkpoint.origin.config), source=f"{run}/checkpoint")
    check_changes(before, config, "resume")
    done = checkpoint.server.server_round
    if config.federation.rounds < done:
        raise UserError(f"federation.rounds={config.federation.rounds}, but {done} rounds of {run} are done")
    if (run / "summary.json").exists():
        _check_incomplete(run, done, before, config)
    attempts = [int(commit.name.split("_")[1]) for commit in commits_of(run / "checkpoint")]
    return Resumption(config, checkpoint, store, states, max(attempts) + 1)


def _check_incomplete(run: Path, done: int, before: ExperimentConfig, config: ExperimentConfig) -> None:
    """Refuse to go on with a run that has come to its end, unless more of it is asked for."""
    if config.federation.rounds == done:
        raise UserError(
            f"{run} is complete: all {done} rounds are done. More of them: "
            f"fedlora resume {shlex.quote(str(run))} federation.rounds={2 * done}"
        )
    stopped = read_run_file(run / "summary.json").get("stopped")
    if stopped and config.federation.early_stopping == before.federation.early_stopping:
        patience = 2 * (before.federation.early_stopping.patience or 1)
        raise UserError(
            f"{run} is complete: {stopped}. More of it: "
            f"fedlora resume {shlex.quote(str(run))} federation.early_stopping.patience={patience}"
        )


def check_fork(run: Path, server_round: int, config: ExperimentConfig) -> Resumption:
    """Return how a branch of a run begins; its files are still to be copied (``copy_past``).

    Args:
        run: The folder of the run that is branched from.
        server_round: The round after which.
        config: The branch's.

    Raises:
        UserError: There is no whole commit of that round, or a key may not change.
    """
    checkpoint, store, states = read_latest(run / "checkpoint", server_round)
    assert checkpoint.origin is not None
    assert checkpoint.progress is not None
    before = parse_config(dict(checkpoint.origin.config), source=f"{run}/checkpoint")
    changes = check_changes(before.model_copy(update={"output": config.output}), config, "fork")
    if config.federation.rounds <= server_round:
        raise UserError(
            f"federation.rounds={config.federation.rounds}: no round is left after {server_round}; "
            f"set federation.rounds={2 * max(server_round, 1)}"
        )
    latest = read_latest(run / "checkpoint")[0].progress
    best = checkpoint.progress.best
    if best is not None and latest is not None and best[0] not in (server_round, (latest.best or best)[0]):
        log.warning("the weights of the best round so far, %d, are gone: the branch begins without", best[0])
        best = None
    lengths = {name: checkpoint.progress.lengths[name] for name in (METRICS_FILE, LEDGER_FILE)}
    fork = {"run": str(run), "round": server_round, "changes": changes}
    origin = replace(checkpoint.origin, forks=(*checkpoint.origin.forks, fork))
    progress = replace(checkpoint.progress, best=best, lengths=lengths)
    checkpoint = replace(checkpoint, origin=origin, progress=progress)
    return Resumption(config, checkpoint, store, states, attempt=1)


def copy_past(run: Path, branch: Path, resumption: Resumption) -> Resumption:
    """Copy what a branch shares with its run; return how it goes on in its own folder."""
    with errors_named(branch):
        shutil.copyfile(run / "partition.json", branch / "partition.json")
        for name, length in resumption.progress.lengths.items():
            with (run / name).open("rb") as file:
                (branch / name).write_bytes(file.read(length))
        (branch / "checkpoint").mkdir()
        for name in resumption.checkpoint.clients.files:
            shutil.copyfile(run / "checkpoint" / name, branch / "checkpoint" / name)
        best = resumption.progress.best
        if best is not None and best[0] != resumption.server_round:
            shutil.copytree(run / "adapter_best", branch / "adapter_best")
    store = ClientStore(branch / "checkpoint")
    return replace(resumption, store=store, states=store.read(resumption.checkpoint.clients))


def cut_back(run: Path, progress: Progress) -> None:
    """Cut the growing files of a run to their lengths at a commit; keep the ledger's rows in ``lost.csv``.

    A run that goes on from an older commit than its newest, as that is damaged, keeps what was lost after the
    older one.

    Raises:
        UserError: A file is shorter than it was at the commit.
    """
    lengths = {name: progress.lengths.get(name, 0) for name in GROWING}
    for name in (METRICS_FILE, LEDGER_FILE):
        path = run / name
        if not path.is_file() or path.stat().st_size < lengths[name]:
            fault = "is shorter than it was at the last commit" if path.is_file() else "is missing"
            raise UserError(f"{path} {fault}: copy it again from where it is whole")
    ledger = run / LEDGER_FILE
    with errors_named(run), ledger.open("rb") as file:
        head = file.readline()
        file.seek(lengths[LEDGER_FILE])
        tail = file.read()
    rows = tail[: tail.rfind(b"\n") + 1]
    if rows:
        lost = run / LOST_FILE
        kept = lost.read_bytes() if lost.is_file() else b""
        if kept[lengths[LOST_FILE] :] in (rows, head + rows):  # an earlier try was cut short after this
            kept = kept[: lengths[LOST_FILE]]
        with written_whole(lost) as temporary:
            temporary.write_bytes((kept or head) + rows)
    for name in (LEDGER_FILE, METRICS_FILE):
        with errors_named(run / name):
            os.truncate(run / name, lengths[name])
            sync(run / name)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` as the run wrote them: null stands for what is not a number."""
    path = run / METRICS_FILE
    lines = [
        checked_line(text, f"{path}, line {number}")
        for number, text in enumerate(read_text(path).splitlines(), start=1)
    ]
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in lines]


def lost_transfers(run: Path) -> dict[str, int] | None:
    """Return what was sent in rounds that were lost, for the summary; None where there is nothing."""
    path = run / LOST_FILE
    if not path.is_file():
        return None
    total = Ledger.read_csv(path).total()
    return {
        "transfers": total.transfers,
        "payload_bytes": total.payload_bytes,
        "wire_bytes": total.wire_bytes,
    }

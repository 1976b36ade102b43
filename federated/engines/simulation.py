"""A whole run on the in-process engine: one frozen base model, any number of clients, no network."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.batched_clients import batched_clients
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.workers import check_workers
from federated.results.callbacks import Callback, Followers
from federated.results.console import RunDisplay
from federated.results.records import check_is_run
from federated.results.run_folder import RunFolder
from federated.results.run_place import beside, check_free, run_path
from federated.results.trackers import check_trackers, tracked
from federated.rounds.client import client_app
from federated.rounds.learnable import check_can_learn
from federated.rounds.local_training import train_locally
from federated.rounds.resumption import Resumption, check_fork, copy_past, read_resumption
from federated.rounds.run import Run, build_run
from federated.rounds.saving import save_clients_rows
from federated.rounds.server import serve


def run_experiment(
    config: ExperimentConfig,
    *,
    overwrite: bool = False,
    display: RunDisplay | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Run a configuration from start to report.

    Args:
        config: The run.
        overwrite: Replace an earlier run's folder of the same name.
        display: Shows progress; the caller turns it on and off.
        callbacks: Told of each round and of the end.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration, the data or the model is unusable, or the folder exists.
    """
    path = run_path(config.output.root, "run" if config.output.name is None else config.output.name)
    with limited_threads(config.engine.threads):
        check_workers(config.engine.workers)
        check_free(path, overwrite=overwrite)
        check_trackers(config.output.trackers)
        run = build_run(config)
        check_can_learn(run)
        with contextlib.closing(RunFolder(path, config, overwrite=overwrite)) as folder:
            save_clients_rows(run, folder.path / "partition.json")
            _simulate(run, folder, display, callbacks=callbacks)
    return path


def resume_experiment(
    path: Path, overrides: Sequence[str] = (), *, display: RunDisplay | None = None
) -> Path:
    """Go on with a run from its newest commit; it ends as if it had never stopped.

    Args:
        path: The run folder.
        overrides: ``key=value`` of keys that say how rounds are computed, or how many there are.
        display: Shows progress; the caller turns it on and off.

    Returns:
        The run folder.

    Raises:
        UserError: The folder is no run's or in use, nothing can be resumed in it, a key may not change, or
            data or base weights are others.
    """
    with contextlib.closing(RunFolder.reopened(path)) as folder:
        resumption = read_resumption(path, overrides)
        with limited_threads(resumption.config.engine.threads):
            check_workers(resumption.config.engine.workers)
            check_trackers(resumption.config.output.trackers)
            run = build_run(resumption.config)
            check_can_learn(run)
            _simulate(run, folder, display, resumption)
    return path


def fork_experiment(
    source: Path,
    server_round: int,
    name: str,
    overrides: Sequence[str] = (),
    *,
    display: RunDisplay | None = None,
) -> Path:
    """Branch a run: another run that shares its first rounds and goes on with other settings.

    Args:
        source: The folder of the run.
        server_round: The last round that they share; its commit must be there.
        name: ``output.name`` of the branch, beside the run.
        overrides: ``key=value`` of keys that rounds to come may have of their own.
        display: Shows progress; the caller turns it on and off.

    Returns:
        The folder of the branch.

    Raises:
        UserError: There is no such commit, a key may not change, or the branch's folder exists.
    """
    check_is_run(source)
    root = str(beside(source))
    place = [f"output.root={json.dumps(root)}", f"output.name={json.dumps(name)}"]
    config = load_config(source / "config.yaml", [*place, *overrides])
    path = run_path(root, name)
    check_free(path, overwrite=False, other="give the branch another --name")
    resumption = check_fork(source, server_round, config)
    with limited_threads(config.engine.threads):
        check_workers(config.engine.workers)
        check_trackers(config.output.trackers)
        run = build_run(config)
        check_can_learn(run)
        with contextlib.closing(RunFolder(path, config)) as folder:
            _simulate(run, folder, display, copy_past(source, path, resumption))
    return path


def _simulate(
    run: Run,
    folder: RunFolder,
    display: RunDisplay | None,
    resumption: Resumption | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Play the rounds of a run, or those that are left, with all clients in this process."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    workers, together = run.config.engine.workers, batched_clients(run)
    grid = InProcessGrid(
        client_app(run, train_locally if together is None else together.train),
        run.num_clients,
        on_reply=None if display is None else display.client_done,
        prepare=together,
        num_workers=workers,
        inherited=lambda: run.base.num_changes,
    )
    if workers > 1:
        run.reader.read_before_forking()  # once here, not in each worker
    clients = {client_id: node_id_of(client_id) for client_id in range(run.num_clients)}
    settings = run.config.model_dump(mode="json")
    with (
        contextlib.closing(grid),
        tracked(run.config.output.trackers, folder.path, settings) as trackers,
    ):
        followers = Followers(display, [*trackers, *callbacks])
        followers.run_done(
            serve(grid, run, clients, folder, display=followers, states=grid, resumption=resumption)
        )


@contextlib.contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Let torch use this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

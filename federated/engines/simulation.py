"""A whole run on the in-process engine: one frozen base model, any number of clients, no network."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from federated.config.schema import ExperimentConfig
from federated.engines.batched_clients import batched_clients
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.workers import check_workers
from federated.results.callbacks import Callback, Followers
from federated.results.console import RunDisplay
from federated.results.run_folder import RunFolder
from federated.results.run_place import check_free, run_path
from federated.results.trackers import check_trackers, tracked
from federated.rounds.client import client_app
from federated.rounds.learnable import check_can_learn
from federated.rounds.local_training import train_locally
from federated.rounds.run import build_run
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
        display: Shows progress.
        callbacks: Told of each round and of the end.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration, the data or the model is unusable, or the folder exists.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with limited_threads(config.engine.threads):
        check_workers(config.engine.workers)
        path = run_path(config.output.root, "run" if config.output.name is None else config.output.name)
        check_free(path, overwrite=overwrite)
        check_trackers(config.output.trackers)
        run = build_run(config)
        check_can_learn(run)
        together = batched_clients(run)
        on_reply = None if display is None else display.client_done
        grid = InProcessGrid(
            client_app(run, train_locally if together is None else together.train),
            run.num_clients,
            on_reply=on_reply,
            prepare=together,
            num_workers=config.engine.workers,
            inherited=lambda: run.base.num_changes,
        )
        if config.engine.workers > 1:
            run.reader.read_before_forking()  # once here, not in each worker
        clients = {client_id: node_id_of(client_id) for client_id in range(run.num_clients)}
        with (
            contextlib.closing(grid),
            contextlib.closing(RunFolder(path, config, overwrite=overwrite)) as folder,
            display if display is not None else contextlib.nullcontext(),
            tracked(config.output.trackers, path, config.model_dump(mode="json")) as trackers,
        ):
            save_clients_rows(run, folder.path / "partition.json")
            followers = Followers(display, [*trackers, *callbacks])
            followers.run_done(serve(grid, run, clients, folder, followers))
    return path


@contextlib.contextmanager
def limited_threads(num_threads: int) -> Iterator[None]:
    """Let torch use this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Central training: one client that holds all the data, the upper bound that federated runs are held against.

Model, task, data and the settings of local training are the federated run's, but nothing is sent and one
optimizer runs through all epochs. It trains on every training row, those that federated clients keep for
their own evaluation included. The run folder is that of a federated run, an epoch where that has a round, so
that the report and ``compare`` read both.

The validation split alone decides what is kept and when to stop; test metrics are only written down.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from federated.communication.ledger import Ledger
from federated.config.schema import (
    AggregationSection,
    CommunicationSection,
    ExperimentConfig,
    PartitionSection,
)
from federated.config.seeding import generator, scoped_torch_rng
from federated.data.dataset import steps_per_epoch
from federated.engines.simulation import limited_threads
from federated.results.callbacks import Callback
from federated.results.records import read_run
from federated.results.round_record import best_value
from federated.results.run_folder import RunFolder, peak_memory_bytes
from federated.results.run_place import check_free, run_path
from federated.results.trackers import check_trackers, tracked
from federated.rounds.batches import accuracy_by_class, evaluate_rows, evaluate_server, local_batches
from federated.rounds.checkpoint import save_checkpoint
from federated.rounds.early_stopping import BestSoFar
from federated.rounds.learnable import check_can_learn
from federated.rounds.run import Run, build_run
from federated.rounds.saving import parameter_counts, save_adapter, save_clients_rows
from models.errors import UserError
from models.state import State

VALIDATION_FRACTION = 0.1
"""Share of train that becomes the validation split where neither source nor configuration has one."""

THE_CLIENT = 0


class TrainingDisplay(Protocol):
    """What central training tells whoever watches; ``federated.commands.train_and_evaluate`` has one."""

    def training_started(
        self, num_epochs: int, num_steps: int, *, headline_metric: str, notes: Sequence[str] = ()
    ) -> None:
        """Training begins; the notes say what is cached and what is not."""

    def step_done(self, loss: float) -> None:
        """An optimizer step was taken."""

    def epoch_done(self, metrics: Mapping[str, Any]) -> None:
        """An epoch's line of ``metrics.jsonl``."""


@dataclass
class Training:
    """A central training in progress.

    Attributes:
        run: Model, data and settings of the one client.
        folder: Where results go.
        display: Told what happens.
        trackers: Told of each epoch and of the end.
        best: The best evaluation so far.
        kept: The exchanged state of the epoch that will be saved.
        kept_epoch: That epoch.
        lines: The lines of ``metrics.jsonl``.
        steps_done: Optimizer steps taken.
    """

    run: Run
    folder: RunFolder
    display: TrainingDisplay | None
    best: BestSoFar
    kept: State = field(default_factory=dict)
    kept_epoch: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    steps_done: int = 0
    trackers: Sequence[Callback] = ()
    started: float = field(default_factory=time.perf_counter)

    @property
    def num_epochs(self) -> int:
        """Epochs to train; the last one may be cut short by ``train.steps``."""
        settings = self.run.config.train
        if settings.steps is None:
            return settings.epochs
        return math.ceil(settings.steps / self.steps_per_epoch)

    @property
    def num_steps(self) -> int:
        """Optimizer steps to take."""
        settings = self.run.config.train
        return settings.steps or settings.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every training row once."""
        rows = self.run.num_examples(THE_CLIENT)
        return steps_per_epoch(rows, self.run.config.client.batch_size)


def train_centrally(
    config: ExperimentConfig, *, overwrite: bool = False, display: TrainingDisplay | None = None
) -> Path:
    """Train on all the data in one place, from start to report.

    Args:
        config: The run; its ``train`` section says how long, its ``client`` section how.
        overwrite: Replace an earlier run's folder of the same name.
        display: Shows progress.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration, the data or the model is unusable, the folder exists, or the loss is no
            longer a number.
    """
    config = central_config(config)
    path = run_path(config.output.root, "training" if config.output.name is None else config.output.name)
    check_free(path, overwrite=overwrite)
    check_trackers(config.output.trackers)
    with limited_threads(config.engine.threads):
        run = build_run(config)
        check_can_learn(run)
        stopping = config.train.early_stopping
        training = Training(
            run=run,
            folder=RunFolder(path, config, overwrite=overwrite),
            display=display,
            best=BestSoFar(
                stopping.metric or run.headline_metric, stopping.patience, stopping.minimum_change
            ),
        )
        settings = config.model_dump(mode="json")
        with (
            contextlib.closing(training.folder),
            tracked(config.output.trackers, path, settings) as training.trackers,
        ):
            save_clients_rows(run, path / "partition.json")
            train_epochs(training)
            finish(training)
            for tracker in training.trackers:
                tracker.run_done(read_run(path).summary)
    return path


def one_shard(config: ExperimentConfig) -> ExperimentConfig:
    """Return the same run with all training rows in one shard."""
    return config.model_copy(
        update={
            "partition": PartitionSection(name="iid", num_clients=1, local_test_fraction=0.0),
            "federation": config.federation.model_copy(update={"cohort_size": None}),
        }
    )


def central_config(config: ExperimentConfig) -> ExperimentConfig:
    """Return the run of a single client that holds every training row, beside a validation split."""
    fraction = config.data.validation_fraction or VALIDATION_FRACTION
    return one_shard(config).model_copy(
        update={
            "data": config.data.model_copy(update={"validation_fraction": fraction}),
            "client": config.client.model_copy(update={"ranks": None, "scaffold": False, "proximal_mu": 0.0}),
            "aggregation": AggregationSection(),
            "communication": CommunicationSection(),
        }
    )


def train_epochs(training: Training) -> None:
    """Train until the last step, or until the validation metric has not improved for too long."""
    run = training.run
    run.reset()
    if training.display is not None:
        training.display.training_started(
            training.num_epochs,
            training.num_steps,
            headline_metric=run.headline_metric,
            notes=run.reader.notes,
        )
    run.model.start_training(run.training_settings, training.num_steps)
    close_epoch(training, 0, {}, time.perf_counter())
    for epoch in range(1, training.num_epochs + 1):
        start = time.perf_counter()
        losses = list(epoch_losses(training, epoch))
        close_epoch(training, epoch, {"train_loss": float(np.mean(losses))}, start)
        if training.best.is_exhausted:
            return


def epoch_losses(training: Training, epoch: int) -> Iterator[float]:
    """Take an epoch's optimizer steps and yield their losses.

    Raises:
        UserError: A loss is infinite or no number.
    """
    run = training.run
    num_steps = min(training.steps_per_epoch, training.num_steps - training.steps_done)
    rng = generator(run.config.seed, "client", epoch, THE_CLIENT)
    batches = local_batches(run, THE_CLIENT, num_steps, rng, server_round=epoch)
    with scoped_torch_rng(rng):
        for batch in batches:
            loss = run.model.train_step(batch)
            training.steps_done += 1
            if not math.isfinite(loss):
                raise UserError(
                    f"the training loss is {loss} at step {training.steps_done}: lower client.learning_rate, "
                    "or set client.clip_norm or client.warmup_steps"
                )
            if training.display is not None:
                training.display.step_done(loss)
            yield loss


def close_epoch(training: Training, epoch: int, line: dict[str, Any], start: float) -> None:
    """Evaluate where due, keep the weights if they are to be kept, and write the epoch down."""
    every, last = training.run.config.train.evaluate_every, training.num_epochs
    line = {"server_round": epoch, "steps": training.steps_done, **line}
    if epoch % every == 0 or epoch == last:
        line |= evaluate_epoch(training, epoch)
    line["seconds"] = round(time.perf_counter() - start, 3)
    save_every = training.run.config.train.save_every
    if save_every is not None and epoch and epoch % save_every == 0:
        folder = training.folder.path / f"checkpoint-epoch-{epoch}"
        save_adapter(
            training.run,
            folder,
            server_round=epoch,
            final=line.get(training.run.headline_metric),
        )
    training.lines.append(line)
    training.folder.append_metrics(line)
    for tracker in training.trackers:
        tracker.round_done(line)
    if training.display is not None:
        training.display.epoch_done(line)


def evaluate_epoch(training: Training, epoch: int) -> dict[str, float]:
    """Evaluate on test and validation rows; the latter decide whether these weights are kept.

    Raises:
        UserError: ``train.early_stopping.metric`` is not among the validation metrics.
    """
    run = training.run
    test = evaluate_server(run)
    validation = evaluate_rows(run, "validation")
    for metrics in (test, validation):
        del metrics["num_examples"]
    if training.best.metric not in validation:
        raise UserError(
            f"train.early_stopping.metric={training.best.metric}: the validation split is evaluated for "
            f"{', '.join(sorted(validation))}"
        )
    is_best = training.best.update(epoch, validation[training.best.metric])
    if is_best or not run.config.train.keep_best or not training.kept:
        training.kept, training.kept_epoch = run.model.get_state(), epoch
        save_checkpoint(
            training.folder.path / "checkpoint", training.kept, server_round=epoch, notes=run.notes
        )
    return {**test, **{f"validation_{key}": value for key, value in validation.items()}}


def finish(training: Training) -> None:
    """Put the kept weights into the model; write adapter, ``summary.json`` and, if possible, the report."""
    run, folder, metric = training.run, training.folder, training.run.headline_metric
    run.model.set_state(training.kept)
    by_epoch = {line["server_round"]: line for line in training.lines}
    final = by_epoch[training.kept_epoch][metric]
    save_adapter(run, folder.path / "adapter", server_round=training.kept_epoch, final=final)
    Ledger().write_csv(folder.path / "communication.csv")
    epochs_done = training.lines[-1]["server_round"]
    by_class = accuracy_by_class(run) if run.config.output.report else []
    folder.write_summary(
        {
            "headline_metric": metric,
            "zero_shot": training.lines[0][metric],
            "final": final,
            "best": best_value(training.lines, metric, default=final),
            "rounds": epochs_done,
            "seconds": round(time.perf_counter() - training.started, 3),
            "parameters": {**parameter_counts(run), "exchanged": 0},
            "peak_memory_bytes": peak_memory_bytes(),
            "caches": list(run.reader.notes),
            "training": {
                "mode": "central",
                "steps": training.steps_done,
                "kept_epoch": training.kept_epoch,
                "stopped_early": epochs_done < training.num_epochs,
                f"validation_{training.best.metric}": by_epoch[training.kept_epoch][
                    f"validation_{training.best.metric}"
                ],
            },
            **({"per_class": by_class} if by_class else {}),
        }
    )
    if run.config.output.report:
        folder.write_report()

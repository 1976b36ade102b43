"""From the rows of the data to batches for the model, and the model's metrics on rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from federated.config.seeding import generator
from federated.data.batch_order import index_batches, local_index_batches
from federated.data.splits import IntArray
from lora.adapters import unwrap
from models.progress import counted
from models.tasks import CLIP
from models.training import Batch

if TYPE_CHECKING:
    from federated.rounds.run import Run


def local_batches(
    run: Run, client_id: int, num_steps: int, rng: np.random.Generator, *, server_round: int
) -> Iterator[Batch]:
    """Yield the batches of a client's local steps in a round."""
    augment_rng = generator(run.clients.seed, "augment", server_round, client_id)
    for rows in local_index_batches(run.shards[client_id].train, run.clients.batch_size, num_steps, rng):
        yield run.reader.training_batch(rows, augment_rng)


def evaluation_batches(run: Run, split: str, rows: IntArray | None = None) -> Iterator[Batch]:
    """Yield some rows of a split, in order; None: all of them."""
    chosen = np.arange(len(run.data.split(split))) if rows is None else rows
    for batch_rows in index_batches(chosen, run.config.evaluation.batch_size, rng=None):
        yield run.reader.batch(split, batch_rows)


def evaluate_rows(run: Run, split: str, rows: IntArray | None = None) -> dict[str, float]:
    """Evaluate the model, as it is, on some rows of a split; None: all of them."""
    return run.model.evaluate(evaluation_batches(run, split, rows))


def evaluate_client(run: Run, client_id: int) -> dict[str, float]:
    """Evaluate the model, as it is, on a client's own test rows."""
    return evaluate_rows(run, "train", run.shards[client_id].test)


def evaluate_server(run: Run) -> dict[str, float]:
    """Evaluate the model, as it is, on the server's test rows, or on one seeded part of them."""
    rows = server_test_rows(run)
    num_batches = -(-(len(run.data.test) if rows is None else len(rows)) // run.config.evaluation.batch_size)
    return run.model.evaluate(counted("evaluation", evaluation_batches(run, "test", rows), num_batches))


@torch.no_grad()
def accuracy_by_class(run: Run) -> list[dict[str, Any]]:
    """Classify the server's test rows with the model as it is.

    Returns:
        For each class with rows its ``name``, ``num_examples`` and ``accuracy``; nothing where the run is not
        judged by the accuracy of classes, or its task does not tell them.
    """
    names, task = run.data.class_names, run.model.task
    if run.headline_metric != "accuracy" or task.reads_captions or names is None:
        return []
    if task.predict is None and task.family != CLIP:
        return []
    model, rows = unwrap(run.model).eval(), server_test_rows(run)
    labels = run.data.labels("test") if rows is None else run.data.labels("test")[rows]
    predicted = np.concatenate(
        [_predicted_classes(model, batch, names) for batch in evaluation_batches(run, "test", rows)]
    )
    total, right = (
        np.bincount(chosen, minlength=len(names)) for chosen in (labels, labels[predicted == labels])
    )
    return [
        {"name": name, "num_examples": int(rows), "accuracy": int(hits) / int(rows)}
        for name, hits, rows in zip(names, right, total, strict=True)
        if rows
    ]


def _predicted_classes(model: Any, batch: Batch, names: Sequence[str]) -> IntArray:
    """Number of the class that a model says each row is, (B,); -1 where it says none of them."""
    on_device = {key: value.to(model.device) for key, value in batch.items()}
    if model.task.predict is not None:
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(text, -1) for text in model.task.predict(model, on_device)])
    logits = model.logits(on_device) if model.task.uses_head else model.zero_shot_logits(on_device)
    return logits.argmax(dim=1).cpu().numpy()


def server_test_rows(run: Run) -> IntArray | None:
    """Return the server's test rows that are scored, one seeded part of them; None: all."""
    wanted, num_rows = run.config.evaluation.max_samples, len(run.data.test)
    if wanted is None or wanted >= num_rows:
        return None
    rng = generator(run.config.seed, "test rows")
    return np.sort(rng.choice(num_rows, size=wanted, replace=False))

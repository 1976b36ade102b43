"""From the rows of the data to batches for the model, and the model's metrics on rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from federated.config.seeding import generator
from federated.data.augmented_batches import augment_batch
from federated.data.dataset import ImageTensors
from federated.data.splits import IntArray
from federated.rounds.run import Run
from lora.adapters import unwrap
from models.metrics import CONCEPT, PICTURE, TEXT
from models.training import Batch


def local_batches(
    run: Run, client_id: int, num_steps: int, rng: np.random.Generator, *, server_round: int
) -> Iterator[Batch]:
    """Yield the batches of a client's local steps in a round, augmented where the configuration says."""
    images, batch_size = run.train_images, run.clients.batch_size
    kept = run.caches.serves_images(images, training=True)
    batches = images.local_batches(run.shards[client_id].train, batch_size, num_steps, rng, pixels=not kept)
    if run.augmentation.changes_anything:
        augment_rng = generator(run.clients.seed, "augment", server_round, client_id)
        batches = (augment_batch(batch, run.augmentation, augment_rng) for batch in batches)
    for batch in batches:
        yield model_batch(run, batch, images if kept else None)


def model_batch(run: Run, batch: Mapping[str, Any], kept: ImageTensors | None = None) -> Batch:
    """Keep what the model's task reads; captions become tokens.

    Args:
        run: Whose model reads the batch.
        batch: As ``ImageTensors.batch`` makes it.
        kept: The split that the rows of a batch without pixels are from.
    """
    keys: tuple[str, ...] = ("pixel_values", "labels")
    if run.model.task.reads_captions:
        keys = (*keys, CONCEPT, PICTURE, TEXT)
    tensors = {key: batch[key] for key in keys if key in batch}
    if kept is not None:
        tensors |= run.caches.of_images(kept, batch["index"])
    if run.model.task.reads_captions:
        tensors |= run.caches.of_texts(batch["captions"])
    return tensors


def evaluate_rows(run: Run, images: ImageTensors, rows: IntArray | None = None) -> dict[str, float]:
    """Evaluate the model, as it is, on some rows; None: all of them."""
    return run.model.evaluate(evaluation_batches(run, images, rows))


def evaluation_batches(run: Run, images: ImageTensors, rows: IntArray | None = None) -> Iterator[Batch]:
    """Yield what the model's task reads of some rows, in order; None: of all of them."""
    kept = run.caches.serves_images(images, training=False)
    for batch in images.batches(rows, run.config.evaluation.batch_size, rng=None, pixels=not kept):
        yield model_batch(run, batch, images if kept else None)


def evaluate_client(run: Run, client_id: int) -> dict[str, float]:
    """Evaluate the model, as it is, on a client's own test rows."""
    return evaluate_rows(run, run.train_images, run.shards[client_id].test)


def evaluate_server(run: Run) -> dict[str, float]:
    """Evaluate the model, as it is, on the server's test rows, or on one seeded part of them."""
    return evaluate_rows(run, run.test_images, server_test_rows(run))


@torch.no_grad()
def accuracy_by_class(run: Run) -> list[dict[str, Any]]:
    """Classify the server's test rows with the model as it is.

    Returns:
        For each class with rows its ``name``, ``num_examples`` and ``accuracy``; nothing where the run is not
        judged by the accuracy of classes.
    """
    names = run.data.class_names
    if run.headline_metric != "accuracy" or run.model.task.reads_captions or names is None:
        return []
    model = unwrap(run.model).eval()
    logits_of = model.logits if model.task.uses_head else model.zero_shot_logits
    right, total = np.zeros(len(names), dtype=np.int64), np.zeros(len(names), dtype=np.int64)
    for batch in evaluation_batches(run, run.test_images, server_test_rows(run)):
        on_device = {key: value.to(model.device) for key, value in batch.items()}
        predicted = logits_of(on_device).argmax(dim=1).cpu().numpy()
        labels = batch["labels"].cpu().numpy()
        np.add.at(total, labels, 1)
        np.add.at(right, labels[predicted == labels], 1)
    return [
        {"name": name, "num_examples": int(rows), "accuracy": int(hits) / int(rows)}
        for name, hits, rows in zip(names, right, total, strict=True)
        if rows
    ]


def server_test_rows(run: Run) -> IntArray | None:
    """Return the server's test rows that are scored, one seeded part of them; None: all."""
    wanted, num_rows = run.config.evaluation.max_samples, len(run.test_images)
    if wanted is None or wanted >= num_rows:
        return None
    rng = generator(run.config.seed, "test rows")
    return np.sort(rng.choice(num_rows, size=wanted, replace=False))

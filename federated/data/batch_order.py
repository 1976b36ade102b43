"""The order in which rows become batches: one pass for evaluation, endless reshuffled passes for local steps.

Orders only: ``federated.data.image_tensors`` fetches the images, and a cache of frozen features can be
indexed by the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from federated.data.splits import IntArray
from models.errors import UserError


def index_batches(
    indices: npt.ArrayLike, batch_size: int, *, rng: np.random.Generator | None, drop_last: bool = False
) -> Iterator[IntArray]:
    """Yield rows in batches, once each.

    Args:
        indices: rows, (n,).
        batch_size: rows per batch; the last one may have fewer.
        rng: shuffles the rows; None keeps their order.
        drop_last: leave a last batch out that is not full.
    """
    rows = np.asarray(indices, dtype=np.int64)
    _check_batch_size(batch_size)
    if rng is not None:
        rows = rng.permutation(rows)
    stop = len(rows) - len(rows) % batch_size if drop_last else len(rows)
    for start in range(0, stop, batch_size):
        yield rows[start : min(start + batch_size, stop)]


def local_index_batches(
    indices: npt.ArrayLike, batch_size: int, num_steps: int, rng: np.random.Generator
) -> Iterator[IntArray]:
    """Yield the rows of a client's local steps: passes over the shard, reshuffled each time.

    One pass has ``steps_per_epoch`` batches of sizes that differ by at most one, so that no step sees a
    remainder of one or two samples; each row occurs once a pass. A shard smaller than the batch gives itself.

    Args:
        indices: the shard's rows, (n,).
        batch_size: the most rows a batch has.
        num_steps: batches to yield.
        rng: the client's generator in this round.

    Raises:
        UserError: the shard is empty, or the batch size below 1.
    """
    rows = np.asarray(indices, dtype=np.int64)
    num_batches = steps_per_epoch(len(rows), batch_size)
    for step in range(num_steps):
        if step % num_batches == 0:
            parts = np.array_split(rng.permutation(rows), num_batches)
        yield parts[step % num_batches]


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
    """Return how many local steps see every sample of a shard once.

    Raises:
        UserError: the shard is empty, or the batch size below 1.
    """
    _check_batch_size(batch_size)
    if num_samples < 1:
        raise UserError(
            "a client without training samples cannot take local steps; use fewer clients or more data"
        )
    return math.ceil(num_samples / batch_size)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")

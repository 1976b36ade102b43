"""Seeded, stratified choices of rows: validation splits, subsets, local hold-outs, folder splits.

Everything that divides rows without dividing them over clients comes through here, so that "stratified" and
"rows that belong together stay together" mean one thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from models.errors import UserError

IntArray = npt.NDArray[np.int64]


def column_values(dataset: Dataset, column: str) -> npt.NDArray[Any]:
    """Read one scalar column as a numpy array, (N,), without decoding the others.

    Raises:
        UserError: there is no such column.
    """
    if column not in dataset.column_names:
        raise UserError(f"the data has no column {column!r}; it has {', '.join(dataset.column_names)}")
    table = dataset.select_columns([column]).with_format("arrow")[:]
    values: npt.NDArray[Any] = table.column(column).to_numpy()
    return values


def stratified_choice(
    labels: npt.ArrayLike, num_samples: int, rng: np.random.Generator, *, cover_classes: bool = True
) -> IntArray:
    """Draw rows so that every class keeps its share.

    Shares are rounded by largest remainder, ties broken at random, so exactly ``num_samples`` rows are drawn.

    Args:
        labels: class of each row, any comparable values, (N,).
        num_samples: how many rows to draw, 0 to N.
        rng: the only source of randomness.
        cover_classes: give each class at least one row wherever ``num_samples`` allows that.

    Returns:
        Sorted row numbers, (num_samples,), int64.

    Raises:
        UserError: more rows are asked for than there are.
    """
    values = np.asarray(labels)
    if not 0 <= num_samples <= len(values):
        raise UserError(f"cannot draw {num_samples} of {len(values)} samples; ask for 0 to {len(values)}")
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    quotas = _class_quotas(counts, num_samples, rng, cover_classes=cover_classes)
    chosen = [
        rng.permutation(np.flatnonzero(codes == code))[:quota] for code, quota in enumerate(quotas) if quota
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.empty(0, dtype=np.int64)


def split_rows(
    labels: npt.ArrayLike,
    num_held_out: int,
    rng: np.random.Generator,
    *,
    groups: npt.ArrayLike | None = None,
) -> tuple[IntArray, IntArray]:
    """Split rows into those kept and those held out, stratified; rows of one group stay on one side.

    Args:
        labels: class of each row, (N,).
        num_held_out: rows to hold out; with groups the number is met as near as whole groups allow.
        rng: the only source of randomness.
        groups: rows with equal value belong together (captions of one image, copies of one file), (N,).

    Returns:
        (kept, held_out): sorted row numbers, disjoint and complete.

    Raises:
        UserError: more rows are to be held out than there are.
    """
    values = np.asarray(labels)
    all_rows = np.arange(len(values), dtype=np.int64)
    if groups is None:
        held_out = stratified_choice(values, num_held_out, rng, cover_classes=False)
        return np.setdiff1d(all_rows, held_out), held_out
    _, first_rows, codes = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    num_groups = len(first_rows)
    num_groups_held_out = round(num_held_out * num_groups / max(len(values), 1))
    if num_held_out < len(values):  # neither side is emptied by rounding, as far as there are groups
        num_groups_held_out = min(max(num_groups_held_out, int(num_held_out > 0)), num_groups - 1)
    chosen = stratified_choice(values[first_rows], num_groups_held_out, rng, cover_classes=False)
    is_held_out = np.isin(codes, chosen)
    return all_rows[~is_held_out], all_rows[is_held_out]


def hold_out(
    indices: npt.ArrayLike,
    fraction: float,
    rng: np.random.Generator,
    labels: npt.ArrayLike | None = None,
    *,
    groups: npt.ArrayLike | None = None,
) -> tuple[IntArray, IntArray]:
    """Split one client's shard into local training and local test rows; training never ends up empty.

    Args:
        indices: the shard's rows, (n,).
        fraction: share to hold out, 0 <= fraction < 1; any positive share holds out at least one row of
            a shard of two or more.
        rng: the client's generator.
        labels: class of each row of the whole data set, so that ``labels[indices]`` are the shard's;
            stratifies the hold-out.
        groups: group of each row of the whole data set (its concept, say); rows of one stay together, and
            a shard of one group alone has no test rows.

    Returns:
        (train, test): sorted rows of the data set, disjoint, together the shard.

    Raises:
        UserError: the fraction is out of range or the shard is empty.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"the local test fraction is {fraction}; it must be at least 0 and below 1")
    rows = np.sort(np.asarray(indices, dtype=np.int64))
    if len(rows) == 0:
        raise UserError("a shard without samples cannot be split; use fewer clients or more data")
    wanted = max(1, round(fraction * len(rows))) if fraction > 0 else 0
    num_test = min(wanted, len(rows) - 1)
    if num_test == 0:
        return rows, rows[:0]
    shard_labels = np.zeros(len(rows)) if labels is None else np.asarray(labels)[rows]
    shard_groups = None if groups is None else np.asarray(groups)[rows]
    train, test = split_rows(shard_labels, num_test, rng, groups=shard_groups)
    return rows[train], rows[test]


def _class_quotas(
    counts: npt.NDArray[np.intp], num_samples: int, rng: np.random.Generator, *, cover_classes: bool
) -> npt.NDArray[np.intp]:
    """Rows to draw from each class: proportional, largest remainder, never above the class's count."""
    if len(counts) == 0:
        return np.zeros(0, dtype=np.intp)
    exact = counts * (num_samples / counts.sum())
    quotas = np.floor(exact + 1e-9).astype(np.intp)
    if cover_classes and num_samples >= len(counts):
        quotas = np.maximum(quotas, 1)
    order = np.lexsort((rng.random(len(counts)), quotas - exact))
    position = 0
    while quotas.sum() < num_samples:
        code = order[position % len(order)]
        if quotas[code] < counts[code]:
            quotas[code] += 1
        position += 1
    while quotas.sum() > num_samples:  # only after covering rare classes: the largest ones give back
        quotas[np.argmax(quotas)] -= 1
    return quotas

"""Partitioning: which client holds which training rows, by Flower Datasets' partitioners.

A partitioner sees only a light data set (label or domain, and the row number), shuffled by the seed first:
Flower's IID, exponential and class-wise splits take rows in the order given, so a data set sorted by class
would otherwise give an "IID" split with one class per client.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from federated.communication.run_files import WholePartition, read_run_file
from federated.config.choices import Choice, build
from federated.config.seeding import generator
from federated.data.partitioners import DOMAIN, LABEL, PARTITIONERS, ROW
from federated.data.splits import IntArray, column_values, hold_out
from models.errors import UserError
from models.files import write_text

__all__ = [
    "PARTITIONERS",
    "Partition",
    "class_counts",
    "column_values",
    "hold_out",
    "load_partition",
    "partition",
    "save_partition",
]

logger = logging.getLogger(__name__)

PARTITIONER = Choice(
    "partitioner", "partition.name", "partition.options", {"num_clients": "partition.num_clients"}
)


@dataclass(frozen=True)
class Partition:
    """One split of the training rows over clients.

    Attributes:
        indices: per client its rows of the training data, sorted, int64; client k is ``indices[k]``.
        name: the partitioner, a key of ``PARTITIONERS``.
        seed: the seed it was drawn with.
        options: the partitioner's options as given.
    """

    indices: tuple[IntArray, ...]
    name: str
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """How many clients the rows were split over."""
        return len(self.indices)


def partition(
    dataset: Dataset,
    *,
    name: str,
    num_clients: int,
    seed: int,
    label_column: str | None,
    domain_column: str | None = None,
    **options: Any,
) -> Partition:
    """Split the rows of a data set over clients.

    Every row goes to exactly one client with ``iid``, ``dirichlet``, ``natural``, ``exponential``,
    ``linear`` and ``square``, with ``shard`` by ``shard_size``, and with ``pathological`` when every class
    is drawn by some client; rows left over are logged. No client is ever empty.

    Args:
        dataset: the training rows; only the label or domain column is read.
        name: a key of ``PARTITIONERS``.
        num_clients: how many shards.
        seed: the same seed gives the same split; global random state is neither read nor changed.
        label_column: the class column, for the partitioners that use classes.
        domain_column: the domain column, for ``natural``.
        **options: the partitioner's own, such as ``alpha`` and ``min_samples`` for ``dirichlet``.

    Returns:
        The split.

    Raises:
        UserError: an unknown partitioner, option or column, or a split that cannot be had.
    """
    if num_clients < 1:
        raise UserError(f"partition.num_clients is {num_clients}; it must be at least 1")
    if num_clients > len(dataset):
        raise UserError(
            f"partition.num_clients: {num_clients} clients cannot share {len(dataset)} training samples; "
            f"set it to {len(dataset)} or fewer, or use more data"
        )
    rng = generator(seed, "partition")
    light = _light_dataset(dataset, label_column, domain_column, rng)
    with warnings.catch_warnings():
        # Flower warns at every draw of Dirichlet and at unused classes: both are reported below instead.
        warnings.simplefilter("ignore")
        try:
            indices = build(PARTITIONERS, PARTITIONER, name, options, light, num_clients, rng)
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # Flower's
            raise UserError(f"partition: {name}, {num_clients} clients, {options}: {error}") from error
    result = Partition(tuple(np.sort(rows) for rows in indices), name, seed, dict(options))
    _check_partition(result, len(dataset))
    return result


def class_counts(partition: Partition, labels: npt.ArrayLike, num_classes: int) -> IntArray:
    """Count each client's samples per class.

    Args:
        partition: the split.
        labels: class of every row of the training data, 0 to num_classes - 1, (N,).
        num_classes: how many classes there are.

    Returns:
        Counts, (clients, classes), int64.
    """
    values = np.asarray(labels)
    return np.stack(
        [np.bincount(values[rows], minlength=num_classes).astype(np.int64) for rows in partition.indices]
    )


def save_partition(
    partition: Partition,
    path: Path | str,
    labels: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write ``partition.json`` of a run folder: every client's rows and class counts.

    Args:
        partition: the split.
        path: the file to write; replaced as a whole.
        labels: class of every row of the training data; without it class counts are left empty.
        class_names: names of the classes, in order of their numbers.
    """
    names = list(class_names or ())
    if labels is None:
        counts: list[list[int]] = [[] for _ in partition.indices]
    else:
        num_classes = max(len(names), int(np.max(labels)) + 1)
        counts = class_counts(partition, labels, num_classes).tolist()
    document = {
        "partitioner": partition.name,
        "seed": partition.seed,
        "options": dict(partition.options),
        "num_clients": partition.num_clients,
        "class_names": names,
        "clients": [
            {"client_id": k, "num_examples": len(rows), "class_counts": counts[k], "indices": rows.tolist()}
            for k, rows in enumerate(partition.indices)
        ],
    }
    write_text(Path(path), json.dumps(document))


def load_partition(path: Path | str) -> Partition:
    """Read ``partition.json`` back.

    Raises:
        UserError: the file is missing, is no JSON, or lacks a key.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; give the partition.json of a run folder")
    try:
        document = read_run_file(Path(path), WholePartition)
    except UserError as error:
        raise UserError(f"{path} is no partition file ({error}); write it again with the run") from error
    clients = sorted(document["clients"], key=lambda client: client["client_id"])
    indices = tuple(np.asarray(client["indices"], dtype=np.int64) for client in clients)
    return Partition(indices, document["partitioner"], document["seed"], document.get("options", {}))


def _light_dataset(
    dataset: Dataset, label_column: str | None, domain_column: str | None, rng: np.random.Generator
) -> Dataset:
    """The columns a partitioner may read, in shuffled order, with the row number."""
    order = rng.permutation(len(dataset)).astype(np.int64)
    columns: dict[str, Any] = {ROW: order}
    for target, source in ((LABEL, label_column), (DOMAIN, domain_column)):
        if source is not None:
            columns[target] = column_values(dataset, source)[order]
    return Dataset.from_dict(columns)


def _check_partition(partition: Partition, num_samples: int) -> None:
    """No client is empty, no row has two clients; rows without one are logged."""
    empty = [k for k, rows in enumerate(partition.indices) if len(rows) == 0]
    if empty:
        raise UserError(
            f"partition.num_clients: partitioner {partition.name!r} leaves clients {empty[:10]} without "
            "samples; use fewer clients"
        )
    assigned = np.concatenate(partition.indices)
    if len(np.unique(assigned)) != len(assigned):
        raise RuntimeError(f"partitioner {partition.name!r} gave a sample to two clients")
    if len(assigned) < num_samples:
        logger.warning(
            "partitioner %r leaves %d of %d training samples without a client",
            partition.name,
            num_samples - len(assigned),
            num_samples,
        )

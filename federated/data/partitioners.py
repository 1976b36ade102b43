"""The partitioners by name: thin functions over Flower Datasets' own, which is imported when one is used.

Each function gets a *light* data set with the row numbers and at most a label and a domain column, in an
order already shuffled by the seed, and returns the rows of each client. Another partitioner is one more
function and its line in ``PARTITIONERS``. Sources: Dirichlet, Yurochkin et al. 2019 (arXiv:1905.12022);
pathological, Li et al. 2021 (arXiv:2102.02079); shards, McMahan et al. 2017 (arXiv:1602.05629).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from federated.data.splits import IntArray, column_values
from models.errors import UserError
from models.registration import registering

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

logger = logging.getLogger(__name__)

LABEL, DOMAIN, ROW = "label", "domain", "row"
"""Columns of the light data set."""

DIRICHLET_ATTEMPTS = 5
"""Fresh seeds tried; Flower draws 11 times for each, so a split is given up after 55 draws."""


def iid(light: Dataset, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Shards of equal size (to one sample), drawn at random; the data set was shuffled with the seed.

    The blocks of Flower's IidPartitioner, which takes 7 ms for each of them.
    """
    return np.array_split(column_values(light, ROW).astype(np.int64), num_clients)


def exponential(light: Dataset, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Sizes grow with exp(client): e times from client to client, so few clients only."""
    return _rows_of(_flower().ExponentialPartitioner(num_clients), light)


def linear(light: Dataset, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Sizes grow with the client's number."""
    return _rows_of(_flower().LinearPartitioner(num_clients), light)


def square(light: Dataset, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Sizes grow with the square of the client's number."""
    return _rows_of(_flower().SquarePartitioner(num_clients), light)


def dirichlet(
    light: Dataset,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    min_samples: int = 1,
) -> list[IntArray]:
    """Each class is divided over clients by fractions from Dirichlet(alpha); small alpha is uneven.

    Args:
        light: the light data set.
        num_clients: number of shards.
        rng: seeds Flower's draws.
        alpha: concentration; the smaller, the fewer classes most of a client's rows are of.
        min_samples: fewest rows of a client; a split that gives one fewer is drawn anew.

    Raises:
        UserError: no split meets ``min_samples``, or an option is out of range.
    """
    _need(light, LABEL, "dirichlet")
    if min_samples < 1 or num_clients * min_samples > len(light):
        raise UserError(
            f"min_samples={min_samples} for each of {num_clients} clients cannot be met with {len(light)} "
            f"samples; set it between 1 and {len(light) // num_clients}, or use fewer clients",
            options=("min_samples",),
        )
    if not alpha > 0:
        raise UserError(f"alpha is {alpha}; it must be above 0", options=("alpha",))
    for _ in range(DIRICHLET_ATTEMPTS):
        flower = _flower().DirichletPartitioner(
            num_clients, LABEL, float(alpha), min_samples, seed=_seed(rng)
        )
        try:
            return _rows_of(flower, light)
        except ValueError as error:  # Flower's word for "gave up after its draws"
            logger.info("no Dirichlet split with %d samples a client yet: %s", min_samples, error)
    fitting = max(len(light) // (4 * num_clients), 1)
    raise UserError(
        f"no Dirichlet split with alpha={alpha} gave each of {num_clients} clients {min_samples} samples; "
        f"raise alpha, lower min_samples, to {fitting} for example, or use fewer clients",
        options=("alpha", "min_samples"),
    )


def pathological(
    light: Dataset,
    num_clients: int,
    rng: np.random.Generator,
    *,
    classes_per_client: int = 2,
    class_assignment: str = "first-deterministic",
) -> list[IntArray]:
    """Each client has samples of exactly ``classes_per_client`` classes.

    With the default assignment the first class of client k is k modulo the number of classes, so all
    classes are used once there are as many clients; "random" and "deterministic" are Flower's others.

    Args:
        light: the light data set.
        num_clients: number of shards.
        rng: seeds Flower's draws.
        classes_per_client: number of classes of each client.
        class_assignment: which they are: "first-deterministic", "deterministic" or "random".

    Raises:
        UserError: ``classes_per_client`` is not positive.
    """
    _need(light, LABEL, "pathological")
    if classes_per_client < 1:
        raise UserError(
            f"classes_per_client is {classes_per_client}; it must be at least 1",
            options=("classes_per_client",),
        )
    return _rows_of(
        _flower().PathologicalPartitioner(
            num_clients,
            LABEL,
            classes_per_client,
            class_assignment,
            seed=_seed(rng),
        ),
        light,
    )


def shard(
    light: Dataset,
    num_clients: int,
    rng: np.random.Generator,
    *,
    shards_per_client: int | None = None,
    shard_size: int | None = None,
) -> list[IntArray]:
    """Rows sorted by class, cut into blocks; each client gets some blocks at random.

    Give ``shards_per_client`` (default 2; a remainder smaller than the number of blocks is left over) or
    ``shard_size`` (all rows are used; the number of blocks differs by at most one).

    Args:
        light: the light data set.
        num_clients: number of shards.
        rng: seeds Flower's draws.
        shards_per_client: blocks of each client; 2 when neither option is given.
        shard_size: rows of a block.

    Raises:
        UserError: both options are given, or there are too few rows.
    """
    _need(light, LABEL, "shard")
    if shards_per_client is not None and shard_size is not None:
        raise UserError(
            "give shards_per_client or shard_size, not both", options=("shards_per_client", "shard_size")
        )
    per_client = 2 if shards_per_client is None and shard_size is None else shards_per_client
    if per_client is not None and num_clients * per_client > len(light):
        raise UserError(
            f"{num_clients} clients with {per_client} shards need at least {num_clients * per_client} "
            f"samples and there are {len(light)}; lower shards_per_client or num_clients",
            options=("shards_per_client", "num_clients"),
        )
    return _rows_of(
        _flower().ShardPartitioner(
            num_clients,
            LABEL,
            per_client,
            shard_size,
            keep_incomplete_shard=shard_size is not None,
            seed=_seed(rng),
        ),
        light,
    )


def natural(light: Dataset, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """One client per domain; a multiple splits each domain evenly, a divisor gives clients several domains.

    Clients are in the order of the sorted domain names: with D domains and m·D clients, domain d is
    held by clients m·d to m·d + m - 1.
    """
    _need(light, DOMAIN, "natural")
    names, codes = np.unique(column_values(light, DOMAIN), return_inverse=True)
    if num_clients % len(names) and len(names) % num_clients:
        raise UserError(
            f"{num_clients} clients do not fit the {len(names)} domains ({', '.join(map(str, names[:10]))}); "
            f"set num_clients to {len(names)}, to a multiple of it, or to a divisor",
            options=("num_clients",),
        )
    parts = max(num_clients // len(names), 1)
    ranks = np.empty(len(codes), dtype=np.int64)  # position of a row within its domain
    for code in range(len(names)):
        ranks[codes == code] = np.arange(np.count_nonzero(codes == code))
    holder = codes * parts + ranks % parts
    domains = Dataset.from_dict({DOMAIN: holder, ROW: column_values(light, ROW)})
    group_size = max(len(names) // num_clients, 1)
    flower = _flower().GroupedNaturalIdPartitioner(DOMAIN, group_size, "strict", sort_unique_ids=True)
    return _rows_of(flower, domains)[:num_clients]


PARTITIONERS: dict[str, Callable[..., list[IntArray]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "pathological": pathological,
    "shard": shard,
    "natural": natural,
    "exponential": exponential,
    "linear": linear,
    "square": square,
}
"""Name -> function (light data set, num_clients, rng, **options) -> rows of each client."""

register_partitioner = registering("partitioner", PARTITIONERS, ("light", "num_clients", "rng"))
"""``@register_partitioner("name")`` adds a function (light, num_clients, rng, *, options) -> rows of each."""


def _flower() -> ModuleType:
    """Flower Datasets' partitioners; importing them imports plotting libraries, which takes 1.5 s."""
    from flwr_datasets import partitioner

    return partitioner


def _rows_of(flower: Partitioner, light: Dataset) -> list[IntArray]:
    """Let a Flower partitioner split the light data set and read the row numbers of each shard."""
    flower.dataset = light
    return [
        column_values(flower.load_partition(k), ROW).astype(np.int64) for k in range(flower.num_partitions)
    ]


def _need(light: Dataset, column: str, name: str) -> None:
    if column not in light.column_names:
        raise UserError(
            f"partitioner {name!r} needs a {column} for every sample and the data has none; "
            f"set data.options.{column}_column, or take partition.name=iid"
        )


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))

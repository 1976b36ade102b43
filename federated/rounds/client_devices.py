"""Links and devices of the clients, as ``clock`` describes them: by distributions, or one by one in a file.

Each client's values are drawn once, from the seed and the client alone: the n-th quantity of a client is the
quantile of its distribution at the n-th number of the client's own stream, whatever the others are.
"""

from __future__ import annotations

import csv
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from federated.communication.simulated_clock import DeviceProfile, SimulatedClock
from federated.config.choices import Choice, build
from federated.config.faults_and_clock import ClockSection, Spread
from federated.config.schema import ExperimentConfig
from federated.config.seeding import generator
from federated.rounds.faults import fault_plan
from models.errors import UserError, shortened
from models.untrusted import parsing, read_text

LIMITS = {
    "uplink_mbps": (1e-6, 1e9),
    "downlink_mbps": (1e-6, 1e9),
    "latency_seconds": (0.0, 1e6),
    "compute_factor": (0.0, 1e6),
    "availability": (0.0, 1.0),
}
"""Quantity -> its smallest and largest value, in the order in which they are drawn."""

Quantile = Callable[[float], float]
"""A share from 0 to 1 -> the value that this share of all values is below."""

CLIENT = "client_id"
_LEAST = 2.0**-54
"""A number of a stream may be 0, where a normal distribution has no quantile."""
_MOST_EXPONENT = 700.0
"""``math.exp`` of more is no float."""


def simulated_clock(config: ExperimentConfig) -> SimulatedClock | None:
    """Return the clock of a run; None where it has none.

    Raises:
        UserError: The file of profiles cannot be read, or a value is out of its range.
    """
    clock, plan = config.clock, fault_plan(config)
    if clock is None:
        return None
    deadline = clock.deadline_seconds
    profile_of = client_devices(config, clock)
    for client_id in range(config.partition.num_clients):  # a wrong value should not come up in a late round
        profile_of(client_id)

    def num_steps(server_round: int, client_id: int) -> int:
        crashed = plan.of(server_round, client_id) == "crash_before_training"
        return 0 if crashed else config.client.local_steps

    def delay_seconds(server_round: int, client_id: int) -> float:
        return deadline or 0.0 if plan.of(server_round, client_id) == "late" else 0.0

    return SimulatedClock(profile_of, num_steps, delay_seconds, deadline, config.federation.timeout_seconds)


def is_reachable(clock: SimulatedClock, seed: int, server_round: int, client_id: int) -> bool:
    """Whether a client can be reached in a round."""
    availability = clock.profile_of(client_id).availability
    return bool(generator(seed, "availability", server_round, client_id).random() < availability)


def client_devices(config: ExperimentConfig, clock: ClockSection) -> Callable[[int], DeviceProfile]:
    """Return client id -> its profile.

    Raises:
        UserError: The file of profiles cannot be read, or a distribution is none.
    """
    listed = {} if clock.path is None else read_profiles(Path(clock.path))
    defaults = {key: getattr(config.communication, key) for key in ("uplink_mbps", "downlink_mbps")}
    given = {name: getattr(clock, name) for name in LIMITS}
    given |= {name: value for name, value in defaults.items() if given[name] is None}
    quantiles = {name: quantile_of(f"clock.{name}", spread) for name, spread in given.items()}

    @functools.cache
    def profile_of(client_id: int) -> DeviceProfile:
        drawn = generator(config.seed, "devices", client_id).random(len(LIMITS))
        values = {n: quantiles[n](float(u)) for n, u in zip(LIMITS, drawn, strict=True)}
        for name, value in values.items():
            _check(name, value, f"clock.{name} gives client {client_id}")
        values |= listed.get(client_id, {})
        factor = values.pop("compute_factor")
        return DeviceProfile(**values, seconds_per_step=clock.seconds_per_step * factor)

    return profile_of


def uniform(*, low: float, high: float) -> Quantile:
    """All values between two are equally likely.

    Args:
        low: The smallest.
        high: The largest.
    """
    return lambda share: low + share * (high - low)


def lognormal(*, median: float, sigma: float) -> Quantile:
    """Half of the values are above the median; their logarithms are normal.

    Args:
        median: Above 0.
        sigma: Standard deviation of the logarithms.
    """
    normal = statistics.NormalDist()
    return lambda share: median * math.exp(min(sigma * normal.inv_cdf(max(share, _LEAST)), _MOST_EXPONENT))


def choice(*, values: list[float]) -> Quantile:
    """Each of some values is equally likely.

    Args:
        values: At least one.
    """
    if not values:
        raise UserError("there must be a value to choose", options=("values",))
    return lambda share: values[int(share * len(values))]


DISTRIBUTIONS: dict[str, Callable[..., Quantile]] = {
    "uniform": uniform,
    "lognormal": lognormal,
    "choice": choice,
}
"""Name in ``clock`` -> the distribution's quantiles."""


def quantile_of(key: str, spread: Spread) -> Quantile:
    """Return the quantiles of what stands under a key of the clock.

    Raises:
        UserError: It is no distribution.
    """
    if not isinstance(spread, dict):
        return lambda share: float(spread)
    options, keys = dict(spread), Choice("distribution", f"{key}.name", key)
    name = options.pop("name", None)
    if name not in DISTRIBUTIONS:
        raise UserError(f"{key} needs the name of a distribution, {', '.join(DISTRIBUTIONS)} (got {name!r})")
    return build(DISTRIBUTIONS, keys, str(name), options)


def read_profiles(path: Path) -> dict[int, Mapping[str, float]]:
    """Read a table of profiles: a column ``client_id``, and any of ``LIMITS``; an empty cell says nothing.

    Raises:
        UserError: It cannot be read, or a line is no profile.
    """
    remedy = f"give a CSV file with {CLIENT} and any of {', '.join(LIMITS)}"
    with parsing(path, "is no table of profiles", remedy, csv.Error):
        reader = csv.DictReader(read_text(path).splitlines())
        names = list(reader.fieldnames or ())
        if CLIENT not in names or set(names) - {CLIENT, *LIMITS}:
            raise UserError(f"{path} has the columns {shortened(','.join(names))}: {remedy}")
        profiles: dict[int, Mapping[str, float]] = {}
        for number, row in enumerate(reader, start=2):
            client_id, profile = _profile(row, f"{path}, line {number}")
            if client_id in profiles:
                raise UserError(f"{path}, line {number}: client {client_id} has two lines; leave one")
            profiles[client_id] = profile
    return profiles


def _profile(row: Mapping[str, str | None], where: str) -> tuple[int, Mapping[str, float]]:
    if None in row or None in row.values():
        raise UserError(f"{where}: it has more or fewer cells than the first line")
    try:
        client_id = int(row[CLIENT] or "")
        values = {name: float(cell) for name in LIMITS if (cell := row.get(name))}
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    for name, value in values.items():
        _check(name, value, f"{where}: {name} is")
    return client_id, values


def _check(name: str, value: float, what: str) -> None:
    least, most = LIMITS[name]
    if not least <= value <= most:
        raise UserError(f"{what} {value:g}: {name} is from {least:g} to {most:g}")

"""What the ledger's bytes mean: seconds at a bandwidth, and savings against other ways to train.

"x % less" needs its denominator: here it is always full-model FedAvg with the same clients and rounds, once
without and once with the base model that an adapter run's clients must hold before they can start. kB and MB
are powers of ten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from federated.communication.ledger import Ledger

BITS_PER_BYTE = 8
BITS_PER_MEGABIT = 1_000_000
FULL_MODEL = "full model FedAvg"
THIS_RUN = "this run"


@dataclass(frozen=True)
class Bandwidth:
    """A client's link, in megabits (1,000,000 bits) a second."""

    uplink_mbps: float = 10.0
    downlink_mbps: float = 50.0


def transfer_seconds(num_bytes: int, mbps: float) -> float:
    """Return the seconds that ``num_bytes`` take at ``mbps`` megabits a second; latency is not counted.

    Raises:
        ValueError: ``mbps`` is not positive.
    """
    if not mbps > 0:
        raise ValueError(f"a bandwidth is a positive number of megabits a second, not {mbps}")
    return num_bytes * BITS_PER_BYTE / (mbps * BITS_PER_MEGABIT)


def parallel_seconds(ledger: Ledger, bandwidth: Bandwidth) -> dict[int, tuple[float, float]]:
    """Return per round the seconds (uplink, downlink) of the slowest client, all links being busy at once.

    Clients transfer in parallel, each over a link of its own, so a phase lasts as long as its largest
    transfer; phases follow one another and add up. Compute, latency and the server's own link are left out.
    """
    slowest: dict[tuple[int, str, str], int] = defaultdict(int)
    for (server_round, phase, direction, _), totals in ledger.totals_by(
        "server_round", "phase", "direction", "client_id"
    ).items():
        key = (int(server_round), str(phase), str(direction))
        slowest[key] = max(slowest[key], totals.wire_bytes)
    seconds: dict[int, tuple[float, float]] = {}
    for (server_round, _, direction), wire_bytes in slowest.items():
        uplink, downlink = seconds.get(server_round, (0.0, 0.0))
        if direction == "uplink":
            uplink += transfer_seconds(wire_bytes, bandwidth.uplink_mbps)
        else:
            downlink += transfer_seconds(wire_bytes, bandwidth.downlink_mbps)
        seconds[server_round] = (uplink, downlink)
    return seconds


@dataclass(frozen=True)
class ModelSizes:
    """What one transfer, or one client, costs in ways of training that this run did not use.

    Attributes:
        full_model_bytes: every weight, as full-model FedAvg sends it (fp32).
        head_bytes: the trained head alone; None when the task has no head.
        base_bytes: the base model that a client must hold before round 1 where not every weight travels. 0
            when it is declared pre-installed.
        ships_base: whether this run sends every weight itself, so that its own clients need no base.
    """

    full_model_bytes: int
    head_bytes: int | None = None
    base_bytes: int = 0
    ships_base: bool = False

    def one_off_base_bytes(self, ledger: Ledger) -> int:
        """Return the base of every client that took part in this run; 0 where it needs none."""
        return 0 if self.ships_base else self.base_bytes * len(ledger.clients())


@dataclass(frozen=True)
class ComparisonRow:
    """One way to train, and what it sends.

    Attributes:
        name: the way.
        payload_bytes_per_client_round: training payload, both directions, of one client in one round.
        total_bytes: everything sent. Measured rows: wire bytes; computed ones: payload, so a computed row is
            never flattered by overhead that it was not charged.
        total_bytes_with_base: the same and the one-off base model of each client that took part.
        saving: 1 - total / full-model FedAvg's total; 0.98 is "98 % less".
        saving_with_base: the same with the base counted (full-model FedAvg ships it in its normal downlink).
        measured: from a ledger, not computed.
    """

    name: str
    payload_bytes_per_client_round: int
    total_bytes: int
    total_bytes_with_base: int
    saving: float
    saving_with_base: float
    measured: bool


@dataclass(frozen=True)
class _Cost:
    """A comparison row before its savings are known."""

    name: str
    per_client_round: int
    total: int
    base: int
    measured: bool


def comparison(
    ledger: Ledger, sizes: ModelSizes, measured_runs: Mapping[str, Path] | None = None
) -> list[ComparisonRow]:
    """Compare this run with full-model FedAvg (fp32 and fp16), head-only training and other runs.

    A computed row repeats this run's transfers: each one that carried weights (training in both directions,
    evaluation downlinks) carries the other way's weights instead, for the same clients and rounds. The row
    named ``FULL_MODEL`` is what every saving refers to.

    Args:
        ledger: this run's transfers.
        sizes: bytes of one transfer in the other ways, and of the base.
        measured_runs: run folders by row name; a name that a computed row has replaces that row.
    """
    transfers = sum(1 for row in ledger.rows if row.phase != "setup" and row.payload_bytes > 0)
    costs = [
        _measured_cost(THIS_RUN, ledger, sizes.one_off_base_bytes(ledger)),
        _computed_cost(FULL_MODEL, sizes.full_model_bytes, transfers),
        _computed_cost(f"{FULL_MODEL}, fp16", sizes.full_model_bytes // 2, transfers),
    ]
    if sizes.head_bytes is not None:
        base = sizes.base_bytes * len(ledger.clients())
        costs.append(_computed_cost("head only", sizes.head_bytes, transfers, base))
    by_name = {cost.name: cost for cost in costs}
    for name, run_dir in (measured_runs or {}).items():
        other = Ledger.read_csv(Path(run_dir) / "communication.csv")
        by_name[name] = _measured_cost(name, other, _recorded_base_bytes(Path(run_dir)))
    reference = by_name[FULL_MODEL]
    return [_with_savings(cost, reference) for cost in by_name.values()]


def _computed_cost(name: str, transfer_bytes: int, transfers: int, base: int = 0) -> _Cost:
    return _Cost(name, 2 * transfer_bytes, transfer_bytes * transfers, base, measured=False)


def _measured_cost(name: str, ledger: Ledger, base: int) -> _Cost:
    client_rounds = len({(row.server_round, row.client_id) for row in ledger.select(phase="train")})
    payload_bytes = ledger.total(phase="train").payload_bytes
    per_client_round = round(payload_bytes / client_rounds) if client_rounds else 0
    return _Cost(name, per_client_round, ledger.total().wire_bytes, base, measured=True)


def _recorded_base_bytes(run_dir: Path) -> int:
    """Return what the run in ``run_dir`` says about its one-off base; 0 when it says nothing."""
    from federated.communication.run_files import Summary, read_run_file  # the command line starts without it

    path = run_dir / "summary.json"
    if not path.is_file():
        return 0
    return read_run_file(path, Summary).get("communication", {}).get("one_off_base_bytes") or 0


def _with_savings(cost: _Cost, reference: _Cost) -> ComparisonRow:
    with_base, reference_with_base = cost.total + cost.base, reference.total + reference.base
    return ComparisonRow(
        name=cost.name,
        payload_bytes_per_client_round=cost.per_client_round,
        total_bytes=cost.total,
        total_bytes_with_base=with_base,
        saving=1 - cost.total / reference.total if reference.total else 0.0,
        saving_with_base=1 - with_base / reference_with_base if reference_with_base else 0.0,
        measured=cost.measured,
    )


def communication_summary(
    ledger: Ledger,
    sizes: ModelSizes,
    bandwidth: Bandwidth,
    measured_runs: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Return the ``communication`` section of ``summary.json``."""
    uplink, downlink = ledger.total(direction="uplink"), ledger.total(direction="downlink")
    seconds = parallel_seconds(ledger, bandwidth).values()
    return {
        "uplink_payload_bytes": uplink.payload_bytes,
        "downlink_payload_bytes": downlink.payload_bytes,
        "uplink_wire_bytes": uplink.wire_bytes,
        "downlink_wire_bytes": downlink.wire_bytes,
        "total_wire_bytes": uplink.wire_bytes + downlink.wire_bytes,
        "one_off_base_bytes": sizes.one_off_base_bytes(ledger),
        "comparison": [asdict(row) for row in comparison(ledger, sizes, measured_runs)],
        "seconds_at_bandwidth": {
            **asdict(bandwidth),
            "uplink_seconds": sum(up for up, _ in seconds),
            "downlink_seconds": sum(down for _, down in seconds),
        },
    }

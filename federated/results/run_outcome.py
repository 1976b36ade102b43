"""What a study keeps of one run: its curve against rounds and bytes, and what a target or a budget gave.

Cost-to-Target is what a run had sent when its headline metric first reached a value; Quality-under-Budget is
the metric of the last model that was evaluated before more than the budget had been sent. Bytes are wire
bytes, both ways.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from federated.results import plots
from federated.results.records import RunRecord
from federated.results.wording import is_share
from models.errors import UserError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d+))?"


@dataclass(frozen=True)
class Point:
    """A model that was evaluated.

    Attributes:
        server_round: Its round.
        value: Of the headline metric.
        wire_bytes: Sent until it existed, without the base model.
        wire_bytes_with_base: The same, and the base model of every client that had taken part.
        simulated_seconds: On the simulated clock at the end of its round; None without one.
    """

    server_round: int
    value: float
    wire_bytes: float
    wire_bytes_with_base: float
    simulated_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    Attributes:
        metric: Key of the headline metric; larger is better.
        final: Its value at the end; None where it was no number.
        points: The evaluated models, in order.
        wire_bytes: Sent in all, without the base model.
        wire_bytes_with_base: The same with it.
    """

    metric: str
    final: float | None
    points: tuple[Point, ...]
    wire_bytes: float
    wire_bytes_with_base: float

    def reached(self, target: float) -> Point | None:
        """Return the first model that is at least as good as the target; None where none is."""
        return next((point for point in self.points if point.value >= target), None)

    def within(self, budget_bytes: float) -> Point | None:
        """Return the last model that existed before more than the budget was sent."""
        return next((point for point in reversed(self.points) if point.wire_bytes <= budget_bytes), None)


def outcome_of(run: RunRecord) -> Outcome:
    """Return what a study keeps of a run."""
    final, total = run.headline["final"], run.ledger.total().wire_bytes
    base = float((run.summary.get("communication") or {}).get("one_off_base_bytes") or 0)
    clients = run.ledger.clients()
    base_of_client = base / len(clients) if clients else 0.0
    joined: dict[int, int] = {}
    for row in run.ledger.rows:
        if row.phase != "setup":  # what an evaluation sends comes after the model that it measures
            first = row.server_round + (row.phase == "evaluate")
            joined[row.client_id] = min(joined.get(row.client_id, first), first)
    try:
        curve = plots.curve_of(run.name, run.metrics, run.metric, run.ledger)
        rounds, _ = plots.series(plots.curve_lines(run.metrics), run.metric)
    except plots.MissingData:
        return Outcome(run.metric, final, (), total, total + base)
    clock = {line["server_round"]: line.get("simulated_seconds_total") for line in run.metrics}
    points = tuple(
        Point(t, value, sent, sent + base_of_client * sum(first <= t for first in joined.values()), clock[t])
        for t, value, sent in zip(rounds, curve.values, curve.wire_bytes, strict=True)
        if math.isfinite(value)
    )
    return Outcome(run.metric, final, points, total, total + base)


def parse_target(text: float | str, metric: str) -> float:
    """Return a target: ``0.65``, ``65 %`` or, of a metric that is a share, ``65``.

    Raises:
        UserError: It is no number.
    """
    found = re.fullmatch(rf"\s*{_NUMBER}\s*(%?)\s*", str(text))
    if found is None:
        raise UserError(f"target {text!r} is no value to reach: give a share such as 0.65, or 65 %")
    value = float(str(text).replace("%", ""))
    return value / 100 if found[3] or (is_share(metric) and value > 1) else value


def parse_budget(text: float | str) -> int:
    """Return a budget in bytes: ``5MB``, ``500 kB``, ``2e6``; kB and MB are powers of ten.

    Raises:
        UserError: It is no number of bytes.
    """
    found = re.fullmatch(rf"\s*({_NUMBER})\s*([kKmMgGtT]?[bB]?)\s*", str(text))
    if found is None or found[4].lower() not in _UNITS:
        raise UserError(f"budget {text!r} is no number of bytes: give one such as 5MB, 500kB or 2000000")
    return round(float(found[1]) * _UNITS[found[4].lower()])

"""What one round produced, before it becomes a line of ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from federated.communication.foreign_text import shown

SCORED_BY, CLIENTS = "scored_by", "clients"
"""Key and value in the lines of a method without a global model: from round 1 on its clients score their own
models, each on its own test rows. Without the key the server scored one model on its test rows."""


@dataclass(frozen=True)
class Failure:
    """A client whose answer could not be used in a round.

    Attributes:
        client_id: The client.
        reason: Why; whatever the client wrote of it is made fit to be shown.
        fault: The fault on purpose that the client was struck by; None where there was none.
    """

    client_id: int
    reason: str
    fault: str | None = None

    def __post_init__(self) -> None:
        """Let nothing through that a terminal or a file would take for more than words."""
        object.__setattr__(self, "reason", shown(self.reason))

    def entry(self) -> dict[str, Any]:
        """Return the failure as it stands in ``metrics.jsonl``."""
        if self.fault is None:
            return {"client_id": self.client_id, "reason": self.reason}
        reason = f"{self.fault} (on purpose): {self.reason}"
        return {"client_id": self.client_id, "reason": reason, "fault": self.fault}


@dataclass
class RoundRecord:
    """What one round produced, as it goes into ``metrics.jsonl``."""

    server_round: int
    cohort: list[int] = field(default_factory=list)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False

    def name_unreached(self, client_ids: Sequence[int]) -> None:
        """Name, once in a round, the clients that nothing could be sent to."""
        reason = "it could not be reached (clock.availability); nothing was sent"
        unreached = [Failure(client_id, reason) for client_id in client_ids]
        self.failed += [failure for failure in unreached if failure not in self.failed]


def failure_counts(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how often clients failed by each fault on purpose, and as ``other`` for reasons of their own."""
    names = Counter(entry.get("fault", "other") for line in lines for entry in line.get("failed") or [])
    return dict(sorted(names.items()))


def best_value(lines: Sequence[Mapping[str, Any]], metric: str, *, default: float) -> float:
    """Return the largest value of a metric that is a number; the default where no line has a value."""
    values = [line[metric] for line in lines if metric in line]
    numbers = [value for value in values if not math.isnan(value)]
    return max(numbers, default=math.nan if values else default)


def curve_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of ``metrics.jsonl`` that make one curve: those scored as the last one was."""
    scorer = lines[-1].get(SCORED_BY) if lines else None
    return [line for line in lines if line.get(SCORED_BY) == scorer]


WIRE = frozenset({"uplink_wire_bytes", "downlink_wire_bytes"})
"""Keys of what was sent in a round."""


def wire_bytes(line: Mapping[str, Any]) -> int:
    """Return what a line of ``metrics.jsonl`` says was sent in its round, both ways."""
    return sum(line.get(key) or 0 for key in WIRE)

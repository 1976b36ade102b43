"""What one round produced, before it becomes a line of ``metrics.jsonl``.

Where it stands in a round: the strategy fills it while Flower goes through the round; the server writes it
down at the end (``federated.server.round_line``).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """A client whose answer could not be used in a round."""

    client_id: int
    reason: str


@dataclass
class RoundRecord:
    """What one round produced, as it goes into ``metrics.jsonl``."""

    server_round: int
    cohort: list[int] = field(default_factory=list)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False

"""What a contender reports: seconds and mean training loss of each round."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Grows by one entry a round."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, started: float, loss: float) -> None:
        """Enter a round that began at ``started`` (``time.perf_counter``) and ends now."""
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)

"""Which evaluation was the best so far, and whether it is time to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class BestSoFar:
    """Follows one metric from evaluation to evaluation.

    Attributes:
        metric: Its key; a loss is better when it is lower, everything else when it is higher.
        patience: Evaluations in a row without an improvement that are one too many; None: never too many.
        minimum_change: An improvement must be larger than this to reset the patience.
        best: The best value so far; None before the first.
        best_epoch: When it was.
    """

    metric: str
    patience: int | None = None
    minimum_change: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    _reference: float | None = None
    _without_improvement: int = 0

    def update(self, epoch: int, value: float) -> bool:
        """Take in an evaluation; return whether it is the best so far. NaN never is."""
        if self._improves(value, self._reference, self.minimum_change):
            self._reference, self._without_improvement = value, 0
        else:
            self._without_improvement += 1
        if not self._improves(value, self.best, 0.0):
            return False
        self.best, self.best_epoch = value, epoch
        return True

    @property
    def is_exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self._without_improvement >= self.patience

    def _improves(self, value: float, reference: float | None, change: float) -> bool:
        if math.isnan(value):
            return False
        if reference is None:
            return True
        gain = reference - value if "loss" in self.metric else value - reference
        return gain > change

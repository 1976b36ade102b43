"""Which evaluation was the best so far, and whether it is time to stop: in epochs, or in rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from federated.methods import ServerState
from federated.rounds.batches import evaluate_rows
from federated.rounds.global_model import load_global_state
from federated.rounds.run import Run
from models.errors import UserError
from models.untrusted import check


class _Seen(TypedDict):
    best: float | None
    best_epoch: int
    reference: float | None
    without_improvement: int


class _Evaluated(TypedDict):
    best: dict[str, Any]
    evaluated: int


_SEEN, _EVALUATED = TypeAdapter(_Seen), TypeAdapter(_Evaluated)


@dataclass
class BestSoFar:
    """Follows one metric from evaluation to evaluation.

    Attributes:
        metric: Its key; a loss is better when it is lower, everything else when it is higher.
        patience: Evaluations in a row without an improvement that are one too many; None: never too many.
        minimum_change: An improvement must be larger than this to reset the patience.
        best: The best value so far; None before the first.
        best_epoch: When it was; the round of a federated run.
    """

    metric: str
    patience: int | None = None
    minimum_change: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    _reference: float | None = None
    _without_improvement: int = 0

    def update(self, epoch: int, value: float) -> bool:
        """Receive an evaluation; return whether it is the best so far. NaN never is."""
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

    def state(self) -> Any:
        """Return what it has seen, JSON values."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "reference": self._reference,
            "without_improvement": self._without_improvement,
        }

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned; metric, patience and minimum change stay as they are.

        Raises:
            UserError: It is no such state.
        """
        seen = check(_SEEN, state, "what a commit says of early stopping")
        self.best, self.best_epoch = seen["best"], seen["best_epoch"]
        self._reference, self._without_improvement = seen["reference"], seen["without_improvement"]

    def _improves(self, value: float, reference: float | None, change: float) -> bool:
        if math.isnan(value):
            return False
        if reference is None:
            return True
        gain = reference - value if "loss" in self.metric else value - reference
        return gain > change


@dataclass(eq=False)
class EarlyStopping:
    """Ends a federated run whose global model no longer improves on the validation rows.

    What it remembers is in every commit.

    Attributes:
        run: Whose model is evaluated.
        best: The best evaluation so far.
        metrics: Of the last evaluation, under their names in ``metrics.jsonl``.
        evaluated: The round that it was after.
    """

    run: Run
    best: BestSoFar
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1

    def evaluate(self, server_state: ServerState, server_round: int) -> dict[str, float]:
        """Return the validation metrics of the model after a round, evaluated once; none where not due.

        Raises:
            UserError: The metric that decides is not among them.
        """
        rounds, every = self.run.config.federation.rounds, self.run.config.evaluation.every
        if server_round % every and server_round != rounds:
            return {}
        if self.evaluated != server_round:
            load_global_state(self.run, server_state)
            found = evaluate_rows(self.run, "validation")
            found.pop("num_examples", None)
            if self.best.metric not in found:
                raise UserError(
                    f"federation.early_stopping.metric={self.best.metric}: the validation split is evaluated "
                    f"for {', '.join(sorted(found))}"
                )
            self.best.update(server_round, found[self.best.metric])
            self.metrics = {f"validation_{name}": value for name, value in found.items()}
            self.evaluated = server_round
        return self.metrics

    def reason(self, server_round: int) -> str | None:
        """Return why a run ends after a round that is not its last; None where it goes on."""
        if not self.best.is_exhausted or server_round >= self.run.config.federation.rounds:
            return None
        best = self.best
        by = f" by more than {best.minimum_change:g}" if best.minimum_change else ""
        reached = "" if best.best is None else f"; its best was {best.best:.4g} after round {best.best_epoch}"
        return (
            f"stopped after round {server_round} of {self.run.config.federation.rounds}: validation "
            f"{best.metric} has not improved{by} in {best.patience} evaluations{reached}"
        )

    def state(self) -> Any:
        """Return what the rounds to come need."""
        return {"best": self.best.state(), "evaluated": self.evaluated}

    def restore(self, state: Any) -> None:
        """Go on from what ``state`` returned; the settings stay those of this run.

        Raises:
            UserError: It is no such state.
        """
        seen = check(_EVALUATED, state, "what a commit says of early stopping")
        self.best.restore(seen["best"])
        self.evaluated = seen["evaluated"]


def early_stopping(run: Run) -> EarlyStopping | None:
    """Return a run's early stopping; None where it has none."""
    section = run.config.federation.early_stopping
    if section.patience is None:
        return None
    best = BestSoFar(section.metric or run.headline_metric, section.patience, section.minimum_change)
    return EarlyStopping(run, best)

"""What came out of a study: a row a variant, with means over seeds, paired differences and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from federated.results.run_outcome import Outcome
from federated.results.seed_statistics import Difference, Spread, holm, paired_difference, spread


@dataclass(frozen=True)
class VariantRuns:
    """A variant and its finished runs.

    Attributes:
        name: Of the variant.
        baseline: Name of the variant that it is compared with; its own where it is one.
        runs: Seed -> what came out.
        chosen: The value that it chose for the tuned key; None without one.
    """

    name: str
    baseline: str
    runs: Mapping[int, Outcome]
    chosen: Any = None

    @property
    def finals(self) -> dict[int, float]:
        """Seed -> the headline metric at the end, where that is a number."""
        return {seed: run.final for seed, run in self.runs.items() if run.final is not None}

    def spread_of(self, value: Callable[[Outcome], float]) -> Spread | None:
        """Return mean and interval of a value over the finished runs."""
        return spread([value(run) for run in self.runs.values()])


@dataclass(frozen=True)
class Cost:
    """Cost-to-Target of a variant.

    Attributes:
        reached: Seeds that reached the target.
        num: Seeds that finished.
        rounds: Until it was reached. A seed that did not reach it counts with all of its rounds, so that the
            mean is a lower bound where ``reached`` is less than ``num``. So it is with the bytes.
        wire_bytes: Sent until then, without the base model.
        wire_bytes_with_base: The same with it.
        simulated_seconds: On the simulated clock; None without one.
    """

    reached: int
    num: int
    rounds: Spread
    wire_bytes: Spread
    wire_bytes_with_base: Spread
    simulated_seconds: Spread | None


@dataclass(frozen=True)
class StudyResults:
    """A study's finished runs, by variant.

    Attributes:
        name: Of the study.
        variants: In the study's order.
        seeds: Those that were asked for.
        tuned_key: Dotted key that each variant chose a value of; None without one.
        failures: Name of a run -> why it failed.
        notes: What a reader of the tables must know, a sentence each.
    """

    name: str
    variants: tuple[VariantRuns, ...]
    seeds: tuple[int, ...]
    tuned_key: str | None = None
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def metric(self) -> str:
        """Key of the headline metric."""
        runs = (run for variant in self.variants for run in variant.runs.values())
        return next((run.metric for run in runs), "accuracy")

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """Variant -> how it differs from its baseline; baselines themselves are left out."""
        finals = {variant.name: variant.finals for variant in self.variants}
        found = {
            variant.name: paired_difference(variant.finals, finals[variant.baseline])
            for variant in self.variants
            if variant.baseline != variant.name
        }
        return {name: difference for name, difference in found.items() if difference is not None}

    @cached_property
    def corrected_p_values(self) -> dict[str, float]:
        """Variant -> the p-value of its difference, corrected by Holm for all comparisons of the study."""
        raw = {name: d.p_value for name, d in self.differences.items() if d.p_value is not None}
        return dict(zip(raw, holm(list(raw.values())), strict=True))

    def cost_to(self, target: float) -> dict[str, Cost]:
        """Return variant -> what it took to reach a value of the headline metric."""
        costs = {}
        for variant in self.variants:
            runs = [run for run in variant.runs.values() if run.points]
            found = [run.reached(target) for run in runs]
            counted = [point or run.points[-1] for point, run in zip(found, runs, strict=True)]
            seconds = [p.simulated_seconds for p in counted if p.simulated_seconds is not None]
            rounds = spread([point.server_round for point in counted])
            sent = spread([point.wire_bytes for point in counted])
            with_base = spread([point.wire_bytes_with_base for point in counted])
            if rounds and sent and with_base:
                reached = sum(point is not None for point in found)
                clock = spread(seconds) if len(seconds) == len(runs) else None
                costs[variant.name] = Cost(reached, len(runs), rounds, sent, with_base, clock)
        return costs

    def quality_under(self, budget_bytes: float) -> dict[str, Spread]:
        """Return variant -> the metric of its last model before more than a budget was sent."""
        found = {}
        for variant in self.variants:
            points = [run.within(budget_bytes) for run in variant.runs.values()]
            values = spread([point.value for point in points if point is not None])
            if values is not None:
                found[variant.name] = values
        return found

    def frame(self, target: float | None = None, budget_bytes: float | None = None) -> pd.DataFrame:
        """Return one row a variant with all figures, not rounded."""
        costs = {} if target is None else self.cost_to(target)
        qualities = {} if budget_bytes is None else self.quality_under(budget_bytes)
        rows = []
        for variant in self.variants:
            row: dict[str, Any] = {"variant": variant.name, "seeds": len(variant.finals)}
            if self.tuned_key is not None:
                row[self.tuned_key] = variant.chosen
            row |= _columns(self.metric, spread(list(variant.finals.values())))
            row |= _columns("wire_bytes", variant.spread_of(lambda run: run.wire_bytes))
            row |= _columns("wire_bytes_with_base", variant.spread_of(lambda run: run.wire_bytes_with_base))
            if (difference := self.differences.get(variant.name)) is not None:
                row |= {"baseline": variant.baseline, **_columns("difference", difference.spread)}
                row |= {"p_value": difference.p_value, "p_holm": self.corrected_p_values.get(variant.name)}
                row |= {"wins": difference.wins, "ties": difference.ties, "losses": difference.losses}
            if (cost := costs.get(variant.name)) is not None:
                row |= {
                    "target": target,
                    "reached": cost.reached,
                    **_columns("rounds_to_target", cost.rounds),
                }
                row |= _columns("wire_bytes_to_target", cost.wire_bytes)
                row |= _columns("wire_bytes_with_base_to_target", cost.wire_bytes_with_base)
                row |= _columns("simulated_seconds_to_target", cost.simulated_seconds)
            if variant.name in qualities:
                row |= {"budget_bytes": budget_bytes, **_columns("at_budget", qualities[variant.name])}
            rows.append(row)
        return pd.DataFrame(rows)


def _columns(name: str, values: Spread | None) -> dict[str, float | None]:
    if values is None:
        return {}
    return {
        name: values.mean,
        f"{name}_sd": values.sd,
        f"{name}_low": values.low,
        f"{name}_high": values.high,
    }

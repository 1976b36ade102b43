"""The adapter ranks of a run's clients, and the scaling that goes with each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from federated.config.schema import ExperimentConfig
from federated.methods import Aggregator
from lora.adapters import factor_pairs
from models.state import State


class RankSettings(Protocol):
    """What ranks follow from: a run, or the plan of one."""

    @property
    def config(self) -> ExperimentConfig:
        """The settings."""

    @property
    def aggregator(self) -> Aggregator:
        """The method."""

    @property
    def initial_state(self) -> State:
        """What travels, before round 1."""

    @property
    def scaling(self) -> Mapping[str, float]:
        """Module -> s at the model's rank."""


def mixed_ranks(run: RankSettings) -> bool:
    """Whether clients have ranks of their own: given ones, or such as a rule lets fall in training."""
    return run.config.client.ranks is not None or run.aggregator.client.changes_ranks


def rank_of(run: RankSettings, client_id: int) -> int | None:
    """Return a client's rank before round 1; None where all have the model's for good."""
    if not mixed_ranks(run):
        return None
    state = run.initial_state
    ranks = run.config.client.ranks or [max(state[pair.a].shape[0] for pair in factor_pairs(state))]
    return ranks[client_id % len(ranks)]


def scaling_at(run: RankSettings, rank: int | None) -> dict[str, float]:
    """Return module -> s of an adapter of another rank: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    if rank is None:
        return dict(run.scaling)
    power = 0.5 if run.config.lora.use_rslora else 1.0
    ranks = {pair.module: run.initial_state[pair.a].shape[0] for pair in factor_pairs(run.initial_state)}
    return {
        module: s * (ranks[module] / min(rank, ranks[module])) ** power for module, s in run.scaling.items()
    }

"""How far the clients' next model is from the average of the models that they trained.

Where it stands in a round: after ``apply``, as a metric. Everything is a sum of low-rank products, and their
norms are taken from the factors (``federated.lowrank``): no client's own (d_out, d_in) matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from federated.aggregators.averaging import in_client_order, weights_of
from federated.aggregators.downlinks import profile_of
from federated.aggregators.protocol import Aggregator, ServerState, Update
from federated.lowrank import LowRank, distance_and_size, scaled, stack
from lora.adapters import FactorPair, factor_pairs
from models.state import State


def aggregation_error(
    aggregator: Aggregator, before: ServerState, after: ServerState, updates: Sequence[Update]
) -> float | None:
    """Return ||held - ideal||_F / ||ideal||_F over all modules together.

    *Ideal* is sum_k w_k s_k B_k A_k; where clients start from truncations D_k of the global adapter G, it is
    G + sum_k w_k (s_k B_k A_k - D_k). *Held* is the global s B A after the round plus what the round merged
    into the base. Both leave out the base as it was before. A client of lower rank holds a truncation of it.

    Args:
        aggregator: The rule that made ``after`` from ``before``.
        before: The server at the round's start.
        after: The server at its end.
        updates: Those that were applied.

    Returns:
        The error; None without adapters and for rules without a global model.
    """
    pairs = factor_pairs(before.state)
    if not pairs or not aggregator.has_global_model:
        return None
    terms = _terms_of_the_ideal(aggregator, before, updates)
    squared_distance = squared_size = 0.0
    for pair in pairs:
        ideal = _sum_of(terms, pair)
        held = held_change(aggregator, before, after, pair)
        distance, size = distance_and_size(held, ideal)
        squared_distance, squared_size = squared_distance + distance**2, squared_size + size**2
    if squared_size == 0.0:
        return 0.0 if squared_distance == 0.0 else math.inf
    return math.sqrt(squared_distance / squared_size)


_Factor = Callable[[FactorPair], float]


def _terms_of_the_ideal(
    aggregator: Aggregator, before: ServerState, updates: Sequence[Update]
) -> list[tuple[State, _Factor]]:
    """Return states and what to multiply each of their products by; the sum is what should be held."""
    ordered = in_client_order(updates)
    terms: list[tuple[State, _Factor]] = []
    for update, weight in zip(ordered, weights_of(ordered), strict=True):
        trained = aggregator.client.to_model({**before.state, **update.state})
        terms.append((trained, _times(weight, update.scaling)))
        if aggregator.allows_mixed_ranks and update.rank is not None:
            started = aggregator.downlink(before, profile_of(update)).state
            terms.append((started, _times(-weight, update.scaling)))
            whole = {name: before.state[name] for name in started}
            terms.append((whole, _times(weight, before.scaling)))
    return terms


def _sum_of(terms: Sequence[tuple[State, _Factor]], pair: FactorPair) -> LowRank:
    """Stack one module's products; each column of the left factor takes its term's factor."""
    present = [(state, factor(pair)) for state, factor in terms if pair.a in state]
    ranks = [state[pair.a].shape[0] for state, _ in present]
    factors = torch.from_numpy(np.repeat([factor for _, factor in present], ranks))  # (q,) float64
    left = torch.cat([state[pair.b] for state, _ in present], dim=1)
    return LowRank(left * factors, torch.cat([state[pair.a] for state, _ in present], dim=0))


def _times(weight: float, scaling: Mapping[str, float]) -> _Factor:
    return lambda pair: weight * scaling[pair.module]


def held_change(aggregator: Aggregator, before: ServerState, after: ServerState, pair: FactorPair) -> LowRank:
    """Return one module of the global model after a round, without its base before it."""
    adapter = scaled(_product(aggregator.client.to_model(after.state), pair), after.scaling[pair.module])
    delta = after.base_delta.get(pair.module)
    terms = () if delta is None else delta.terms
    return stack([adapter, *(term for merged_at, term in terms if merged_at > before.server_round)])


def _product(state: State, pair: FactorPair) -> LowRank:
    return LowRank(state[pair.b], state[pair.a])

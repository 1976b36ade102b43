"""How far the clients' next model is from the average of the models that they trained.

Where it stands in a round: after ``apply``, as a metric. Everything is a sum of low-rank products, so the
error is computed without forming one (d_out, d_in) matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from federated.aggregators.averaging import in_client_order, weights_of
from federated.aggregators.downlinks import profile_of
from federated.aggregators.protocol import Aggregator, ServerState, Update
from federated.lowrank import LowRank, difference, frobenius_norm, scaled, stack
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
    squared_distance = squared_size = 0.0
    for pair in pairs:
        ideal = ideal_change(aggregator, before, updates, pair)
        held = held_change(aggregator, before, after, pair)
        squared_distance += frobenius_norm(difference(held, ideal)) ** 2
        squared_size += frobenius_norm(ideal) ** 2
    if squared_size == 0.0:
        return 0.0 if squared_distance == 0.0 else math.inf
    return math.sqrt(squared_distance / squared_size)


def ideal_change(
    aggregator: Aggregator, before: ServerState, updates: Sequence[Update], pair: FactorPair
) -> LowRank:
    """Return what one module of the global model should be after a round, without its base before it."""
    ordered = in_client_order(updates)
    terms = []
    for update, weight in zip(ordered, weights_of(ordered), strict=True):
        trained = aggregator.client.to_model({**before.state, **update.state})
        terms.append(scaled(_product(trained, pair), weight * update.scaling[pair.module]))
        if aggregator.allows_mixed_ranks and update.rank is not None:
            started = aggregator.downlink(before, profile_of(update)).state
            if pair.a in started:
                terms.append(scaled(_product(started, pair), -weight * update.scaling[pair.module]))
                terms.append(scaled(_product(before.state, pair), weight * before.scaling[pair.module]))
    return stack(terms)


def held_change(aggregator: Aggregator, before: ServerState, after: ServerState, pair: FactorPair) -> LowRank:
    """Return one module of the global model after a round, without its base before it."""
    adapter = scaled(_product(aggregator.client.to_model(after.state), pair), after.scaling[pair.module])
    delta = after.base_delta.get(pair.module)
    terms = () if delta is None else delta.terms
    return stack([adapter, *(term for merged_at, term in terms if merged_at > before.server_round)])


def _product(state: State, pair: FactorPair) -> LowRank:
    return LowRank(state[pair.b], state[pair.a])

"""How far the global model is from the average of the models that the clients trained.

What clients trained is made of what they held, after the downlink's codec, and of what they sent; what the
uplink's codec lost only they know, and they report its size (``encoding_loss``). Everything is a sum of
low-rank products, whose norms ``federated.methods.lowrank`` takes: no client's own (d_out, d_in) matrix is
formed, and their sum only where that is faster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from federated.methods.averaging import grouped, in_client_order, weights_of
from federated.methods.downlinks import profile_of
from federated.methods.lowrank import LowRank, distance_and_size, scaled, stack
from federated.methods.protocol import Aggregator, ServerState, Update
from lora.adapters import FactorPair, factor_pairs
from models.state import Layout, State, layout_of, vector_of

_MAX_STACKED_VALUES = 4_000_000
"""Most values of all clients' factors that are copied side by side, 16 MB."""


@dataclass(frozen=True)
class EncodingLoss:
    """What the uplink's codec did to one client's model, over all modules; zeros without loss.

    Attributes:
        squared_distance: ||trained - decoded||_F^2 of s_k B_k A_k.
        squared_size_change: ||trained||_F^2 - ||decoded||_F^2.
    """

    squared_distance: float = 0.0
    squared_size_change: float = 0.0


@dataclass(frozen=True)
class Known:
    """What is known of one client of a round beside its update, where a codec loses something.

    Attributes:
        held: The wire state that it started from, where that is not the server's own: lossy downlinks.
        loss: What its uplink lost.
    """

    held: State | None = None
    loss: EncodingLoss = EncodingLoss()


def encoding_loss(
    aggregator: Aggregator, trained: State, decoded: State, scaling: Mapping[str, float]
) -> EncodingLoss:
    """Return how far a client's model is from the one that its update decodes to.

    Args:
        aggregator: The rule.
        trained: The wire state after training; what is private in it is no part of the global model.
        decoded: The same, with what the server decodes in place of what was sent.
        scaling: Module -> s_k.
    """
    private = set(aggregator.private(trained))
    first, second = (
        aggregator.client.to_model({name: value for name, value in state.items() if name not in private})
        for state in (trained, decoded)
    )
    distance = change = 0.0
    for pair in factor_pairs(first):
        one, other = _product(first, pair), _product(second, pair)
        square = scaling[pair.module] ** 2
        size, size_decoded = square * _inner_product(one, one), square * _inner_product(other, other)
        distance += size + size_decoded - 2 * square * _inner_product(one, other)
        change += size - size_decoded
    return EncodingLoss(max(distance, 0.0), change)


def _inner_product(one: LowRank, other: LowRank) -> float:
    """Return <one, other>_F = sum (L1^T L2) * (R1 R2^T), in float64."""
    lefts = one.left.double().T @ other.left.double()
    return float((lefts * (one.right.double() @ other.right.double().T)).sum())


def aggregation_error(
    aggregator: Aggregator,
    before: ServerState,
    after: ServerState,
    updates: Sequence[Update],
    known: Mapping[int, Known] = MappingProxyType({}),
) -> float | None:
    """Return ||held - ideal||_F / ||ideal||_F over all modules together.

    *Ideal* is sum_k w_k s_k B_k A_k; where clients start from truncations D_k of the global adapter G, it is
    G + sum_k w_k (s_k B_k A_k - D_k). *Held* is the global s B A after the round plus what the round merged
    into the base. Both leave out the base as it was before. A client of lower rank holds a truncation of it.

    Exact where the uplink loses nothing. What it loses is known by its size alone: different clients' losses
    are taken as orthogonal to each other and to the rest, so that their squares add up.

    Args:
        aggregator: The rule that made ``after`` from ``before``.
        before: The server at the round's start.
        after: The server at its end.
        updates: Those that were applied.
        known: Client id -> what codecs did to it; nothing where it is not given.

    Returns:
        The error; None without adapters and for rules without a global model.
    """
    pairs = factor_pairs(before.state)
    if not pairs or not aggregator.has_global_model:
        return None
    terms = _terms_of_the_ideal(aggregator, before, updates, known)
    squared_distance = squared_size = 0.0
    held = dict(aggregator.client.to_model(after.state).items())
    sizes = {pair: held[pair.a].numel() + held[pair.b].numel() for pair in pairs}
    for group in grouped(pairs, lambda pair: len(terms) * sizes[pair], most=_MAX_STACKED_VALUES):
        parts = _alike_terms(terms, group)
        for pair in group:
            ideal = stack([part.sum_of(pair) for part in parts])
            distance, size = distance_and_size(held_change(held, before, after, pair), ideal)
            squared_distance, squared_size = squared_distance + distance**2, squared_size + size**2
    for update, weight in zip(updates, weights_of(updates), strict=True):
        loss = known.get(update.client_id, Known()).loss
        squared_distance += weight**2 * loss.squared_distance
        squared_size = max(squared_size + weight**2 * loss.squared_size_change, 0.0)
    if squared_size == 0.0:
        return 0.0 if squared_distance == 0.0 else math.inf
    return math.sqrt(squared_distance / squared_size)


_Factor = Callable[[FactorPair], float]
_Term = tuple[State, _Factor]
"""A state, and what to multiply the product of each of its modules by."""


def _terms_of_the_ideal(
    aggregator: Aggregator, before: ServerState, updates: Sequence[Update], known: Mapping[int, Known]
) -> list[_Term]:
    """Return the terms whose sum is what should be held."""
    ordered = in_client_order(updates)
    terms: list[_Term] = []
    for update, weight in zip(ordered, weights_of(ordered), strict=True):
        mixed = aggregator.allows_mixed_ranks and update.rank is not None
        started = aggregator.downlink(before, profile_of(update)).state if mixed else before.state
        received = known.get(update.client_id, Known()).held
        if received is None:
            whole = len(update.state) == len(before.state)
            trained = update.state if whole else {**before.state, **update.state}
        else:  # the server added what the client sent to values of its own
            trained = {**received, **{n: received[n] + change for n, change in update.delta.items()}}
            started = received
        terms.append((aggregator.client.to_model(trained), _times(weight, update.scaling)))
        if mixed:
            terms.append((started, _times(-weight, update.scaling)))
            held = {name: before.state[name] for name in started}
            terms.append((held, _times(weight, before.scaling)))
    return terms


@dataclass(frozen=True, eq=False)
class _Alike:
    """A group's factors in K terms whose shapes agree.

    Attributes:
        values: (K, n), the factors of one term end to end.
        places: Name -> its first value and its shape.
        factors: What to multiply the products by, one a term.
    """

    values: Tensor
    places: Mapping[str, tuple[int, tuple[int, ...]]]
    factors: Sequence[_Factor]

    def sum_of(self, pair: FactorPair) -> LowRank:
        """Stack one module's products, each column of the left factor times its term's factor."""
        factors = torch.tensor([factor(pair) for factor in self.factors], dtype=torch.float64)
        left = self._stacked(pair.b).transpose(0, 1) * factors[:, None]  # (d_out, K, r)
        return LowRank(left.flatten(1), self._stacked(pair.a).flatten(0, 1))

    def _stacked(self, name: str) -> Tensor:
        first, shape = self.places[name]
        return self.values[:, first : first + math.prod(shape)].unflatten(1, shape)


def _alike_terms(terms: Sequence[_Term], group: Sequence[FactorPair]) -> list[_Alike]:
    """Bring the terms that have a group's factors, in like shapes, together."""
    wanted = {name for pair in group for name in (pair.a, pair.b)}
    names = tuple(sorted(wanted))
    alike: dict[Layout, list[_Term]] = {}
    for state, factor in terms:
        if state.keys() >= wanted:
            alike.setdefault(layout_of(state), []).append((state, factor))
    result = []
    for layout, members in alike.items():
        shapes = [shape for name, shape in layout if name in wanted]
        firsts = itertools.accumulate(map(math.prod, shapes), initial=0)
        places = {name: (first, shape) for name, first, shape in zip(names, firsts, shapes, strict=False)}
        values = torch.stack([vector_of(state, names) for state, _ in members])
        result.append(_Alike(values, places, [factor for _, factor in members]))
    return result


def _times(weight: float, scaling: Mapping[str, float]) -> _Factor:
    return lambda pair: weight * scaling[pair.module]


def held_change(held: State, before: ServerState, after: ServerState, pair: FactorPair) -> LowRank:
    """Return one module of the global model ``held`` after a round, without its base before it."""
    adapter = scaled(_product(held, pair), after.scaling[pair.module])
    delta = after.base_delta.get(pair.module)
    terms = () if delta is None else delta.terms
    return stack([adapter, *(term for merged_at, term in terms if merged_at > before.server_round)])


def _product(state: State, pair: FactorPair) -> LowRank:
    return LowRank(state[pair.b], state[pair.a])

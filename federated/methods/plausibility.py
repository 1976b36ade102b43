"""Whether an update or an aggregate can be meant: finite is not enough for one client to be believed.

A client is measured against its cohort and against the global state, never against a number of its own. The
measures are wide on purpose: clients may differ by orders of magnitude in rows and in how far they move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.methods.averaging import in_groups
from federated.methods.protocol import ServerState, Update
from lora.adapters import factor_pairs
from models.state import State, layout_of, num_values, vector_of

_SMALL_RMS = 0.1
"""Values of this root mean square are ordinary whatever the global state is; a new head is all zeros."""

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Limits:
    """How far one client may be from its cohort.

    Attributes:
        update_ratio: The most that the norm of an update may be, in multiples of the larger of the cohort's
            median norm and the norm of the global state. The median counts for at most as many multiples of
            the global state, so that a cohort of one, or of many that lie, has a limit too.
        examples_ratio: The most training examples a client may have, in multiples of its cohort's median.
    """

    update_ratio: float = 100.0
    examples_ratio: float = 1e6


DEFAULT_LIMITS = Limits()


def norm(state: Mapping[str, Tensor], groups: Sequence[tuple[str, ...]]) -> float:
    """Return the L2 norm of named values; finite where they are, NaN or infinite where one of them is.

    Args:
        state: Named values.
        groups: Their names, each once, in the parts that are summed at a time.
    """
    return math.hypot(*(_norm(vector_of(state, names)) for names in groups))


def whole_norm(state: State) -> float:
    """Return the L2 norm of all values of a state."""
    return norm(state, in_groups(state, sorted(state)))


def _norm(vector: Tensor) -> float:
    value = float(torch.linalg.vector_norm(vector))
    if math.isfinite(value) or not bool(vector.isfinite().all()):
        return value
    return float(torch.linalg.vector_norm(vector.double()))  # the squares were too large for float32


def absurd_updates(server: ServerState, updates: Sequence[Update], limits: Limits) -> dict[int, str]:
    """Return, for each client whose update or weight cannot be meant, the reason.

    Args:
        server: The state that the clients started from.
        updates: One a client, finite.
        limits: How far a client may be from its cohort.
    """
    if not updates:
        return {}
    groups = in_groups(updates[0].state, sorted(updates[0].state))
    norms = {update.client_id: norm(update.state, groups) for update in updates}
    return {**absurd_norms(norms, server.state, limits), **_absurd_weights(updates, limits)}


def absurd_auxiliary(reference: State, updates: Sequence[Update], limits: Limits) -> dict[int, str]:
    """Return, for each client whose auxiliary arrays are too large to be meant, the reason.

    Args:
        reference: The server's own auxiliary arrays.
        updates: One a client.
        limits: How far a client may be from its cohort.
    """
    if not reference or not updates:
        return {}
    norms = {update.client_id: whole_norm(update.auxiliary) for update in updates}
    reasons = absurd_norms(norms, reference, limits)
    return {client_id: f"beside its update: {reason}" for client_id, reason in reasons.items()}


def absurd_norms(norms: Mapping[int, float], reference: State, limits: Limits) -> dict[int, str]:
    """Return, for each client whose values are too large to be meant, the reason.

    Args:
        norms: Client id -> norm of what it sent.
        reference: Values of the usual size.
        limits: How far a client may be from its cohort.
    """
    usual = max(whole_norm(reference), _SMALL_RMS * math.sqrt(num_values(layout_of(reference))))
    median = lower_median(norms.values())
    largest = limits.update_ratio * max(min(median, limits.update_ratio * usual), usual)
    return {
        client_id: (
            f"what it sent has norm {value:.3g}, where aggregation.max_update_ratio={limits.update_ratio:g} "
            f"allows {largest:.3g} (median of the cohort {median:.3g}, global state {usual:.3g})"
        )
        for client_id, value in norms.items()
        if not value <= largest
    }


def _absurd_weights(updates: Sequence[Update], limits: Limits) -> dict[int, str]:
    median = lower_median(update.num_examples for update in updates)
    return {
        update.client_id: (
            f"has {update.num_examples} training examples, where the median of the cohort is {median:g} "
            f"and aggregation.max_examples_ratio={limits.examples_ratio:g}"
        )
        for update in updates
        if update.num_examples > limits.examples_ratio * median
    }


def lower_median(values: Iterable[float]) -> float:
    """Return the middle value, of two the smaller: one of two clients cannot raise it."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


# ---- what came of a round


def fault_of_aggregate(server: ServerState) -> str | None:
    """Return what of a server's state, or of the products of its factors, is not finite; None if all is."""
    for state in (server.state, server.memory):
        numbers = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        if not math.isfinite(whole_norm(numbers)):
            return f"{next(n for n, t in numbers.items() if not math.isfinite(_norm(t)))} is not finite"
    for module, delta in server.base_delta.items():
        if delta.dense is not None and not math.isfinite(_norm(delta.dense)):
            return f"what is merged into {module} is not finite"
    for module, left, right in _products(server):
        if not _norm(left) * _norm(right) < _LARGEST:
            return f"the product of the factors of {module} is not finite"
    return None


def _products(server: ServerState) -> Iterator[tuple[str, Tensor, Tensor]]:
    for pair in factor_pairs(server.state):
        yield pair.module, server.state[pair.b], server.state[pair.a]
    for module, delta in server.base_delta.items():
        for _, term in delta.terms:
            yield module, term.left, term.right

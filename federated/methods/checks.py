"""Which updates may be aggregated: one bad reply must not stop a round or poison the model.

What is refused is named with its reason and the rest goes on; when nothing is left, ``run_round`` keeps the
server as it was and says so.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from federated.methods.averaging import in_groups
from federated.methods.fedavg import fedavg
from federated.methods.plausibility import (
    DEFAULT_LIMITS,
    Limits,
    absurd_auxiliary,
    absurd_updates,
    fault_of_aggregate,
    whole_norm,
)
from federated.methods.protocol import Aggregator, ServerState, Update, skip_round
from lora.adapters import FactorPair, factor_pairs
from models.errors import ROUND_FAILURE, UserError
from models.state import FlatState, Layout, layout_of, vector_of

logger = logging.getLogger(__name__)

Refusal = tuple[int, str]
"""A client id and the reason."""

_NUM_SHOWN = 3


def run_round(
    aggregator: Aggregator,
    server: ServerState,
    updates: Iterable[Update],
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[ServerState, list[Update], list[Refusal]]:
    """Check the updates, apply the usable ones, check what came of it.

    Returns:
        The server after the round (unchanged but for its round counter when no update was usable or their
        aggregate is not finite), the updates that were used and the refusals, both in client order.
    """
    accepted, refused = check_updates(server, updates, aggregator, limits)
    after, fault = _applied(aggregator, server, accepted) if accepted else (server, None)
    if fault is not None:
        refused = sorted([*refused, *((update.client_id, fault) for update in accepted)], key=lambda r: r[0])
        accepted = []
    server_round = server.server_round + 1
    for client_id, reason in refused:
        values = server_round, client_id, reason
        logger.warning("round %d: update of client %d refused: %s", *values, extra={ROUND_FAILURE: client_id})
    if not accepted:
        reason = "no usable update, the global state stays as it was"
        logger.warning("round %d: %s", server_round, reason, extra={ROUND_FAILURE: None})
        return skip_round(server), accepted, refused
    return after, accepted, refused


def _applied(
    aggregator: Aggregator, server: ServerState, updates: Sequence[Update]
) -> tuple[ServerState, str | None]:
    """Return the server after a round, and why that cannot be used; None when it can."""
    try:
        after = aggregator.apply(server, updates)
        fault = fault_of_aggregate(after)
    except torch.linalg.LinAlgError as error:
        after, fault = server, str(error).partition("\n")[0]
    if fault is None:
        return after, None
    sizes = {update.client_id: whole_norm(update.state) for update in updates}
    largest = max(sizes, key=lambda client_id: sizes[client_id])
    cause = f"the largest update is that of client {largest}, of norm {sizes[largest]:.3g}"
    return server, f"not used, since the aggregate of the round is not finite ({fault}); {cause}"


def check_updates(
    server: ServerState,
    updates: Iterable[Update],
    aggregator: Aggregator | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[list[Update], list[Refusal]]:
    """Sort updates into usable ones and refusals, both in client order.

    A reply that arrived twice counts once; two different ones from the same client are both refused, since
    nothing says which is right.

    Args:
        server: The state that the clients started from.
        updates: In any order.
        aggregator: Says what should have travelled; None: everything, in the server's shapes.
        limits: How far one client may be from its cohort.
    """
    expected = _Expectation(fedavg() if aggregator is None else aggregator, server)
    accepted: list[Update] = []
    refused: list[Refusal] = []
    in_order = sorted(updates, key=lambda update: update.client_id)
    for client_id, group in itertools.groupby(in_order, key=lambda update: update.client_id):
        first, *copies = group
        if any(not _equal(first, copy) for copy in copies):
            refused.append((client_id, f"sent {1 + len(copies)} different updates in one round"))
            continue
        refused += [(client_id, "sent its update again; it counts once")] * len(copies)
        fault = _fault(expected, first)
        if fault is None:
            accepted.append(first)
        else:
            refused.append((client_id, fault))
    absurd = absurd_auxiliary(expected.rule.auxiliary(server), accepted, limits)
    absurd |= absurd_updates(server, [u for u in accepted if u.client_id not in absurd], limits)
    refused = sorted([*refused, *absurd.items()], key=lambda refusal: refusal[0])
    return [update for update in accepted if update.client_id not in absurd], refused


def check_ranks(aggregator: Aggregator, server: ServerState, ranks: Mapping[int, int]) -> None:
    """Refuse, before round 1, client ranks that an aggregator cannot take.

    Args:
        aggregator: The rule.
        server: Its state before round 1.
        ranks: Client id -> rank.

    Raises:
        UserError: A rank is not the server's and the rule cannot mix them, or is above the server's.
    """
    highest = _highest_rank(server, factor_pairs(server.state))
    others = {client_id: rank for client_id, rank in sorted(ranks.items()) if rank != highest}
    if others and not aggregator.allows_mixed_ranks:
        raise UserError(
            f"{aggregator.name} needs one rank for all clients; the server has {highest}, but "
            f"{_ranks(others)}; give all the same lora.r, or take flora, flexlora or hetlora"
        )
    outside = {client_id: rank for client_id, rank in others.items() if not 1 <= rank <= highest}
    if outside:
        raise UserError(f"{_ranks(outside)}, outside 1 to {highest}: lora.r must be the largest client rank")


def _ranks(ranks: Mapping[int, int]) -> str:
    return ", ".join(f"client {client_id} has {rank}" for client_id, rank in ranks.items())


def _equal(first: Update, second: Update) -> bool:
    return (
        (first.num_examples, first.rank) == (second.num_examples, second.rank)
        and dict(first.scaling) == dict(second.scaling)
        and first.state.keys() == second.state.keys()
        and all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())
    )


def _highest_rank(server: ServerState, pairs: Iterable[FactorPair]) -> int:
    return max((server.state[pair.a].shape[0] for pair in pairs), default=0)


class _Expectation:
    """What the updates of one round should look like: all that is the same for every client, found once."""

    def __init__(self, rule: Aggregator, server: ServerState) -> None:
        self.rule = rule
        self.server = server
        self.names = frozenset(rule.uplink(server.state, server.server_round + 1))
        self.pairs = factor_pairs(server.state)
        self.highest_rank = _highest_rank(server, self.pairs)
        self.groups = in_groups(server.state, sorted(self.names))
        self.dtypes = {tensor.dtype for tensor in server.state.values()}
        self.shapes = functools.cache(self._shapes)
        self.layout = functools.cache(self._layout)

    def _shapes(self, client_rank: int | None) -> dict[str, tuple[int, ...]]:
        """Return the shape of each name at a client's rank."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.server.state.items()}
        for pair in self.pairs:
            (rank, d_in), (d_out, _) = shapes[pair.a], shapes[pair.b]
            rank = rank if client_rank is None else min(rank, client_rank)
            shapes[pair.a], shapes[pair.b] = (rank, d_in), (d_out, rank)
        return shapes

    def _layout(self, client_rank: int | None) -> Layout:
        """Return names and shapes of what travels up at a client's rank."""
        shapes = self.shapes(client_rank)
        return tuple((name, shapes[name]) for name in sorted(self.names))


def _fault(expected: _Expectation, update: Update) -> str | None:
    """Return why an update cannot be used; None when it can."""
    if not 0 < update.num_examples < math.inf:
        return f"has {update.num_examples} training examples"
    if update.state.keys() != expected.names:
        return _name_fault(expected, update)
    return _rank_fault(expected, update) or _scaling_fault(expected, update) or _value_fault(expected, update)


def _name_fault(expected: _Expectation, update: Update) -> str:
    sent = update.state.keys()
    missing, unknown = sorted(expected.names - sent), sorted(sent - expected.names)
    lacks, has = f"lacks {_shorten(missing)}", f"has unknown {_shorten(unknown)}"
    return f"{lacks} and {has}" if missing and unknown else lacks if missing else has


def _rank_fault(expected: _Expectation, update: Update) -> str | None:
    rule, highest = expected.rule, expected.highest_rank
    if update.rank is None or update.rank == highest:
        return None
    if not rule.allows_mixed_ranks:
        return f"has rank {update.rank}, the server {highest}; {rule.name} needs one rank for all clients"
    return None if 1 <= update.rank < highest else f"has rank {update.rank}, outside 1 to {highest}"


def _scaling_fault(expected: _Expectation, update: Update) -> str | None:
    for pair in expected.pairs:
        own, servers = update.scaling.get(pair.module), expected.server.scaling[pair.module]
        if own is None:
            return f"lacks the scaling of {pair.module}"
        if not math.isfinite(own) or own == 0:
            return f"has scaling {own} on {pair.module}"
        if not expected.rule.allows_mixed_ranks and not math.isclose(own, servers, rel_tol=1e-6):
            return f"has scaling {own} on {pair.module}, the server {servers}"
    return None


def _value_fault(expected: _Expectation, update: Update) -> str | None:
    shapes, like = expected.shapes(update.rank), expected.server.state
    if _fits(expected, update) and all(_sum_is_finite(update, group) for group in expected.groups):
        return None
    for name, tensor in update.state.items():
        if tuple(tensor.shape) != shapes[name]:
            return f"{name} has shape {tuple(tensor.shape)} instead of {shapes[name]}"
        if tensor.dtype != like[name].dtype:
            return f"{name} is {tensor.dtype} instead of {like[name].dtype}"
        if not bool(tensor.isfinite().all()):
            return f"{name} is not finite"
    return None


def _fits(expected: _Expectation, update: Update) -> bool:
    """Whether shapes and dtypes are right; a flat state's are known without cutting its tensors."""
    if layout_of(update.state) != expected.layout(update.rank):
        return False
    if isinstance(update.state, FlatState) and expected.dtypes == {update.state.vector.dtype}:
        return True
    return all(t.dtype == expected.server.state[name].dtype for name, t in update.state.items())


def _sum_is_finite(update: Update, names: tuple[str, ...]) -> bool:
    """Whether values have a finite sum, and so are finite; large ones may still add up to infinity."""
    return math.isfinite(float(vector_of(update.state, names).sum()))


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")

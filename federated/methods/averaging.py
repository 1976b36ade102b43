"""The steps that aggregation rules share: check, order, weigh, average, move on.

Averages are taken in client order and in float64 and rounded once, so that a rerun is bitwise equal,
identical clients average to themselves, and zero training changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from federated.methods.base_delta import BaseDelta
from federated.methods.lowrank import LowRank
from federated.methods.protocol import ServerState, Update, sorted_state
from lora.adapters import FactorPair, factor_pairs
from models.errors import UserError
from models.state import State, layout_of, vector_of
from models.temperature import within_bound

_SUPPORTED = (torch.float32, torch.float64)
_MAX_GROUP_VALUES = 1_000_000


def begin(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
    """Return the server's state before round 1, after checking factors, dtypes and scalings.

    Raises:
        UserError: Half-precision values, factors that do not fit each other, or a module without scaling.
    """
    for name, tensor in state.items():
        if tensor.dtype not in _SUPPORTED:
            raise UserError(f"{name} is {tensor.dtype}: the server keeps float32; decode before aggregating")
    for pair in factor_pairs(state):
        if state[pair.a].shape[0] != state[pair.b].shape[1]:
            raise UserError(f"{pair.module}: lora_A has rank {state[pair.a].shape[0]} and lora_B another")
        if pair.module not in scaling:
            raise UserError(f"{pair.module} has no scaling: pass lora.adapters.scalings(model)")
    return ServerState(state=sorted_state(within_bound(state)), scaling=dict(scaling))


def begin_with_adapters(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
    """``begin``, for the rules that do nothing without adapters.

    Raises:
        UserError: There is no adapter in the state, or what ``begin`` raises.
    """
    if not factor_pairs(state):
        raise UserError("this aggregator needs adapters: set model.type=clip_lora, or take fedavg")
    return begin(state, scaling)


# ---- updates


def in_client_order(updates: Sequence[Update]) -> list[Update]:
    """Return the updates sorted by client id.

    Raises:
        ValueError: There is none; ``checks.check_updates`` says so before ``apply`` is called.
    """
    if not updates:
        raise ValueError("no update to aggregate: keep the server's state with protocol.skip_round(server)")
    return sorted(updates, key=lambda update: update.client_id)


def of_one_rank(server: ServerState, updates: Sequence[Update], rule: str) -> list[Update]:
    """``in_client_order``, for the rules that cannot mix ranks or scalings.

    Raises:
        UserError: A client's rank or scaling is not the server's; the message names clients and ranks.
    """
    ordered = in_client_order(updates)
    shapes = {name: tuple(tensor.shape) for name, tensor in server.state.items()}
    for update in ordered:
        for name, shape in layout_of(update.state):
            if shape != shapes[name]:
                raise UserError(
                    f"{rule} needs one rank for all clients: client {update.client_id} sent {name} "
                    f"{shape}, the server has {shapes[name]}; "
                    "give all clients the same lora.r, or take flora, flexlora or hetlora"
                )
        for module, own in update.scaling.items():
            if module in server.scaling and not math.isclose(own, server.scaling[module], rel_tol=1e-6):
                raise UserError(
                    f"{rule} needs one scaling for all clients: client {update.client_id} has {own} on "
                    f"{module}, the server {server.scaling[module]}; give all the same lora_alpha and r"
                )
    return ordered


def weights_of(updates: Sequence[Update]) -> list[float]:
    """Return w_k = n_k / sum_j n_j."""
    total = sum(update.num_examples for update in updates)
    return [update.num_examples / total for update in updates]


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Return sum_k w_k x_k in float64, in the order given."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        part = tensor.double() * weight
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("a weighted sum needs at least one tensor")
    return total


def average(updates: Sequence[Update], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return sum_k w_k x_k of the named tensors (all that travelled when not given), rounded once."""
    like, weights = dict(updates[0].state.items()), weights_of(updates)
    mean: dict[str, Tensor] = {}
    for group in in_groups(like, sorted(like) if names is None else names):
        vectors = (vector_of(update.state, group) for update in updates)
        total = weighted_sum(vectors, weights)  # (n,)
        pieces = total.split([like[name].numel() for name in group])
        for name, piece in zip(group, pieces, strict=True):
            mean[name] = piece.view_as(like[name]).to(like[name].dtype, copy=True)
    return mean


def in_groups(state: Mapping[str, Tensor], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Split names, in their order, into groups that are laid end to end at little cost of memory.

    An adapter's small factors then take one operation a client instead of one each, with the same values.
    """
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    return grouped(names, sizes.__getitem__, most=_MAX_GROUP_VALUES)


_Item = TypeVar("_Item")


def grouped(items: Iterable[_Item], size_of: Callable[[_Item], int], *, most: int) -> list[tuple[_Item, ...]]:
    """Split items, in their order, into groups of at most this size together, or of one item."""
    groups: list[list[_Item]] = []
    room = 0
    for item in items:
        size = size_of(item)
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size
    return [tuple(group) for group in groups]


# ---- the server, one round on


def advance(
    server: ServerState,
    values: Mapping[str, Tensor],
    *,
    base_terms: Mapping[str, LowRank] | None = None,
    memory: State | None = None,
) -> ServerState:
    """Return the server one round on, with new values and, per module, a product merged into the base.

    A temperature above CLIP's bound (from a server step, a codec, a client) becomes the bound.
    """
    server_round = server.server_round + 1
    return replace(
        server,
        state=sorted_state(within_bound({**server.state, **values})),
        server_round=server_round,
        base_delta=merged(server.base_delta, base_terms or {}, server_round),
        memory=server.memory if memory is None else memory,
    )


def merged(
    base_delta: Mapping[str, BaseDelta], terms: Mapping[str, LowRank], server_round: int
) -> dict[str, BaseDelta]:
    """Return the base deltas with one product a module merged at the end of ``server_round``."""
    result = dict(base_delta)
    for module, term in terms.items():
        if term.num_columns:
            result[module] = result.get(module, BaseDelta()).plus(server_round, term)
    return result


def uncovered_share(
    updates: Sequence[Update], weights: Sequence[float], pair: FactorPair, rank: int
) -> Tensor:
    """Return, per global component j, 1 - (sum of the weights of the clients that hold it), (r,) float64.

    What nobody holds keeps all of its weight; a share below 1e-12 is rounding and counts as none.

    Args:
        updates: In client order.
        weights: One a client, adding up to 1.
        pair: The module.
        rank: The server's rank r of that module.
    """
    share = torch.ones(rank, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        share[: update.state[pair.a].shape[0]] -= weight
    return torch.where(share.abs() < 1e-12, 0.0, share)

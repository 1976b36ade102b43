"""HetLoRA: clients of different ranks, padded and weighed by the norm of what they learnt.

Server side in ``apply``; client side in ``ClientRules``: a penalty on the last components while training, and
a smaller rank for later rounds where that penalty has emptied them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from federated.methods.averaging import (
    advance,
    average,
    begin_with_adapters,
    in_client_order,
    uncovered_share,
    weighted_sum,
    weights_of,
)
from federated.methods.downlinks import send_truncated
from federated.methods.lowrank import LowRank, product_norm
from federated.methods.protocol import (
    Aggregator,
    ClientRules,
    LocalStart,
    LossTerm,
    ServerState,
    Update,
    everything,
    head_names,
    nothing,
    with_loss_term,
)
from lora.adapters import FactorPair, factor_pairs
from models.errors import UserError
from models.state import State


def hetlora(*, gamma: float = 0.99, penalty_weight: float = 5e-3, min_rank: int = 1) -> Aggregator:
    """A <- sum_k p_k pad(A_k), B <- sum_k p_k pad(B_k), p_k = ||s_k B_k A_k||_F / their sum, per module.

    Clients of rank r_k hold the first r_k components. Where they end, they are padded with the server's own
    components instead of the paper's zeros: padding with zeros means "remove", and shrinks what the low-rank
    clients never received, trained or not. While all products are zero, p_k = w_k.

    Source: HetLoRA, Cho et al., EMNLP 2024, arXiv:2401.06432; padding: this project.
    Bytes: up b r_k (d_i + d_o), down the same.
    Preserves: the rank; not the sum of products (the factors are averaged apart).

    Args:
        gamma: Part of a client's components that the tail penalty spares, and of its rank after pruning;
            1: neither penalty nor pruning.
        penalty_weight: Factor of the tail penalty in the loss; 0: none. The default is this project's.
        min_rank: Pruning stops here.

    Raises:
        UserError: An option is out of range.
    """
    wrong = {"gamma": not 0 < gamma <= 1, "penalty_weight": penalty_weight < 0, "min_rank": min_rank < 1}
    if any(wrong.values()):
        raise UserError(
            f"hetlora: gamma={gamma}, penalty_weight={penalty_weight}, min_rank={min_rank}; "
            "give 0 < gamma <= 1, penalty_weight >= 0 and min_rank >= 1",
            options=[option for option, is_wrong in wrong.items() if is_wrong],
        )

    method = Aggregator(
        name="hetlora",
        init=begin_with_adapters,
        downlink=send_truncated,
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=_apply,
        exact=False,
        allows_mixed_ranks=True,
    )
    if gamma == 1:
        return method
    prunes = ClientRules(next_rank=partial(pruned_rank, gamma=gamma, min_rank=min_rank))
    method = replace(method, client=prunes)
    return with_tail_penalty(method, penalty_weight, gamma) if penalty_weight else method


def _apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
    ordered = in_client_order(updates)
    values = average(ordered, head_names(server.state))
    for pair in factor_pairs(server.state):
        a, b, scaling = server.state[pair.a], server.state[pair.b], server.scaling[pair.module]
        weights = norm_weights(ordered, pair)
        share = uncovered_share(ordered, weights, pair, rank=len(a))  # (r,)
        padded_a = [_padded(update.state[pair.a], like=a) for update in ordered]
        padded_b = [
            _padded(update.state[pair.b] * (update.scaling[pair.module] / scaling), like=b)
            for update in ordered
        ]
        values[pair.a] = (weighted_sum(padded_a, weights) + share[:, None] * a).to(a.dtype)
        values[pair.b] = (weighted_sum(padded_b, weights) + share * b).to(b.dtype)
    return advance(server, values)


def _padded(factor: Tensor, like: Tensor) -> Tensor:
    """Return a factor with zeros up to the shape of ``like``; ``uncovered_share`` fills in the server's."""
    padded = torch.zeros_like(like)
    padded[: factor.shape[0], : factor.shape[1]] = factor
    return padded


def norm_weights(updates: Sequence[Update], pair: FactorPair) -> list[float]:
    """Return p_k = ||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F of one module; w_k when all are zero."""
    norms = [
        abs(update.scaling[pair.module]) * product_norm(LowRank(update.state[pair.b], update.state[pair.a]))
        for update in updates
    ]
    total = math.fsum(norms)
    return [norm / total for norm in norms] if total > 0 else weights_of(updates)


# ---- the client's side


def with_tail_penalty(method: Aggregator, weight: float, gamma: float) -> Aggregator:
    """Return the method with ``weight`` times ``tail_penalty`` in its clients' loss."""

    def term(start: LocalStart) -> LossTerm:
        factors, rank = start.parameters, start.rank
        return LossTerm(
            lambda: weight * tail_penalty(factors if rank is None else cut_to_rank(factors, rank), gamma)
        )

    return with_loss_term(method, term)


def tail_penalty(factors: Mapping[str, Tensor], gamma: float) -> Tensor:
    """Return sum over modules of ||B[:, q:]||_F ||A[q:, :]||_F, q = floor(gamma r).

    Args:
        factors: Live parameters by name, cut to the client's own rank (``cut_to_rank``): the zeros that pad
            them to the model's rank are no tail. Names that are no factors are ignored.
        gamma: Part of the components that is spared.

    Raises:
        UserError: There is no adapter among the names.
    """
    tails = []
    for pair in factor_pairs(factors):
        first = math.floor(gamma * factors[pair.a].shape[0])
        b_norm = torch.linalg.vector_norm(factors[pair.b][:, first:])
        tails.append(b_norm * torch.linalg.vector_norm(factors[pair.a][first:]))
    if not tails:
        raise UserError("hetlora's penalty needs the factors of at least one adapter")
    return torch.stack(tails).sum()


def pruned_rank(before: State, trained: State, rank: int, *, gamma: float, min_rank: int) -> int:
    """Return a client's next rank: floor(gamma r), at least ``min_rank``, if its tails shrank in training."""
    if float(tail_penalty(trained, gamma)) < float(tail_penalty(before, gamma)):
        return max(min(min_rank, rank), math.floor(gamma * rank))
    return rank


def cut_to_rank(state: Mapping[str, Tensor], rank: int) -> State:
    """Return a state whose adapters have at most ``rank`` components: what a pruned client sends."""
    cut = dict(state)
    for pair in factor_pairs(state):
        cut[pair.a], cut[pair.b] = state[pair.a][:rank], state[pair.b][:, :rank]
    return cut

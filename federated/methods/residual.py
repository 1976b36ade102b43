"""FedEx-LoRA and LoRA-FAIR: average the factors apart, then deal with the error that this makes.

Both start from the averages A, B of ``fedavg`` and from the residual

    R = sum_k w_k B_k A_k - B A = sum_k w_k (B_k - B)(A_k - A),

FedEx merges R (or its best rank-q part) into the base model, LoRA-FAIR moves B to absorb what it can of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from federated.methods.averaging import (
    advance,
    average,
    begin_with_adapters,
    of_one_rank,
    weights_of,
)
from federated.methods.downlinks import send_changed
from federated.methods.lowrank import LowRank, scaled, stack, truncate
from federated.methods.protocol import Aggregator, ServerState, Update, everything, nothing
from lora.adapters import FactorPair, factor_pairs
from models.errors import UserError
from models.state import State


def fedex(*, rank_cap: int | None = None) -> Aggregator:
    """A, B <- averages; W <- W + s R_q, with R_q the best approximation of the residual of rank ``rank_cap``.

    Source: FedEx-LoRA, Singhal et al., ACL 2025, arXiv:2410.09432; the rank cap is this project's: 0 is
    FedAvg, (m - 1) r and more is FedEx.
    Bytes: up b r (d_i + d_o); down b r (d_i + d_o) + b min(q (d_i + d_o), d_i d_o) a round, missed rounds
    included, with q = (m - 1) r when there is no cap.
    Preserves: the sum of products (without a cap); the basis of the adapter, but not of base and adapter
    together, so no server optimizer.

    Args:
        rank_cap: Columns of the residual that are merged; None: all.

    Raises:
        UserError: The cap is negative.
    """
    if rank_cap is not None and rank_cap < 0:
        raise UserError(
            f"fedex: rank_cap is {rank_cap}; give 0 or more, or none for the exact rule",
            options=("rank_cap",),
        )

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        ordered = of_one_rank(server, updates, "fedex")
        mean = average(ordered)
        terms = {}
        for pair in factor_pairs(server.state):
            residual = scaled(averaging_residual(ordered, mean, pair), server.scaling[pair.module])
            terms[pair.module] = residual if rank_cap is None else truncate(residual, rank_cap)
        return advance(server, mean, base_terms=terms)

    return Aggregator(
        name="fedex" if rank_cap is None else f"fedex(rank_cap={rank_cap})",
        init=begin_with_adapters,
        downlink=send_changed(everything),
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=apply,
        exact=rank_cap is None,
        keeps_basis=rank_cap == 0,
        clients_remember=rank_cap != 0,
        merges_into_base=rank_cap != 0,
    )


def lora_fair(*, regularisation: float = 0.01) -> Aggregator:
    """A <- average, B <- average + dB with dB = argmin ||s R - s dB A||_F^2 + ridge, in closed form.

    dB = (R A^T) (A A^T + lambda mean(diag(A A^T)) I)^-1. The residual's part outside the row space of A is
    lost. The paper minimises a cosine "similarity" by gradient steps on the server; this is the Frobenius
    version of its objective, solved exactly and without a (d_o, d_i) matrix.

    Source: LoRA-FAIR, Bian et al., ICCV 2025, arXiv:2411.14961.
    Bytes: up b r (d_i + d_o), down the same.
    Preserves: the rank; fedavg's A.

    Args:
        regularisation: lambda, relative to the mean diagonal of A A^T.

    Raises:
        UserError: lambda is negative.
    """
    if regularisation < 0:
        raise UserError(
            f"lora_fair: regularisation is {regularisation}; give 0 or more", options=("regularisation",)
        )
    return Aggregator(
        name="lora_fair",
        init=begin_with_adapters,
        downlink=send_changed(everything),
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=partial(_apply_fair, regularisation=regularisation),
        exact=False,
    )


def _apply_fair(server: ServerState, updates: Sequence[Update], regularisation: float) -> ServerState:
    ordered = of_one_rank(server, updates, "lora_fair")
    mean = average(ordered)
    corrected: dict[str, torch.Tensor] = {}
    for pair in factor_pairs(server.state):
        a = mean[pair.a].double()  # (r, d_in)
        residual = averaging_residual(ordered, mean, pair)
        target = residual.left.double() @ (residual.right.double() @ a.T)  # R A^T: (d_out, r)
        gram = a @ a.T
        ridge = regularisation * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        correction = target @ torch.linalg.pinv(gram + ridge, hermitian=True)
        corrected[pair.b] = (mean[pair.b].double() + correction).to(mean[pair.b].dtype)
    return advance(server, {**mean, **corrected})


def averaging_residual(updates: Sequence[Update], mean: State, pair: FactorPair) -> LowRank:
    """Return sum_k w_k B_k A_k - B A of one module, without scaling, as factors of (m - 1) r columns.

    Written with centred factors it has no cancellation, and since the w_k (B_k - B) add up to zero the last
    client's block folds into the others: sum_{k<m} w_k (B_k - B)(A_k - A_m).
    """
    *others, last = updates
    a_last = last.state[pair.a]
    blocks = [
        LowRank((update.state[pair.b] - mean[pair.b]) * weight, update.state[pair.a] - a_last)
        for update, weight in zip(others, weights_of(updates), strict=False)
    ]
    empty = LowRank(mean[pair.b][:, :0], mean[pair.a][:0])
    return stack([empty, *blocks])

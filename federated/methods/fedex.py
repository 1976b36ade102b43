"""FedEx-LoRA: average the factors apart, then merge the error that this makes into the base model.

The error is the residual of the averages A, B of ``fedavg``,

    R = sum_k w_k B_k A_k - B A = sum_k w_k (B_k - B)(A_k - A).
"""

from __future__ import annotations

from collections.abc import Sequence

from federated.methods.averaging import advance, average, begin_with_adapters, of_one_rank, weights_of
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

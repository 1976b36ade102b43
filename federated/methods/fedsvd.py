"""FedSVD: clients train B alone, and the server turns the basis A towards the data by SVD."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from federated.methods.averaging import advance, average, begin_with_adapters, of_one_rank
from federated.methods.downlinks import send_changed
from federated.methods.flexlora import refactorised
from federated.methods.lowrank import LowRank
from federated.methods.protocol import (
    Aggregator,
    Names,
    ServerState,
    Update,
    everything,
    nothing,
    second_factor_and_head,
)
from lora.adapters import factor_pairs
from models.errors import UserError


def fedsvd(*, period: int = 1) -> Aggregator:
    """B <- sum_k w_k B_k with A frozen and shared, then A <- V^T, B <- U S of B A every ``period`` rounds.

    Re-factorising loses nothing, and lets A follow the data although clients never train it. Rows of A are
    orthonormal, which bounds the gradient of B. It is post-processing: free in a privacy budget.

    Source: FedSVD, Lee et al., NeurIPS 2025, arXiv:2505.12805.
    Bytes: up b r d_o, down b r (d_i + d_o) (b r d_o in rounds without SVD).
    Preserves: the product, exactly; not the basis.

    Args:
        period: Rounds from one SVD to the next.

    Raises:
        UserError: The period is not positive.
    """
    if period < 1:
        raise UserError(f"fedsvd: period is {period}; give 1 or more rounds", options=("period",))

    def changes(names: Iterable[str], server_round: int) -> Names:
        return everything(names) if server_round % period == 0 else second_factor_and_head(names)

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        values = average(of_one_rank(server, updates, "fedsvd"))
        if (server.server_round + 1) % period == 0:
            for pair in factor_pairs(server.state):
                a = server.state[pair.a]
                values[pair.a], values[pair.b] = refactorised(LowRank(values[pair.b], a), a)
        return advance(server, values)

    return Aggregator(
        name="fedsvd",
        init=begin_with_adapters,
        downlink=send_changed(changes),
        trains=second_factor_and_head,
        uplink=second_factor_and_head,
        private=nothing,
        apply=apply,
        exact=True,
        clients_remember=period > 1,
    )

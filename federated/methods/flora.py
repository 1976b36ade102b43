"""FLoRA: the clients' factors side by side are their weighted sum, exactly, and go into the base model.

After ``apply`` the adapter is empty again (A freshly drawn, B = 0) and all that was learnt sits in
``base_delta``; the next downlink carries what a client's base lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from federated.methods.averaging import (
    advance,
    average,
    begin_with_adapters,
    in_client_order,
    merged,
    weights_of,
)
from federated.methods.downlinks import base_updates_for, changed_names, refuse_rank_above
from federated.methods.fresh import fresh_factors
from federated.methods.lowrank import LowRank, stack
from federated.methods.protocol import (
    Aggregator,
    ClientProfile,
    Downlink,
    FreshDraw,
    Names,
    ServerState,
    Update,
    everything,
    head_names,
    nothing,
)
from lora.adapters import FactorPair, factor_pairs


def flora(*, seed: int = 0) -> Aggregator:
    """``W <- W + sum_k w_k s_k B_k A_k = W + [w_1 s_1 B_1 ... w_m s_m B_m] [A_1; ...; A_m]``.

    Then A is drawn anew (Kaiming-uniform) and B = 0. The weights and each client's own scaling stand in the
    stack of B alone; nothing rescales the stack by alpha over its rank. An initial adapter with B != 0 is
    merged before round 1, so that all ranks start from the same model.

    Source: FLoRA, Wang et al., NeurIPS 2024, arXiv:2409.05976.
    Bytes: up b r_k (d_i + d_o); down b min((sum of r_j over the cohort) (d_i + d_o), d_i d_o) a round, the
    rounds a client missed included and d_i d_o at most; A is not sent, both sides draw it from ``seed``.
    Preserves: the sum of products for any ranks and scalings; not the basis.

    Args:
        seed: Of the draws of A; give the run's.
    """

    def init(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
        server = begin_with_adapters(state, scaling)
        pairs = [pair for pair in factor_pairs(state) if state[pair.b].any()]
        terms = {p.module: LowRank(server.state[p.b] * scaling[p.module], server.state[p.a]) for p in pairs}
        return ServerState(
            state={**server.state, **fresh_factors(server.state, FreshDraw(seed, 0))},
            scaling=server.scaling,
            base_delta=merged({}, terms, server_round=0),
        )

    def downlink(server: ServerState, client: ClientProfile) -> Downlink:
        refuse_rank_above(server, client)
        names = set(_head(server.state)) & set(changed_names(server, client, _head))
        return Downlink(
            state={name: server.state[name] for name in sorted(names)},
            version=server.server_round,
            base_updates=base_updates_for(server, client),
            fresh=FreshDraw(seed, server.server_round),
        )

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        ordered = in_client_order(updates)
        terms = {pair.module: stacked(ordered, pair) for pair in factor_pairs(server.state)}
        values = average(ordered, head_names(server.state))
        fresh = fresh_factors(server.state, FreshDraw(seed, server.server_round + 1))
        return advance(server, {**values, **fresh}, base_terms=terms)

    return Aggregator(
        name="flora",
        init=init,
        downlink=downlink,
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=apply,
        exact=True,
        allows_mixed_ranks=True,
        clients_remember=True,
        merges_into_base=True,
    )


def _head(names: Iterable[str], server_round: int = 0) -> Names:
    return head_names(names)


def stacked(updates: Sequence[Update], pair: FactorPair) -> LowRank:
    """Return sum_k w_k s_k B_k A_k of one module as factors with sum_k r_k columns."""
    return stack(
        [
            LowRank(update.state[pair.b] * (weight * update.scaling[pair.module]), update.state[pair.a])
            for update, weight in zip(updates, weights_of(updates), strict=True)
        ]
    )

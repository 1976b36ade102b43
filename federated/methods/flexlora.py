"""FlexLoRA: the server takes the SVD of the aggregate and hands each client as much of it as its rank holds.

``init`` and ``apply`` leave the global adapter in SVD form, A = V^T with orthonormal rows and B = U S / s, so
that the first r_k components are the best rank-r_k adapter. The basis is another one each round: no server
optimizer, and clients start with fresh moments (as they always do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from federated.methods.averaging import (
    advance,
    average,
    begin_with_adapters,
    in_client_order,
    uncovered_share,
    weights_of,
)
from federated.methods.downlinks import send_truncated
from federated.methods.flora import stacked
from federated.methods.lowrank import LowRank, stack, svd
from federated.methods.protocol import (
    Aggregator,
    ServerState,
    Update,
    everything,
    head_names,
    nothing,
)
from lora.adapters import factor_pairs


def flexlora() -> Aggregator:
    """dW <- dW + sum_k w_k (s_k B_k A_k - trunc_{r_k}(dW)); client k gets B = U_r S_r / s_k, A = V_r^T.

    This is the delta form: what a client of low rank never received, it cannot have meant to remove. In the
    paper's absolute form, dW <- sum_k w_k s_k B_k A_k, components beyond a client's rank shrink each round,
    trained or not; with equal ranks the two are the same. Since dW is kept in SVD form, truncation takes
    leading components and the rule reads: component j of the old dW stays with weight
    1 - sum of w_k over the clients with r_k > j, plus the new products. The result is cut to the server's
    rank by QR-core SVD. An initial adapter with B != 0 is brought into SVD form before round 1; one with
    B = 0 keeps its A.

    Source: FlexLoRA, Bai et al., NeurIPS 2024, arXiv:2402.11505, Alg. 1; delta form: this project.
    Bytes: up b r_k (d_i + d_o), down the same.
    Preserves: the sum of products up to the best approximation of the server's rank; any ranks.
    """

    def init(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
        server = begin_with_adapters(state, scaling)
        values = dict(server.state)
        for pair in factor_pairs(state):
            a, b = values[pair.a], values[pair.b]
            if b.any():
                values[pair.a], values[pair.b] = refactorised(LowRank(b, a), a)
        return replace(server, state=values)

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        ordered = in_client_order(updates)
        weights = weights_of(ordered)
        values = average(ordered, head_names(server.state))
        for pair in factor_pairs(server.state):
            a, b, scaling = server.state[pair.a], server.state[pair.b], server.scaling[pair.module]
            share = uncovered_share(ordered, weights, pair, rank=len(a))  # (r,)
            kept = share.nonzero().flatten()
            old = LowRank(b[:, kept] * (share[kept] * scaling).to(b.dtype), a[kept])
            values[pair.a], values[pair.b] = refactorised(stack([old, stacked(ordered, pair)]), a, scaling)
        return advance(server, values)

    return Aggregator(
        name="flexlora",
        init=init,
        downlink=send_truncated,
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=apply,
        exact=False,
        allows_mixed_ranks=True,
    )


def refactorised(product: LowRank, old_a: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (A, B) with s B A the best approximation of ``product`` that fits the shape of ``old_a``.

    A = V_r^T (r, d_in) has orthonormal rows, B = U_r S_r / s (d_out, r). Where the matrix has fewer than r
    components (r > d_out, say), the rows of A that are left over keep their old values and B is zero there.
    """
    rank = old_a.shape[0]
    u, singular_values, vt = svd(product, rank)
    found = len(singular_values)
    a = torch.cat([vt, old_a[found:]])
    b = u.new_zeros((u.shape[0], rank))
    b[:, :found] = u * (singular_values / scaling)
    return a, b

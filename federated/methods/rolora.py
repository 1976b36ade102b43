"""RoLoRA: the factors take turns, so that averaging the one averages the product."""

from __future__ import annotations

from collections.abc import Iterable

from federated.methods.fedavg import averaging_rule
from federated.methods.protocol import Aggregator, Names
from lora.adapters import factor_pairs


def rolora() -> Aggregator:
    """B <- sum_k w_k B_k in odd rounds, A <- sum_k w_k A_k in even ones; the other factor is frozen.

    The product is exact, since all clients share the frozen factor. Round 1 must train B: while B = 0 the
    gradient of A is B^T (...) = 0. Optimizer moments are reset between rounds, as a client's always are.

    Source: RoLoRA, Chen et al., NeurIPS 2025, arXiv:2502.01755.
    Bytes: up b r d_o or b r d_i; down the factor that the last round trained, and the other one too for a
    client that has not received it since it changed.
    Preserves: the product, the basis.
    """
    return averaging_rule("rolora", _alternating_factor_and_head, exact=True)


def _alternating_factor_and_head(names: Iterable[str], server_round: int) -> Names:
    names = set(names)
    pairs = factor_pairs(names)
    frozen = {pair.a for pair in pairs} if server_round % 2 == 1 else {pair.b for pair in pairs}
    return tuple(sorted(names - frozen))

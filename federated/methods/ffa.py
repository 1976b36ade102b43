"""FFA-LoRA: A is frozen, so that averaging B averages the product."""

from __future__ import annotations

from federated.methods.fedavg import averaging_rule
from federated.methods.protocol import Aggregator, second_factor_and_head


def ffa() -> Aggregator:
    """B <- sum_k w_k B_k, with A frozen as it was drawn and the same for all: B A is then exact.

    Source: FFA-LoRA, Sun et al., ICLR 2024, arXiv:2403.12313.
    Bytes: up b r d_o, down b r d_o, and A (b r d_i) once to each new client.
    Preserves: the product, the basis; noise added for privacy is not squared.
    """
    return averaging_rule("ffa", second_factor_and_head, exact=True)

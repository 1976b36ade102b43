"""FedSA-LoRA: A is averaged, B stays with its client."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from federated.methods.averaging import begin_with_adapters
from federated.methods.downlinks import send_changed
from federated.methods.fedavg import average_what_travelled
from federated.methods.protocol import Aggregator, Names, everything, head_names
from lora.adapters import factor_pairs


def fedsa(*, private_head: bool = True) -> Aggregator:
    """A <- sum_k w_k A_k; each client keeps its own B_k, and its head unless told otherwise.

    There is no global model: only W + s_k B_k A of one client means anything. A new client starts with the
    initial B and needs local steps before it is evaluated.

    Source: FedSA-LoRA, Guo et al., ICLR 2025, arXiv:2410.01463.
    Bytes: up b r d_i, down b r d_i; B and a private head once, as initial values.
    Preserves: the basis of A.

    Args:
        private_head: Whether head, biases and temperature stay with the client (the reference configuration).
    """

    def shared(names: Iterable[str], server_round: int = 0) -> Names:
        names = set(names)
        first_factors = {pair.a for pair in factor_pairs(names)}
        return tuple(sorted(first_factors if private_head else first_factors | set(head_names(names))))

    def private(names: Iterable[str]) -> Names:
        names = set(names)
        return tuple(sorted(names - set(shared(names))))

    return Aggregator(
        name="fedsa",
        init=begin_with_adapters,
        downlink=send_changed(shared, private),
        trains=everything,
        uplink=shared,
        private=private,
        apply=partial(average_what_travelled, rule="fedsa"),
        exact=False,
        keeps_basis=True,
        has_global_model=False,
        clients_remember=True,
    )

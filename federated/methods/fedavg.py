"""FedAvg on LoRA factors: each factor is averaged by itself, as any parameter.

What FFA-LoRA, RoLoRA, FedSA-LoRA and dual adapters have in common with it stands here, too. In the byte
counts of every rule b is the bytes of an encoded number, and for one module A is (r, d_i), B is (d_o, r); sum
over modules. The head, averaged beside the factors, adds b times its size each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from federated.methods.averaging import advance, average, begin, begin_with_adapters, of_one_rank
from federated.methods.downlinks import send_changed
from federated.methods.protocol import Aggregator, NameRule, ServerState, Update, everything, nothing


def fedavg() -> Aggregator:
    """A <- sum_k w_k A_k, B <- sum_k w_k B_k: the two factors apart, as FedAvg does with any parameter.

    The product of the averages is not the average of the products; the error is the cross-covariance
    sum_k w_k (B_k - B)(A_k - A), of rank up to (m - 1) r. Without adapters (full fine-tuning, head only) the
    rule is ordinary FedAvg, and exact.

    Source: McMahan et al., arXiv:1602.05629; with adapters "FedIT", Zhang et al., arXiv:2305.05644.
    Bytes: up b r (d_i + d_o), down the same.
    Preserves: the basis, the rank, secure aggregation (all is linear).
    """
    return averaging_rule("fedavg", everything, exact=False)


def averaging_rule(name: str, travels: NameRule, *, exact: bool) -> Aggregator:
    """Return the rule in which the same names train, travel up, are averaged and travel down."""
    return Aggregator(
        name=name,
        init=begin if travels is everything else begin_with_adapters,
        downlink=send_changed(travels),
        trains=travels,
        uplink=travels,
        private=nothing,
        apply=partial(average_what_travelled, rule=name),
        exact=exact,
        keeps_basis=True,
        clients_remember=travels is not everything,
    )


def average_what_travelled(server: ServerState, updates: Sequence[Update], rule: str) -> ServerState:
    """Return the server with the weighted average of every name that travelled; ``rule`` is for messages."""
    return advance(server, average(of_one_rank(server, updates, rule)))

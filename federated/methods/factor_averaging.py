"""Rules that average factors as they are: FedAvg, FFA-LoRA, RoLoRA, FedSA-LoRA, dual adapters.

``apply`` turns the clients' updates into the next global state. In byte counts b is the bytes of an encoded
number, and for one module A is (r, d_i), B is (d_o, r); sum over modules. The head, averaged beside the
factors, adds b times its size each way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from federated.methods.averaging import (
    advance,
    average,
    begin,
    begin_with_adapters,
    of_one_rank,
)
from federated.methods.downlinks import send_changed
from federated.methods.protocol import (
    Aggregator,
    NameRule,
    Names,
    ServerState,
    Update,
    everything,
    head_names,
    nothing,
    second_factor_and_head,
)
from lora.adapters import factor_pairs
from models.errors import UserError


def fedavg() -> Aggregator:
    """A <- sum_k w_k A_k, B <- sum_k w_k B_k: the two factors apart, as FedAvg does with any parameter.

    The product of the averages is not the average of the products; the error is the cross-covariance
    sum_k w_k (B_k - B)(A_k - A), of rank up to (m - 1) r. Without adapters (full fine-tuning, head only) the
    rule is ordinary FedAvg, and exact.

    Source: McMahan et al., arXiv:1602.05629; with adapters "FedIT", Zhang et al., arXiv:2305.05644.
    Bytes: up b r (d_i + d_o), down the same.
    Preserves: the basis, the rank, secure aggregation (all is linear).
    """
    return _averaging("fedavg", everything, exact=False)


def ffa() -> Aggregator:
    """B <- sum_k w_k B_k, with A frozen as it was drawn and the same for all: B A is then exact.

    Source: FFA-LoRA, Sun et al., ICLR 2024, arXiv:2403.12313.
    Bytes: up b r d_o, down b r d_o, and A (b r d_i) once to each new client.
    Preserves: the product, the basis; noise added for privacy is not squared.
    """
    return _averaging("ffa", second_factor_and_head, exact=True)


def rolora() -> Aggregator:
    """B <- sum_k w_k B_k in odd rounds, A <- sum_k w_k A_k in even ones; the other factor is frozen.

    The product is exact, since all clients share the frozen factor. Round 1 must train B: while B = 0 the
    gradient of A is B^T (...) = 0. Optimizer moments are reset between rounds, as a client's always are.

    Source: RoLoRA, Chen et al., NeurIPS 2025, arXiv:2502.01755.
    Bytes: up b r d_o or b r d_i; down the factor that the last round trained, and the other one too for a
    client that has not received it since it changed.
    Preserves: the product, the basis.
    """
    return _averaging("rolora", _alternating_factor_and_head, exact=True)


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
        apply=partial(_average_what_travelled, rule="fedsa"),
        exact=False,
        keeps_basis=True,
        has_global_model=False,
        clients_remember=True,
    )


def dual(*, private_adapter: str = "private") -> Aggregator:
    """W + s B A + s' B_k A_k: the first adapter is averaged by FedAvg, the second never leaves its client.

    The private adapter's values carry its name, as in ``<module>.<factor>.private.weight``. The global model
    is the one without private adapters.

    Source: after FedDPA, Yang et al., NeurIPS 2024, arXiv:2403.19211.
    Bytes: up b r (d_i + d_o), down the same; of the private adapter none, clients draw it from
    the run's seed.
    Preserves: the basis; one client's private values from all others.

    Args:
        private_adapter: The private adapter's name inside the parameter names.
    """

    def private(names: Iterable[str]) -> Names:
        return tuple(sorted(name for name in names if private_adapter in name.split(".")))

    def shared(names: Iterable[str], server_round: int = 0) -> Names:
        names = set(names)
        return tuple(sorted(names - set(private(names))))

    def init(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
        return begin({name: state[name] for name in shared(state)}, scaling)

    if not private_adapter or private_adapter == "default":
        raise UserError(
            "dual: private_adapter must be a name of its own; 'default' is the shared adapter",
            options=("private_adapter",),
        )
    return Aggregator(
        name="dual",
        init=init,
        downlink=send_changed(everything),
        trains=everything,
        uplink=shared,
        private=private,
        apply=partial(_average_what_travelled, rule="dual"),
        exact=False,
        keeps_basis=True,
        clients_remember=True,
    )


def _averaging(name: str, travels: NameRule, *, exact: bool) -> Aggregator:
    """Return the rule in which the same names train, travel up, are averaged and travel down."""
    return Aggregator(
        name=name,
        init=begin if travels is everything else begin_with_adapters,
        downlink=send_changed(travels),
        trains=travels,
        uplink=travels,
        private=nothing,
        apply=partial(_average_what_travelled, rule=name),
        exact=exact,
        keeps_basis=True,
        clients_remember=travels is not everything,
    )


def _average_what_travelled(server: ServerState, updates: Sequence[Update], rule: str) -> ServerState:
    return advance(server, average(of_one_rank(server, updates, rule)))


def _alternating_factor_and_head(names: Iterable[str], server_round: int) -> Names:
    names = set(names)
    pairs = factor_pairs(names)
    frozen = {pair.a for pair in pairs} if server_round % 2 == 1 else {pair.b for pair in pairs}
    return tuple(sorted(names - frozen))

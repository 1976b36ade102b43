"""Dual adapters: one is averaged, the other stays with its client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from federated.methods.averaging import begin
from federated.methods.downlinks import send_changed
from federated.methods.fedavg import average_what_travelled
from federated.methods.protocol import Aggregator, Names, ServerState, everything
from models.errors import UserError


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
        apply=partial(average_what_travelled, rule="dual"),
        exact=False,
        keeps_basis=True,
        clients_remember=True,
    )

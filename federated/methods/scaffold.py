"""SCAFFOLD: control variates correct the drift of clients away from each other.

The server keeps c, an estimate of the gradient over all clients, and client k keeps c_k, an estimate of its
own. c travels down beside the model, the change of c_k travels up beside the update, and both are counted.

Karimireddy et al., ICML 2020, arXiv:1910.06378.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from federated.methods.averaging import in_client_order
from federated.methods.protocol import (
    Aggregator,
    LocalStart,
    LossTerm,
    ServerState,
    Update,
    with_loss_term,
)
from models.errors import UserError
from models.state import State

_MEMORY = "control/"
"""Begins the names under which the server keeps c."""

_EXAMPLE_NAMES = ("m.lora_A.weight", "m.lora_B.weight", "head.bias")


def with_scaffold(method: Aggregator, num_clients: int) -> Aggregator:
    """Return the method with gradients g - c_k + c on its clients.

    Args:
        method: One that trains the same parameters in the same basis in every round.
        num_clients: N, all clients of the run.

    Raises:
        UserError: The method does not.
    """
    uplinks = [method.uplink(_EXAMPLE_NAMES, server_round) for server_round in (1, 2)]
    always = uplinks[0] == uplinks[1] and set(uplinks[0]) <= set(method.trains(_EXAMPLE_NAMES, 1))
    if not method.keeps_basis or not always:
        raise UserError(
            f"{method.name} does not train the same parameters in the same basis in every round, so "
            "gradients of different rounds cannot be compared; take fedavg, ffa, fedsa or dual"
        )

    def init(state: State, scaling: Mapping[str, float]) -> ServerState:
        server = method.init(state, scaling)
        names = method.uplink(server.state, server.server_round + 1)
        zeros = {name: torch.zeros_like(server.state[name]) for name in names}
        return _with_control(server, zeros)

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        changes = [update.auxiliary for update in in_client_order(updates)]
        control = next_control(control_of(server), changes, num_clients)
        return _with_control(method.apply(server, updates), control)

    on_clients = with_loss_term(method, correct_drift)
    return replace(
        on_clients,
        init=init,
        apply=apply,
        auxiliary=control_of,
        client=replace(on_clients.client, remember=next_variate),
    )


# ---- the server's half


def control_of(server: ServerState) -> State:
    """Return the server's control variate c, by the names of the parameters."""
    return {
        name.removeprefix(_MEMORY): value for name, value in server.memory.items() if name.startswith(_MEMORY)
    }


def next_control(control: State, changes: Sequence[State], num_clients: int) -> State:
    """Return the server's next variate, c + (1 / N) sum over the cohort of (c_k+ - c_k).

    Args:
        control: c.
        changes: What each client of the cohort sent, in client order.
        num_clients: N, all clients; those that were not sampled did not change theirs.
    """
    result = {}
    for name, value in control.items():
        total = value.double()
        for change in changes:
            total = total + change[name].double() / num_clients
        result[name] = total.to(value.dtype)
    return result


def _with_control(server: ServerState, control: State) -> ServerState:
    return replace(server, memory={**server.memory, **{_MEMORY + name: c for name, c in control.items()}})


# ---- the client's half


@dataclass(frozen=True, eq=False)
class ControlVariates:
    """The estimates of the gradient: the server's over all clients, and one client's own.

    Attributes:
        server: c, by wire name.
        own: c_k; zeros at first.
    """

    server: State
    own: State


def correct_drift(start: LocalStart) -> LossTerm:
    """Return the loss term that adds c - c_k to each gradient; it sends the change of c_k."""
    own = start.memory or {name: torch.zeros_like(c) for name, c in start.auxiliary.items()}
    parameters = {name: start.parameters[name] for name in start.auxiliary}
    drift = DriftCorrection(parameters, ControlVariates(start.auxiliary, own))
    return LossTerm(drift, lambda: {name: new - own[name] for name, new in drift.mean_gradient().items()})


def next_variate(memory: State, change: State) -> State:
    """Return a client's next c_k: what the server decodes is added, so that c stays the mean of all c_k."""
    return {name: value + memory.get(name, 0.0) for name, value in change.items()}


class DriftCorrection:
    """SCAFFOLD on the client: gradients become g - c_k + c, and the mean of the g is the next c_k.

    The paper's update c_k <- c_k - c + (theta_t - theta_K) / (K eta) (option II) is the mean of the gradients
    g along the local steps when the steps are plain SGD. That mean is what is taken here, since with momentum
    or AdamW the change of the parameters is no gradient. With AdamW the correction acts on the raw gradient
    and SCAFFOLD is a heuristic: the paper's analysis assumes SGD.

    Calling it gives sum <theta, c - c_k>, whose gradient is the correction. The model asks for the term when
    the gradient of the data's loss is complete and nothing else has been added, which is when it is noted.
    """

    def __init__(self, parameters: Mapping[str, Tensor], variates: ControlVariates) -> None:
        """Take the live parameters by wire name, and the variates of the same names."""
        self._parameters = dict(parameters)
        self._corrections = {
            name: (variates.server[name] - variates.own[name]).to(parameter)
            for name, parameter in self._parameters.items()
        }
        self._sums = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._num_steps = 0

    def __call__(self) -> Tensor:
        """Note the gradients of this step and return the term."""
        self._num_steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name] += parameter.grad
        products = [(p * self._corrections[name]).sum() for name, p in self._parameters.items()]
        return torch.stack(products).sum()

    def mean_gradient(self) -> State:
        """Return the mean of the noted gradients: the client's next c_k."""
        steps = max(self._num_steps, 1)
        return {name: (total / steps).detach().cpu().float() for name, total in self._sums.items()}

"""Server optimizers: treat the round's average change as a gradient and take a step of one's own.

Around ``Aggregator.apply``. FedAvgM, FedAdagrad, FedYogi and FedAdam with the formulas of Flower's strategies
of these names, element by element on every name that travelled, so also on A, B and head apart. That needs
factors that mean the same from round to round; rules that change their basis (FLoRA, FlexLoRA, FedSVD ...)
are refused.

Flower's defaults (eta 0.1, tau 1e-3) multiply a first change of 1e-3 by about 7; adapters need eta 1e-3 to
5e-3 and tau 1e-6 to 1e-4, and no weight decay.

Papers: Reddi et al., arXiv:2003.00295 (Alg. 2); Hsu et al., arXiv:1909.06335 (FedAvgM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from federated.config.choices import Choice, build
from federated.methods.protocol import Aggregator, ServerState, Update, sorted_state
from models.errors import UserError
from models.registration import registering
from models.state import State
from models.temperature import within_bound


@dataclass(frozen=True, eq=False)
class Moments:
    """What an optimizer remembers of one tensor: two running sums and the number of steps taken."""

    first: Tensor
    second: Tensor
    steps: int


@dataclass(frozen=True)
class ServerOptimizer:
    """A server optimizer as a pure rule for one tensor.

    Attributes:
        name: As in ``SERVER_OPTIMIZERS``.
        step: (moments, delta) -> (what is added to the value, new moments), with delta = average - old value.
    """

    name: str
    step: Callable[[Moments, Tensor], tuple[Tensor, Moments]]


def fedavgm(*, learning_rate: float = 1.0, momentum: float = 0.9) -> ServerOptimizer:
    """m <- momentum m + delta; x <- x + learning_rate m.

    Args:
        learning_rate: Step size on the server.
        momentum: Decay of the running sum of changes.
    """
    _check("fedavgm", learning_rate=learning_rate)
    _check_decay("fedavgm", momentum=momentum)

    def step(moments: Moments, delta: Tensor) -> tuple[Tensor, Moments]:
        first = momentum * moments.first + delta
        return learning_rate * first, Moments(first, moments.second, moments.steps + 1)

    return ServerOptimizer("fedavgm", step)


def fedadagrad(*, eta: float = 1e-3, tau: float = 1e-5) -> ServerOptimizer:
    """v <- v + delta^2; x <- x + eta delta / (sqrt(v) + tau).

    Args:
        eta: Step size on the server.
        tau: Added to the root, so that small changes are not blown up.
    """
    _check("fedadagrad", eta=eta, tau=tau)

    def step(moments: Moments, delta: Tensor) -> tuple[Tensor, Moments]:
        second = moments.second + delta**2
        return eta * delta / (second.sqrt() + tau), Moments(delta, second, moments.steps + 1)

    return ServerOptimizer("fedadagrad", step)


def fedyogi(
    *, eta: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-5
) -> ServerOptimizer:
    """m as in FedAdam; v <- v - (1 - beta_2) delta^2 sign(v - delta^2); x <- x + eta m / (sqrt(v) + tau).

    Args:
        eta: Step size on the server.
        beta_1: Decay of the average change.
        beta_2: Decay of the average squared change.
        tau: Added to the root, so that small changes are not blown up.
    """
    _check("fedyogi", eta=eta, tau=tau)
    _check_decay("fedyogi", beta_1=beta_1, beta_2=beta_2)

    def step(moments: Moments, delta: Tensor) -> tuple[Tensor, Moments]:
        squared = delta**2
        first = beta_1 * moments.first + (1 - beta_1) * delta
        second = moments.second - (1 - beta_2) * squared * torch.sign(moments.second - squared)
        return eta * first / (second.sqrt() + tau), Moments(first, second, moments.steps + 1)

    return ServerOptimizer("fedyogi", step)


def fedadam(
    *, eta: float = 1e-3, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-5
) -> ServerOptimizer:
    """x <- x + eta_t m / (sqrt(v) + tau), with m and v the decaying averages of delta and delta^2.

    m <- beta_1 m + (1 - beta_1) delta; v <- beta_2 v + (1 - beta_2) delta^2;
    eta_t = eta sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)) in step t = 1, 2 ..., as Flower corrects it.

    Args:
        eta: Step size on the server.
        beta_1: Decay of the average change.
        beta_2: Decay of the average squared change.
        tau: Added to the root, so that small changes are not blown up.
    """
    _check("fedadam", eta=eta, tau=tau)
    _check_decay("fedadam", beta_1=beta_1, beta_2=beta_2)

    def step(moments: Moments, delta: Tensor) -> tuple[Tensor, Moments]:
        first = beta_1 * moments.first + (1 - beta_1) * delta
        second = beta_2 * moments.second + (1 - beta_2) * delta**2
        steps = moments.steps + 1
        rate = eta * math.sqrt(1 - beta_2 ** (steps + 1)) / (1 - beta_1 ** (steps + 1))
        return rate * first / (second.sqrt() + tau), Moments(first, second, steps)

    return ServerOptimizer("fedadam", step)


SERVER_OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "fedadagrad": fedadagrad,
}

register_server_optimizer = registering("server optimizer", SERVER_OPTIMIZERS)
"""``@register_server_optimizer("name")`` adds a function (*, options) -> ServerOptimizer."""

SERVER_OPTIMIZER = Choice(
    "server optimizer", "aggregation.server_optimizer.name", "aggregation.server_optimizer"
)


def server_optimizer_from_name(name: str, options: Mapping[str, Any]) -> ServerOptimizer:
    """Return a server optimizer.

    Raises:
        UserError: There is no such optimizer or option, or a value is out of range.
    """
    return build(SERVER_OPTIMIZERS, SERVER_OPTIMIZER, name, options)


def with_server_optimizer(aggregator: Aggregator, optimizer: ServerOptimizer) -> Aggregator:
    """Return the aggregator with the optimizer's step in place of its averages.

    Moments are kept per name and move only in rounds in which the name travels. A temperature that a step
    takes above CLIP's bound becomes the bound.

    Raises:
        UserError: The aggregator does not keep its basis.
    """
    if not aggregator.keeps_basis:
        raise UserError(
            f"aggregation.server_optimizer: {aggregator.name} changes the basis of its factors between "
            f"rounds, so {optimizer.name} has nothing to accumulate; take fedavg, ffa, rolora, fedsa, fed_sb "
            "or dual, or no server optimizer"
        )

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        averaged = aggregator.apply(server, updates)
        names = sorted(updates[0].state)
        values, memory = _step_all(optimizer, server, {name: averaged.state[name] for name in names})
        state = within_bound({**averaged.state, **values})
        return replace(averaged, state=sorted_state(state), memory=memory)

    return replace(aggregator, name=f"{aggregator.name}+{optimizer.name}", apply=apply, exact=False)


def _step_all(optimizer: ServerOptimizer, server: ServerState, average: State) -> tuple[State, State]:
    values: dict[str, Tensor] = {}
    memory = dict(server.memory)
    for name, tensor in average.items():
        old = server.state[name]
        change, moments = optimizer.step(_recall(server.memory, name, old), tensor - old)
        values[name] = old + change
        memory |= {
            f"first/{name}": moments.first,
            f"second/{name}": moments.second,
            f"steps/{name}": torch.tensor(moments.steps),
        }
    return values, dict(sorted(memory.items()))


def _recall(memory: State, name: str, like: Tensor) -> Moments:
    if f"steps/{name}" not in memory:
        return Moments(torch.zeros_like(like), torch.zeros_like(like), 0)
    return Moments(memory[f"first/{name}"], memory[f"second/{name}"], int(memory[f"steps/{name}"]))


def _check(optimizer: str, **positive: float) -> None:
    for option, value in positive.items():
        if not value > 0:
            raise UserError(f"{optimizer}: {option} is {value}; give a positive number", options=(option,))


def _check_decay(optimizer: str, **decays: float) -> None:
    for option, value in decays.items():
        if not 0 <= value < 1:
            raise UserError(
                f"{optimizer}: {option} is {value}; give 0 or more and less than 1", options=(option,)
            )

"""What a client may add to its loss: FedProx's proximal term, SCAFFOLD's correction of client drift.

``federated.rounds.local_training`` passes the terms to ``model.start_training`` as its ``extra_loss``, so
that they act on the gradient of every local step and stay out of the reported loss. Both work with any
aggregator that keeps a fixed basis; SCAFFOLD's variates travel beside the update in both directions, under
names of their own, and are counted like it.

Papers: FedProx, Li et al., MLSys 2020, arXiv:1812.06127; SCAFFOLD, Karimireddy et al., ICML 2020,
arXiv:1910.06378.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.state import FlatState, State

CONTROL_PREFIX = "control/"
"""Begins the names under which control variates travel and are stored."""


def proximal_term(parameters: Iterable[nn.Parameter], mu: float) -> Callable[[], Tensor]:
    """Return (mu / 2) sum ||theta - theta_t||^2 as a function of the live parameters.

    Its gradient is mu (theta - theta_t). theta_t is where the parameters stand now.

    Args:
        parameters: What trains and is shared: adapter and head, not the base and not private parts.
        mu: Strength.
    """
    live = list(parameters)
    anchors = [parameter.detach().clone() for parameter in live]

    def term() -> Tensor:
        distances = [(p - anchor).square().sum() for p, anchor in zip(live, anchors, strict=True)]
        return 0.5 * mu * torch.stack(distances).sum()

    return term


@dataclass(frozen=True, eq=False)
class ControlVariates:
    """SCAFFOLD's estimates of the gradient: the server's over all clients, and one client's own.

    Attributes:
        server: c, by wire name.
        own: c_k; zeros at first.
    """

    server: State
    own: State


class DriftCorrection:
    """SCAFFOLD on the client: gradients become g - c_k + c, and the mean of the g is the next c_k.

    The paper's update c_k <- c_k - c + (theta_t - theta_K) / (K eta) (option II) is the mean of the gradients
    g along the local steps when the steps are plain SGD. That mean is what is taken here, since with momentum
    or AdamW the change of the parameters is no gradient. With AdamW the correction acts on the raw gradient
    and SCAFFOLD is a heuristic: the paper's analysis assumes SGD.

    Calling it gives sum <theta, c - c_k>, whose gradient is the correction. The model asks for the term when
    the gradient of the data's loss is complete and nothing else has been added, which is when it is noted.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], variates: ControlVariates) -> None:
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


def sum_of_terms(terms: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor] | None:
    """Return the sum of loss terms as one function; None when there are none."""
    if len(terms) < 2:
        return terms[0] if terms else None
    return lambda: torch.stack([term() for term in terms]).sum()


# ---- on the wire and in memory


def zero_variates(state: Mapping[str, Tensor]) -> State:
    """Return the variates before round 1: a zero for each value."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def control_names(state: Mapping[str, Tensor]) -> State:
    """Give variates the names under which they travel."""
    return {CONTROL_PREFIX + name: tensor for name, tensor in state.items()}


def split_control(state: Mapping[str, Tensor]) -> tuple[State, State]:
    """Return the ordinary tensors of a state, and the variates among it by their parameters' names."""
    if isinstance(state, FlatState) and not any(name.startswith(CONTROL_PREFIX) for name in state.names):
        return state, {}
    others = {name: t for name, t in state.items() if not name.startswith(CONTROL_PREFIX)}
    control = {
        name.removeprefix(CONTROL_PREFIX): t for name, t in state.items() if name.startswith(CONTROL_PREFIX)
    }
    return others, control

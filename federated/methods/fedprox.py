"""FedProx: a proximal term keeps every client near the model that it received.

Works with any method; Li et al., MLSys 2020, arXiv:1812.06127.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from federated.methods.protocol import Aggregator, LocalStart, LossTerm, with_loss_term


def with_fedprox(method: Aggregator, mu: float) -> Aggregator:
    """Return the method with (mu / 2) ||theta - theta_t||^2 in its clients' loss.

    Args:
        method: Any.
        mu: Strength.
    """

    def term(start: LocalStart) -> LossTerm:
        shared = (p for name, p in start.parameters.items() if name not in start.private)
        return LossTerm(proximal_term([p for p in shared if p.requires_grad], mu))

    return with_loss_term(method, term)


def proximal_term(parameters: Iterable[Tensor], mu: float) -> Callable[[], Tensor]:
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

"""The frozen base weights of this process, for aggregators that merge what was learnt into them.

Where it stands in a round: before a client trains or anybody evaluates, what the downlink brought for the
base is folded in. All clients simulated in one process share one base with the server: it stands at one
version, which the server sets before it sends, and a client whose downlink repeats what the base already
contains changes nothing. The server's weight is always the pre-trained one plus the sum of everything merged,
so that it does not depend on the order of clients. Weights are float32 and nothing is ever merged that would
have to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from federated.aggregators import NEVER, BaseDelta, BaseUpdate, fold
from lora.adapters import base_weights
from models.errors import UserError


class BaseWeights:
    """The adapted modules' base weights and the version that they stand at.

    Args:
        model: The federated model with adapters.

    Attributes:
        version: Rounds of the server whose merges they contain.
        num_changes: How often a weight was overwritten.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = base_weights(model)
        self._pretrained: dict[str, Tensor] = {}
        self.version = NEVER
        self.num_changes = 0

    @torch.no_grad()
    def bring_to(self, deltas: Mapping[str, BaseDelta], version: int) -> None:
        """Make every base weight the pre-trained one plus all that the server has merged.

        Args:
            deltas: Module -> everything merged up to ``version``.
            version: Rounds done by the server.
        """
        if self.version == version:
            return
        for module, delta in deltas.items():
            pretrained = self._pretrained_weight(module)
            self._weights[module].copy_(pretrained + delta.total().to(pretrained))
            self.num_changes += 1
        self.version = version

    @torch.no_grad()
    def fold(self, updates: Mapping[str, BaseUpdate], *, held_version: int, version: int) -> None:
        """Take in what a downlink brought.

        Args:
            updates: Module -> what changed since ``held_version``.
            held_version: The version that the sender of ``updates`` believes this base to be at.
            version: What the base is at afterwards.

        Raises:
            UserError: This base is older than the sender believes, so the updates do not suffice; or one
                does not fit.
        """
        if not updates or self.version >= version:
            return
        partial = any(update.total is None for update in updates.values())
        if partial and self.version < held_version:
            raise UserError(
                f"this process's base weights are at round {self.version}, the client's at {held_version}: "
                "aggregators that merge into the base need engine.name=inprocess, or one process a client"
            )
        for module, update in updates.items():
            _check_shape(module, update, self._weights.get(module))
            pretrained = self._pretrained_weight(module)
            weight = self._weights[module]
            weight.copy_(fold(weight, pretrained, update, self.version))
            self.num_changes += 1
        self.version = version

    @torch.no_grad()
    def reset(self) -> None:
        """Put the pre-trained weights back: the start of a run."""
        for module, pretrained in self._pretrained.items():
            self._weights[module].copy_(pretrained)
            self.num_changes += 1
        self._pretrained.clear()
        self.version = NEVER

    def current(self) -> dict[str, Tensor]:
        """Return a copy of the base weights as they are, (d_out, d_in) each, by module."""
        return {module: weight.detach().cpu().clone() for module, weight in self._weights.items()}

    def _pretrained_weight(self, module: str) -> Tensor:
        if module not in self._pretrained:
            self._pretrained[module] = self._weights[module].detach().clone()
        return self._pretrained[module]


def _check_shape(module: str, update: BaseUpdate, weight: Tensor | None) -> None:
    """Raise UserError before an update of another shape is multiplied out, or spread over the weight."""
    shapes = {tuple(term.shape) for _, term in update.terms}
    if update.total is not None:
        shapes.add(tuple(update.total.shape))
    if weight is None or shapes != {tuple(weight.shape)}:
        here = "no such weight" if weight is None else f"{tuple(weight.shape)}"
        raise UserError(f"the downlink changes base weight {module} {sorted(shapes)}; this model has {here}")

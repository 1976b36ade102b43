"""The frozen base weights of this process, for aggregators that merge what was learnt into them.

Where the server lives in this process, it sets the base before it sends, once for all clients. Elsewhere each
client sets it from what it keeps (``federated.rounds.client``). Weights are float32 and nothing is ever
merged that would have to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from federated.methods import NEVER, BaseDelta, BaseUpdate
from lora.adapters import base_weights
from lora.base_delta_file import pretrained_base_weights
from models.errors import UserError


class BaseWeights:
    """The adapted modules' base weights and the version that they stand at.

    Args:
        model: The federated model with adapters.

    Attributes:
        version: Rounds of the server whose merges they contain; ``NEVER`` where no server has set them.
        follow_server: Whether the server, in this process or the one that it was forked from, sets them.
        num_changes: How often a weight was overwritten.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = base_weights(model)
        self._pretrained = pretrained_base_weights(model)
        self.version = NEVER
        self.follow_server = False
        self.num_changes = 0

    def bring_to(self, deltas: Mapping[str, BaseDelta], version: int) -> None:
        """Make every base weight the pre-trained one plus all that the server of this process has merged.

        Args:
            deltas: Module -> everything merged up to ``version``.
            version: Rounds done by the server.

        Raises:
            UserError: As ``hold``.
        """
        if self.version != version:
            self.hold(deltas)
            self.version, self.follow_server = version, True

    def check(self, updates: Mapping[str, BaseUpdate]) -> None:
        """Refuse updates that are no change of these weights, before they are multiplied out.

        Raises:
            UserError: There is no such weight, or it has another shape.
        """
        for module, update in updates.items():
            _check_shape(module, update, self._weights.get(module))

    @torch.no_grad()
    def hold(self, deltas: Mapping[str, BaseDelta]) -> None:
        """Make every base weight the pre-trained one plus all that was merged into it.

        Args:
            deltas: Module -> everything merged; a module that is not there gets its pre-trained weight.

        Raises:
            UserError: A weight in half precision, which would lose updates.
        """
        self.version, self.follow_server = NEVER, False
        for module in sorted({*self._pretrained, *deltas}):
            pretrained = self._pretrained_weight(module)
            if pretrained.dtype.itemsize < 4:
                raise UserError(
                    f"the base weight is {pretrained.dtype}: merged updates need model.dtype=float32"
                )
            weight = pretrained
            if module in deltas:
                weight = pretrained + deltas[module].total().to(pretrained)
            self._weights[module].copy_(weight)
            self.num_changes += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Put the pre-trained weights back: the start of a run."""
        for module, pretrained in self._pretrained.items():
            self._weights[module].copy_(pretrained)
            self.num_changes += 1
        self._pretrained.clear()
        self.version, self.follow_server = NEVER, False

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

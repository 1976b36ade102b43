"""The frozen base weights of this process, for aggregators that merge what was learnt into them.

Where it stands in a round: before a client trains or anybody evaluates, what the downlink brought for the
base is folded in. All clients simulated in one process share one base: it stands at one version, and a client
whose downlink repeats what the base already contains changes nothing. Weights are float32 and every change is
an addition to a known version, never a merge that would have to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from federated.aggregators import NEVER, BaseUpdate, fold
from lora.adapters import adapter_layers
from models.errors import UserError


class BaseWeights:
    """The adapted modules' base weights and the version that they stand at.

    Args:
        model: The federated model with adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: layer.get_base_layer().weight for name, layer in adapter_layers(model)}
        self._pretrained: dict[str, Tensor] = {}
        self.version = NEVER

    @torch.no_grad()
    def fold(self, updates: Mapping[str, BaseUpdate], *, held_version: int, version: int) -> None:
        """Bring the base to ``version``.

        Args:
            updates: Module -> what changed since ``held_version``.
            held_version: The version that the sender of ``updates`` believes this base to be at.
            version: What the base is at afterwards.

        Raises:
            UserError: This base is older than the sender believes, so the updates do not suffice.
        """
        if not updates or self.version >= version:
            return
        partial = any(update.total is None for update in updates.values())
        if partial and self.version < held_version:
            raise UserError(
                f"this process's base weights are at round {self.version}, the client's at {held_version}: "
                "aggregators that merge into the base need engine.name=inprocess"
            )
        for module, update in updates.items():
            weight = self._weights[module]
            pretrained = self._pretrained.setdefault(module, weight.detach().clone())
            weight.copy_(fold(weight, pretrained, update, self.version))
        self.version = version

    @torch.no_grad()
    def reset(self) -> None:
        """Put the pre-trained weights back: the start of a run."""
        for module, pretrained in self._pretrained.items():
            self._weights[module].copy_(pretrained)
        self._pretrained.clear()
        self.version = NEVER

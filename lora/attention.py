"""LoRA for torch.nn.MultiheadAttention, the fused attention of open_clip models.

Injected before round 1 wherever a target is a MultiheadAttention; runs in every forward pass of a round.
The fused input projection (q, k, v stacked) and the output projection each get their factors; the file
format is PEFT's.

PEFT's own layer for this module adds the product to the stored weight before each forward pass and subtracts
it afterwards. Rounding makes the frozen base drift with every step, its dropout setting has no effect, and
(0.21.2, measured) the output projection's product is added twice. Here the sum is formed on the side and
handed to the base layer for one call, so that the base never changes and gradients reach all four factors.
The output projection cannot be adapted alone: MultiheadAttention reads its weight without calling it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import nn
from torch.func import functional_call


class FusedAttentionLoRA(MultiheadAttention):  # PEFT's class: its file format and adapter bookkeeping
    """MultiheadAttention whose in_proj (q, k, v) and out_proj carry adapters; the base never changes."""

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As MultiheadAttention.forward, with W + scaling * B @ A in place of both weights."""
        if self.disable_adapters or self.merged:
            return self.base_layer(query, *args, **kwargs)
        base: Any = self.base_layer
        out_proj = base.out_proj
        weights = {
            "in_proj_weight": _adapted(base.in_proj_weight, self),
            "out_proj.base_layer.weight": _adapted(out_proj.base_layer.weight, out_proj),
        }
        return functional_call(base, weights, (query, *args), kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What one adapter adds to in_proj, (3 d, d), without dropout."""
        return _product(self, adapter, with_dropout=False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the product to in_proj in place; out_proj is a LoRA layer of its own and merges itself."""
        base: Any = self.base_layer
        for name in adapter_names or self.active_adapters:
            if name in self.lora_A and name not in self.merged_adapters:
                base.in_proj_weight.data += self.get_delta_weight(name)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge` (up to rounding)."""
        base: Any = self.base_layer
        while self.merged_adapters:
            base.in_proj_weight.data -= self.get_delta_weight(self.merged_adapters.pop())

    def _restore_weights(self) -> None:
        """PEFT re-registers weights here that its forward pass took away; ours takes none away."""


def _adapted(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Weight plus the product of every active adapter of `layer`; (d_out, d_in)."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + _product(layer, name, with_dropout=True)
    return weight


def _product(layer: Any, name: str, *, with_dropout: bool) -> torch.Tensor:
    """scaling * B @ A of one adapter in the dtype of the base weight, (d_out, d_in).

    In training with dropout, one mask over the input features is drawn per call and shared by all tokens:
    dropping column j of A is dropping feature j of the adapter's input.
    """
    a = layer.lora_A[name].weight  # (r, d_in)
    dropout = layer.lora_dropout[name]
    if with_dropout and isinstance(dropout, nn.Dropout) and dropout.training:
        a = a * dropout(torch.ones_like(a[:1]))
    base = layer.get_base_layer()
    weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
    return (layer.scaling[name] * (layer.lora_B[name].weight @ a)).to(weight.dtype)

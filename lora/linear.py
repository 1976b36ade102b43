"""LoRA for torch.nn.Linear in fewer passes over memory than PEFT's own layer.

Injected before round 1; runs in every forward pass of a round. PEFT computes W x, then B A x, multiplies that
by the scaling, and adds: each of the last two reads and writes a tensor as large as the layer's output, both
forward and backward. Here the last product accumulates onto W x. The rest is PEFT's, file format included.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn


class LinearLoRA(Linear):  # PEFT's class: its file format and adapter bookkeeping
    """W x + scaling * B A x, summed over the active adapters."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's; what is not plain LoRA in one dtype is left to it."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or x.dim() < 2 or not all(self._is_plain(name, x.dtype) for name in names):
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        result = base(x)
        for name in names:
            hidden = self.lora_A[name](self.lora_dropout[name](x))  # (..., r)
            last: Any = self.lora_B[name]
            rows = torch.addmm(
                result.flatten(0, -2), hidden.flatten(0, -2), last.weight.t(), alpha=self.scaling[name]
            )
            result = rows.view_as(result)
        return result

    def _is_plain(self, name: str, dtype: torch.dtype) -> bool:
        """Whether an adapter is two bare matrices (no bias, not replaced or parametrised) of this dtype."""
        last = self.lora_B[name]
        if type(last) is not nn.Linear or last.bias is not None:
            return False
        return last.weight.dtype == dtype == self.weight.dtype

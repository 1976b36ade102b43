"""LoRALayer: the two factors of one adapter, B A x * lora_alpha / r, beside a layer that it does not hold.

Paper: Hu et al., arXiv:2106.09685. Where PEFT has no layer of its own for a projection (q, k, v and out of
open_clip's fused attention, apart), the adapters are made of these (`lora.split_attention`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

DEFAULT_ADAPTER = "default"
FACTORS = ("lora_A", "lora_B")


class LoRALayer(nn.Module):
    """What an adapter adds to the output of a linear map.

    Attributes:
        lora_A: (r, in_features), float32.
        lora_B: (out_features, r), float32; zero at the start, so that nothing is added.
        scaling: lora_alpha / r.
        enabled: False: zero is added.
        merged: Whether the product is in the base weight just now; zero is added then.
    """

    def __init__(  # noqa: PLR0913 - the documented signature
        self,
        in_features: int,
        out_features: int,
        r: int = 16,
        lora_alpha: float = 16,
        lora_dropout: float = 0.1,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make fresh factors.

        Args:
            in_features: Of the linear map.
            out_features: Of the linear map.
            r: Rank.
            lora_alpha: Numerator of the scaling.
            lora_dropout: Probability of dropping an input feature while training.
            device: Where the factors are.
            generator: Draws lora_A; torch's own generator if left out.
        """
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.scaling = lora_alpha / r
        self.enabled, self.merged = True, False
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw lora_A (Kaiming-uniform, a = sqrt(5)) on the CPU and make lora_B zero."""
        nn.init.zeros_(self.lora_B)
        if not self.lora_A.is_meta:
            fresh = torch.empty(self.lora_A.shape)
            self.lora_A.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features): scaling * B A x, zero when disabled or merged."""
        if not self.enabled or self.merged:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        rows = self.lora_dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            rows = rows.to(self.lora_A.dtype)
        return (self.scaling * functional.linear(functional.linear(rows, self.lora_A), self.lora_B)).to(
            x.dtype
        )

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the base weight, scaling * B A, (out_features, in_features)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Sizes, as in torch's own layers."""
        return f"{self.in_features}, {self.out_features}, r={self.r}, scaling={self.scaling:g}"

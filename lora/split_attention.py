"""Adapters of q, k, v and out apart, on open_clip's fused attention.

A residual block keeps its weights and names; `lora_q`, `lora_k`, `lora_v` and `lora_out` (`LoRALayer`) stand
on the block beside its `attn`, as in `transformer.resblocks.0.lora_q.lora_A`. PEFT has no such layer: its own
form, one adapter for the stacked q, k, v, is `lora.attention`. `AttentionPart` gives each of the four the
surface of PEFT's layers, so that whatever handles adapters handles both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.lora_layer import DEFAULT_ADAPTER, LoRALayer
from models.errors import UserError

PARTS_OF_TARGET = {"in_proj": ("q", "k", "v"), "out_proj": ("out",)}
"""Documented target -> the adapters it stands for."""
PARTS = ("q", "k", "v", "out")


def add_lora_to_attention_block(  # noqa: PLR0913 - the documented signature
    block: nn.Module,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] = ("in_proj", "out_proj"),
    *,
    generator: torch.Generator | None = None,
) -> bool:
    """Put adapters on the attention of one residual block, and freeze nothing.

    Args:
        block: A block with a `torch.nn.MultiheadAttention` called `attn`; changed in place. It gets `lora_q`,
            `lora_k`, `lora_v`, `lora_out` (None where not asked for), `lora_enabled_in_proj` and
            `lora_enabled_out_proj`.
        r: Rank of each adapter.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Dropout of the adapters' inputs.
        target_modules: "in_proj" (q, k and v), "out_proj", or both; other names are not looked at.
        generator: Draws every lora_A; torch's own generator if left out.

    Returns:
        Whether the block was adapted: False if it has no such attention, has adapters already, or is not
        asked for.
    """
    wanted = [target for target in PARTS_OF_TARGET if target in target_modules]
    if not wanted or not can_split(block) or is_adapted_block(block):
        return False
    holder: Any = block
    width, device = holder.attn.embed_dim, holder.attn.in_proj_weight.device
    for target, parts in PARTS_OF_TARGET.items():
        setattr(holder, f"lora_enabled_{target}", target in wanted)
        for part in parts:
            layer = None
            if target in wanted:
                layer = LoRALayer(
                    width, width, r, lora_alpha, lora_dropout, device=device, generator=generator
                )
                layer.train(holder.attn.training)
            block.register_module(f"lora_{part}", layer)
    holder.attn.forward = partial(_attend, block)
    return True


def can_split(block: nn.Module) -> bool:
    """Whether a module has a plain fused attention called `attn`."""
    attention = block._modules.get("attn")
    return (
        type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


def is_adapted_block(module: nn.Module) -> bool:
    """Whether a module carries adapters of q, k, v or out apart."""
    return any(isinstance(module._modules.get(f"lora_{part}"), LoRALayer) for part in PARTS)


def attention_parts(block: nn.Module) -> Iterator[tuple[str, AttentionPart]]:
    """Yield the name of each adapter on a block ("lora_q", ...) and the adapter."""
    for part in PARTS:
        layer = block._modules.get(f"lora_{part}")
        if isinstance(layer, LoRALayer):
            yield f"lora_{part}", AttentionPart(block, part, layer)


@dataclass(frozen=True, eq=False)
class _Factor:
    """A factor where PEFT has a small Linear."""

    weight: nn.Parameter


class _Scaling(dict[str, float]):
    """Scaling by adapter name; what is set goes into the layer."""

    def __init__(self, layer: LoRALayer) -> None:
        super().__init__({DEFAULT_ADAPTER: layer.scaling})
        self._layer = layer

    def __setitem__(self, name: str, value: float) -> None:
        self._layer.scaling = value
        super().__setitem__(name, value)


class AttentionPart:
    """One of a block's four adapters with the surface of PEFT's LoraLayer; it holds no state of its own."""

    def __init__(self, block: nn.Module, part: str, layer: LoRALayer) -> None:
        self.block, self.part, self.layer = block, part, layer

    active_adapters = (DEFAULT_ADAPTER,)

    @property
    def lora_A(self) -> dict[str, _Factor]:  # noqa: N802 - PEFT's name
        """Adapter name -> holder of (r, d)."""
        return {DEFAULT_ADAPTER: _Factor(self.layer.lora_A)}

    @property
    def lora_B(self) -> dict[str, _Factor]:  # noqa: N802 - PEFT's name
        """Adapter name -> holder of (d, r)."""
        return {DEFAULT_ADAPTER: _Factor(self.layer.lora_B)}

    @property
    def r(self) -> dict[str, int]:
        """Adapter name -> rank."""
        return {DEFAULT_ADAPTER: self.layer.r}

    @property
    def scaling(self) -> dict[str, float]:
        """Adapter name -> the factor in front of B A."""
        return _Scaling(self.layer)

    @property
    def merged(self) -> bool:
        """Whether the product is in the base weight just now."""
        return self.layer.merged

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapter is off."""
        return not self.layer.enabled

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight beside the adapter, (d, d): for q, k and v a view into the stacked one."""
        attention: Any = self.block.attn
        if self.part == "out":
            return attention.out_proj.weight
        return attention.in_proj_weight.detach().chunk(3)[PARTS.index(self.part)]

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapter on or off."""
        self.layer.enabled = enabled

    def set_adapter(self, names: Sequence[str]) -> None:
        """Let the factors train."""
        self.layer.requires_grad_(DEFAULT_ADAPTER in names)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the base weight in place."""
        self.base_weight.add_(self.layer.delta_weight())
        self.layer.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge` (up to rounding)."""
        self.base_weight.sub_(self.layer.delta_weight())
        self.layer.merged = False

    def unload(self) -> None:
        """Take the adapter off its block; with the last one the block is as it was."""
        delattr(self.block, f"lora_{self.part}")
        if not is_adapted_block(self.block):
            holder: Any = self.block
            holder.attn.__dict__.pop("forward", None)
            for name in (
                *(f"lora_{part}" for part in PARTS),
                *(f"lora_enabled_{t}" for t in PARTS_OF_TARGET),
            ):
                if hasattr(holder, name):
                    delattr(holder, name)


def _attend(  # noqa: PLR0913 - MultiheadAttention's own signature
    block: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As MultiheadAttention.forward, with each projection's adapter added to its output.

    Without an adapter that is on, MultiheadAttention itself runs, so that the base model stays exact.
    """
    attention = block.attn
    layers = {part: block._modules.get(f"lora_{part}") for part in PARTS}
    if not any(layer is not None and layer.enabled and not layer.merged for layer in layers.values()):
        return nn.MultiheadAttention.forward(
            attention, query, key, value, key_padding_mask, need_weights, attn_mask, **options
        )
    if need_weights or key_padding_mask is not None:
        raise UserError("adapters on in_proj and out_proj give no attention weights; take the target attn")
    weights = attention.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)

    def heads(rows: Tensor, index: int) -> Tensor:
        out = functional.linear(rows, weights[index], biases[index])  # (B, T, d) or (T, B, d)
        if layers[PARTS[index]] is not None:
            out = out + layers[PARTS[index]](rows)
        out = out if attention.batch_first or out.ndim == 2 else out.transpose(0, 1)
        return out.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2)  # (B, H, T, d_h)

    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # True keeps a place out here, and lets it in there
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, attention.num_heads))
    read = functional.scaled_dot_product_attention(
        heads(query, 0),
        heads(key, 1),
        heads(value, 2),
        attn_mask=mask,
        dropout_p=attention.dropout if attention.training else 0.0,
    )
    read = read.transpose(-3, -2).flatten(-2)  # (B, T, d)
    read = read if attention.batch_first or read.ndim == 2 else read.transpose(0, 1)
    out = functional.linear(read, attention.out_proj.weight, attention.out_proj.bias)
    return (out if layers["out"] is None else out + layers["out"](read)), None

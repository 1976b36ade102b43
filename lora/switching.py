"""Adapters on and off, in the base weights and out of them again.

Beside a round: to compare with the base model, and to hand over a model without any trace of LoRA. Which
parameters train and what travels does not change here, save that `merge_and_unload` leaves no adapters.
Paper: Hu et al., arXiv:2106.09685, section 4.1: merged, W + scaling * B A costs nothing at inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from lora.adapters import (
    FACTORS,
    adapter_layers,
    clip_of,
    exchanged_names,
    find_towers,
    is_adapter_parameter,
    unwrap,
    wire_name,
)
from lora.base_delta_file import pretrained_base_weights
from lora.base_identity import forget_base_digests, hold_base_digests
from lora.biases import forget_base_values, use_base_values, use_trained_values
from lora.split_attention import AttentionPart
from models.errors import UserError


@contextlib.contextmanager
def trainability_kept(layers: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Undo PEFT's changes of requires_grad, which would thaw a frozen factor (FFA-LoRA)."""
    modules = [getattr(layer, factor) for _, layer in layers for factor in FACTORS]
    factors = [module[name].weight for module in modules for name in module]
    before = [(p, p.requires_grad) for p in factors]
    yield
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def enable_lora(model: nn.Module) -> None:
    """Switch the adapters on. Which parameters train does not change."""
    layers = adapter_layers(model)
    with trainability_kept(layers):
        for _, layer in layers:
            layer.enable_adapters(True)
    use_trained_values(unwrap(model))


def disable_lora(model: nn.Module) -> None:
    """Switch the adapters off: the model equals the base model bit for bit (merged ones are taken out first).

    A trained head is not an adapter and stays as it is.
    """
    layers = adapter_layers(model)
    with trainability_kept(layers):
        for _, layer in layers:
            if layer.merged:
                layer.unmerge()
            layer.enable_adapters(False)
    use_base_values(unwrap(model))


def is_enabled(model: nn.Module) -> bool:
    """Whether the model has adapters and they are on."""
    layers = adapter_layers(model)
    return bool(layers) and not any(layer.disable_adapters for _, layer in layers)


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """The base model for the length of a `with` block."""
    was_enabled = is_enabled(model)
    disable_lora(model)
    try:
        yield
    finally:
        if was_enabled:
            enable_lora(model)


def merge_lora(model: nn.Module) -> None:
    """Fold the active adapters into the base weights in place: W += scaling * B @ A.

    Merging into a half-precision base loses small updates; keep the base in fp32 for that.

    Raises:
        UserError: adapters are disabled, or hold a value that is not finite.
    """
    hold_base_digests(model)
    _merge(model)


def _merge(model: nn.Module) -> None:
    layers = adapter_layers(model)
    if any(layer.disable_adapters for _, layer in layers):
        raise UserError("adapters are disabled; call enable_lora(model) before merge_lora(model)")
    for name, layer in layers:
        for active in set(layer.active_adapters) & set(layer.lora_A):
            if not all(getattr(layer, factor)[active].weight.isfinite().all() for factor in FACTORS):
                raise UserError(
                    f"the adapter of {name} holds a value that is not finite; restore an earlier checkpoint"
                )
    for _, layer in layers:
        if not layer.merged:
            layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take merged adapters out of the base weights again (up to rounding, <= 1e-5 in the outputs)."""
    for _, layer in adapter_layers(model):
        if layer.merged:
            layer.unmerge()


def lock_tower(model: nn.Module, tower: str) -> None:
    """Let the base weights of a tower neither train nor travel; adapters in it go on.

    Args:
        model: A wrapper, a federated model or a bare CLIP; changed in place.
        tower: "vision" or "text".
    """
    root = unwrap(model)
    (_, prefix), towers = clip_of(root), find_towers(root)
    locked = set()
    for name, parameter in root.named_parameters():
        if towers.tower_of(name.removeprefix(prefix)) == tower and not is_adapter_parameter(name):
            parameter.requires_grad_(False)
            locked.add(wire_name(name))
    if hasattr(root, "set_exchanged"):
        root.set_exchanged(name for name in root.exchanged_names if name not in locked)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge, then put plain layers back: the model without any trace of LoRA, changed in place and returned.

    The active adapter is merged; other loaded adapters are dropped. Trained biases and temperature keep their
    values and are frozen again; of what travels, the head remains.
    """
    root = unwrap(model)
    _merge(root)
    for name, layer in sorted(adapter_layers(root), key=lambda item: -item[0].count(".")):
        if isinstance(layer, AttentionPart):
            layer.unload()
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer.base_layer)
    forget_base_values(root)
    pretrained_base_weights(root).clear()
    forget_base_digests(root)
    for owner in {root, clip_of(root)[0]}:
        for attribute in ("peft_config", "lora_config"):
            owner.__dict__.pop(attribute, None)
    if hasattr(root, "set_exchanged"):
        root.set_exchanged(exchanged_names(root))
    return root

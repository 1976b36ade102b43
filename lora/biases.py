"""Trained biases (`bias: lora_only` or `all`), with the base values kept so that disabling LoRA is exact.

PEFT leaves trained biases in place when its adapters are disabled, so its disabled model is not the base
model. Here a module that owns a trained bias keeps the base values in a buffer, and `use_base_biases` swaps
them in. Used when adapters are injected and when they are switched on and off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

_STASH = "_trained_biases"


def _buffer_name(leaf: str) -> str:
    return f"base_{leaf}"


def is_bias(name: str) -> bool:
    """Whether a parameter name is that of a bias (`in_proj_bias` of a fused attention included)."""
    return name.rsplit(".", 1)[-1] in {"bias", "in_proj_bias"}


def train_biases(root: nn.Module, names: Iterable[str]) -> None:
    """Let the named biases train and remember their present values as the base model's."""
    for name in names:
        owner, leaf = _owner(root, name)
        parameter = getattr(owner, leaf)
        parameter.requires_grad_(True)
        owner.register_buffer(_buffer_name(leaf), parameter.detach().clone(), persistent=False)


def trained_biases(root: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of every bias that trains, whether or not the base values are swapped in just now."""
    found = {}
    for name, owner, leaf in _trained(root):
        found[name] = getattr(owner, _STASH, {}).get(leaf, getattr(owner, leaf))
    return found


def use_base_biases(root: nn.Module) -> None:
    """Swap the base values in; the trained parameters wait, untouched, on their modules."""
    for _, owner, leaf in _trained(root):
        stash = owner.__dict__.setdefault(_STASH, {})
        if leaf not in stash:
            stash[leaf] = getattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(getattr(owner, _buffer_name(leaf)), requires_grad=False))


def use_trained_biases(root: nn.Module) -> None:
    """Put the trained parameters back."""
    for _, owner, leaf in _trained(root):
        stash = owner.__dict__.get(_STASH, {})
        if leaf in stash:
            setattr(owner, leaf, stash.pop(leaf))


def forget_base_biases(root: nn.Module) -> None:
    """Keep the trained values for good (after unloading): drop the copies of the base values."""
    use_trained_biases(root)
    for _, owner, leaf in list(_trained(root)):
        delattr(owner, _buffer_name(leaf))


def _trained(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for module_name, module in root.named_modules():
        for leaf in ("bias", "in_proj_bias"):
            if isinstance(module._buffers.get(_buffer_name(leaf)), torch.Tensor):
                yield f"{module_name}.{leaf}" if module_name else leaf, module, leaf


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module_name, _, leaf = name.rpartition(".")
    return root.get_submodule(module_name), leaf

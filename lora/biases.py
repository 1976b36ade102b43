"""What trains in the base model beside the adapters: biases (`bias: lora_only` or `all`) and the temperature.

The base values are kept, so that disabling LoRA is exact: PEFT leaves trained biases in place when its
adapters are disabled, and its disabled model is not the base model. Here a module that owns a trained
parameter keeps the base values in a buffer, and `use_base_values` swaps them in. Used when adapters are
injected and when they are switched on and off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from models.temperature import is_temperature

_BIASES = ("bias", "in_proj_bias")
_TEMPERATURE = "logit_scale"
_STASH = "_trained_in_base"


def _buffer_name(leaf: str) -> str:
    return f"base_{leaf}"


def is_bias(name: str) -> bool:
    """Whether a parameter name is that of a bias (`in_proj_bias` of a fused attention included)."""
    return name.rsplit(".", 1)[-1] in _BIASES


def train_in_base(root: nn.Module, names: Iterable[str]) -> None:
    """Let the named biases and temperature train and remember their present values as the base model's.

    A temperature of half precision becomes float32, as adapters are: small updates would be lost.
    """
    for name in names:
        owner, leaf = _owner(root, name)
        parameter = getattr(owner, leaf)
        owner.register_buffer(_buffer_name(leaf), parameter.detach().clone(), persistent=False)
        if is_temperature(name):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def trained_in_base(root: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of what `train_in_base` named, whether or not base values are swapped in just now."""
    found = {}
    for name, owner, leaf in _trained(root):
        found[name] = getattr(owner, _STASH, {}).get(leaf, getattr(owner, leaf))
    return found


def trained_temperature(root: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the temperature if it trains beside the adapters; else empty."""
    return {name: parameter for name, parameter in trained_in_base(root).items() if is_temperature(name)}


def base_values(root: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> the base model's value of what `train_in_base` named."""
    return {name: getattr(owner, _buffer_name(leaf)) for name, owner, leaf in _trained(root)}


def use_base_values(root: nn.Module) -> None:
    """Swap the base values in; the trained parameters wait, untouched, on their modules."""
    for _, owner, leaf in _trained(root):
        stash = owner.__dict__.setdefault(_STASH, {})
        if leaf not in stash:
            stash[leaf] = getattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(getattr(owner, _buffer_name(leaf)), requires_grad=False))


def use_trained_values(root: nn.Module) -> None:
    """Put the trained parameters back."""
    for _, owner, leaf in _trained(root):
        stash = owner.__dict__.get(_STASH, {})
        if leaf in stash:
            setattr(owner, leaf, stash.pop(leaf))


def forget_base_values(root: nn.Module) -> None:
    """Keep the trained values for good (after unloading), frozen and in the base's dtype; drop the copies."""
    use_trained_values(root)
    for _, owner, leaf in list(_trained(root)):
        parameter = getattr(owner, leaf).requires_grad_(False)
        parameter.data = parameter.data.to(getattr(owner, _buffer_name(leaf)).dtype)
        delattr(owner, _buffer_name(leaf))


def _trained(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for module_name, module in root.named_modules():
        for leaf in (*_BIASES, _TEMPERATURE):
            if isinstance(module._buffers.get(_buffer_name(leaf)), torch.Tensor):
                yield f"{module_name}.{leaf}" if module_name else leaf, module, leaf


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    module_name, _, leaf = name.rpartition(".")
    return root.get_submodule(module_name), leaf

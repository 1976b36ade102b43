"""A second adapter on the same layers, which trains beside the first: for personal models.

Put in before round 1, after the first. Both are active, so a layer computes W x + s B A x + s' B' A' x; the
aggregator (``dual``) says which of the two travels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lora.adapters import DEFAULT_ADAPTER, FACTORS, adapter_layers, clip_of, init_adapters, unwrap, wire_name
from lora.injection import inject_peft
from lora.split_attention import AttentionPart
from models.errors import UserError


def add_second_adapter(model: nn.Module, name: str, *, seed: int) -> None:
    """Give every adapted layer a second adapter of the same rank, scaling and dropout, and let both train.

    Its factors start like the first's, A Kaiming-uniform from a draw of its own and B zero, and are among
    what the model exchanges from now on, under wire names that contain the adapter's name.

    Args:
        model: A wrapper or a federated model with the default adapter; changed in place.
        name: The second adapter's name.
        seed: Seeds the draw of A.

    Raises:
        UserError: The model has no adapters, or one of this name already.
    """
    root = unwrap(model)
    layers = adapter_layers(root, DEFAULT_ADAPTER)
    if not layers or adapter_layers(root, name):
        raise UserError(f"a second adapter {name!r} needs a model that has adapters, and none of this name")
    if any(isinstance(layer, AttentionPart) for _, layer in layers):
        raise UserError("a second adapter needs PEFT's layers: set lora.target_modules to [attn]")
    clip, _ = clip_of(root)
    for owner in (clip, root):
        config = owner.__dict__.get("peft_config", {}).get(DEFAULT_ADAPTER)
        if config is not None:
            inject_peft(owner, copy.deepcopy(config), name)
    for _, layer in layers:
        _make_like_the_first(layer, name)
    init_adapters(root, torch.Generator().manual_seed(seed), name)
    second = [
        wire_name(parameter) for parameter, _ in root.named_parameters() if f".{name}.weight" in parameter
    ]
    root.set_exchanged([*root.exchanged_names, *second])


def _make_like_the_first(layer: Any, name: str) -> None:
    dropout: nn.Module = layer.lora_dropout[DEFAULT_ADAPTER]
    layer.lora_dropout[name] = copy.deepcopy(dropout)
    layer.scaling[name] = layer.scaling[DEFAULT_ADAPTER]
    trains = [getattr(layer, factor)[DEFAULT_ADAPTER].weight.requires_grad for factor in FACTORS]
    layer.set_adapter([DEFAULT_ADAPTER, name])
    for factor, requires_grad in zip(FACTORS, trains, strict=True):
        for adapter in (DEFAULT_ADAPTER, name):
            getattr(layer, factor)[adapter].weight.requires_grad_(requires_grad)

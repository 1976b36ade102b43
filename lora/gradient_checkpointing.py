"""Gradient checkpointing of the transformer blocks: less memory in training, one more forward pass.

Switched on before a round's local steps. The non-reentrant form is used: the reentrant one gives adapters no
gradient when the block's input requires none, which is the case in a frozen CLIP. Blocks are wrapped here and
not by the model's own switch, because that of transformers is inactive in eval mode, in which frozen towers
stay, and because this way Hugging Face and open_clip models behave the same.
Source: Chen et al., arXiv:1604.06174; torch.utils.checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.adapters import clip_of, find_towers
from lora.targets import block_of


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute each block of both towers in the backward pass instead of keeping its activations."""
    for block in _blocks(model):
        if not _is_checkpointed(block):
            block.forward = functools.partial(_checkpointed, block.forward)


def disable_gradient_checkpointing(model: nn.Module) -> None:
    """Back to keeping activations."""
    for block in _blocks(model):
        if _is_checkpointed(block):
            del block.forward


def is_gradient_checkpointing(model: nn.Module) -> bool:
    """Whether the blocks of the towers are checkpointed."""
    return any(_is_checkpointed(block) for block in _blocks(model))


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_checkpointed(block: nn.Module) -> bool:
    forward = block.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _checkpointed


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost numbered modules of both towers, as in `text_model.encoder.layers.3`."""
    clip, _ = clip_of(model)
    towers = find_towers(model)
    for name, module in clip.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf.isdigit() and block_of(parent) is None and towers.tower_of(name) is not None:
            yield module

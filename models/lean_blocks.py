"""The same towers with less work in a training step: nothing that the result does not need.

In force while a ``FederatedCLIPModel`` trains or evaluates; outside, the CLIP is as it was loaded. Both
savings are exact, forward and backward; sums are formed in another order, so results agree to rounding. For
Hugging Face's towers; others run as ever.

- CLIP's vision tower pools the first token of its last block (Radford et al. 2021; Dosovitskiy et al. 2021,
  ViT, for the class token) and leaves the others unread. There they are needed as keys and values, but not
  as queries, nor in the output projection and the MLP: ten twelfths of that block's products. (Text towers
  pool at a place that depends on the text.)
- QuickGELU, y = x s with s = sigmoid(1.702 x), has the derivative s + 1.702 y (1 - s): three passes over
  memory instead of the five that autograd makes of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

from models.clip_loading import Towers
from models.partial_towers import tower_module

_PARTS = ("layer_norm1", "layer_norm2", "mlp", "self_attn")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_SLOPE = 1.702


def lean_modules(clip: nn.Module, towers: Towers) -> tuple[nn.Module, ...]:
    """Return the modules of a CLIP that have a leaner way: activations, and the vision tower's last block."""
    if towers.backend != "huggingface":
        return ()
    activations = [module for module in clip.modules() if isinstance(module, QuickGELUActivation)]
    vision = tower_module(clip, towers, "vision")
    last = [] if vision is None or not _is_known(vision.encoder.layers[-1]) else [vision.encoder.layers[-1]]
    return tuple(dict.fromkeys([*activations, *last]))


@contextlib.contextmanager
def lean(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, both savings are in force; the last vision block gives (B, 1, width). May be nested.

    Args:
        modules: What ``lean_modules`` returned; left as they were.
    """
    replaced: list[Any] = [module for module in modules if "forward" not in vars(module)]
    for module in replaced:
        module.forward = quick_gelu if isinstance(module, QuickGELUActivation) else _first_token_of(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.mul(x, _SLOPE).sigmoid_()
        y = x * s
        ctx.save_for_backward(y, s)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, s = ctx.saved_tensors
        return torch.addcmul(s, y, 1.0 - s, value=_SLOPE).mul_(gradients[0])


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), once differentiable."""
    return _QuickGELU.apply(x)


def _is_known(block: Any) -> bool:
    return all(hasattr(block, part) for part in _PARTS) and all(
        hasattr(block.self_attn, projection) for projection in _PROJECTIONS
    )


def _first_token_of(block: Any) -> Callable[..., Tensor]:
    """Return the block's forward for the first token: pre-norm attention and MLP, as in the block itself."""
    attention = block.self_attn

    def heads(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, H, tokens, d_h)

    def forward(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        normalised = block.layer_norm1(hidden_states)  # (B, T, width)
        queries = heads(attention.q_proj(normalised[:, :1]))
        keys, values = heads(attention.k_proj(normalised)), heads(attention.v_proj(normalised))
        read = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)  # (B, H, 1, d_h)
        first = hidden_states[:, :1] + attention.out_proj(read.transpose(1, 2).flatten(2))
        return first + block.mlp(block.layer_norm2(first))

    return forward

"""Towers in two halves: the frozen blocks before the first adapted one, and the rest.

With LoRA in blocks l and up, what enters block l never changes. The cache of activations
(`federated.data.feature_cache`) computes it once with `run_until`; local steps and evaluation go on from
there with `run_from`, which leaves the frozen blocks out of the forward and the backward pass. The model's
own forward is used in both cases, so the results are those of the whole tower, bit by bit at equal batch
shapes. For Hugging Face towers, whose blocks are in `encoder.layers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.towers import Towers


class _ReachedBlockError(Exception):
    """Ends a forward pass at a block, with what enters it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def tower_module(clip: Any, towers: Towers, tower: str) -> Any | None:
    """The transformer of a tower, or None where its blocks are not laid out as Hugging Face's."""
    if towers.backend != "huggingface":
        return None
    module = clip.vision_model if tower == "vision" else clip.text_model
    return module if hasattr(getattr(module, "encoder", None), "layers") else None


def count_blocks(clip: nn.Module, towers: Towers) -> dict[str, int]:
    """Number of transformer blocks of each tower; 0 where they cannot be told apart."""
    modules = {tower: tower_module(clip, towers, tower) for tower in ("vision", "text")}
    return {tower: 0 if module is None else len(module.encoder.layers) for tower, module in modules.items()}


@torch.no_grad()
def run_until(tower: Any, block: int, forward: Callable[[], object]) -> Tensor:
    """What enters a block, (B, T, width), in the tower's dtype.

    Args:
        tower: What `tower_module` returned.
        block: Index of the block.
        forward: Runs the tower on a batch; it is left when the block is reached.

    Raises:
        UserError: The forward pass did not come to that block.
    """

    def stop(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        raise _ReachedBlockError(arguments[0] if arguments else options["hidden_states"])

    handle = tower.encoder.layers[block].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _ReachedBlockError as reached:
        return reached.hidden.detach()
    finally:
        handle.remove()
    raise UserError(f"{type(tower).__name__} never runs its block {block}: set cache.activations=false")


@contextlib.contextmanager
def run_from(tower: Any, block: int, hidden: Tensor) -> Iterator[None]:
    """Inside, the tower's forward starts at a block with `hidden`, (B, T, width), whatever it is given."""
    encoder, layers = tower.encoder, tower.encoder.layers
    replaced: list[tuple[nn.Module, Callable[..., Tensor]]] = [(tower.embeddings, lambda *_, **__: hidden)]
    if hasattr(tower, "pre_layrnorm"):  # transformers' own spelling
        replaced.append((tower.pre_layrnorm, lambda value: value))
    encoder.layers = layers[block:]
    for module, forward in replaced:
        module.forward = forward
    try:
        yield
    finally:
        encoder.layers = layers
        for module, _ in replaced:
            del module.forward

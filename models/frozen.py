"""What of a federated model can move, and what is frozen for good and may be computed once.

Asked when what travels is named (`FederatedCLIPModel.set_exchanged`), not in every round: caches of frozen
towers, class prompts and activations all follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from models.towers import Towers

_AFTER_THE_BLOCKS = ("post_layernorm", "final_layer_norm", "visual_projection", "text_projection")


@dataclass(frozen=True)
class Moving:
    """Which parts of a model change over a run.

    Attributes:
        vision_is_frozen: Nothing of the vision tower or its projection changes.
        text_is_frozen: Likewise for the text tower.
        first_blocks: Tower -> index of its first transformer block that changes; the blocks before it are
            frozen. 0 where something before the blocks changes, or where blocks cannot be told apart; the
            number of blocks where only what comes after them changes.
    """

    vision_is_frozen: bool
    text_is_frozen: bool
    first_blocks: dict[str, int]


def moving_parts(names: Iterable[str], towers: Towers, num_blocks: dict[str, int]) -> Moving:
    """Sort the parameters that train or travel into towers and blocks.

    Args:
        names: Their names in a federated model ("clip.…", "head.…").
        towers: Where the towers are inside the CLIP.
        num_blocks: Tower -> number of its transformer blocks.
    """
    first: dict[str, int] = {}
    inside = [name.removeprefix("clip.") for name in names if name.startswith("clip.")]
    for name, tower in [(name, towers.tower_of(name)) for name in inside]:
        if tower is not None:
            first[tower] = min(first.get(tower, num_blocks[tower]), _block(name, num_blocks[tower]))
    return Moving("vision" not in first, "text" not in first, first)


def dropout_modules(model: nn.Module, base_modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules that leave eval mode in a training step: those added to the base model, if any has dropout."""
    base = {id(module) for module in base_modules}
    added = [module for module in model.modules() if id(module) not in base]
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in added)
    return added if has_dropout else []


def _block(name: str, num_blocks: int) -> int:
    """Index of the block that a parameter of a tower is in."""
    parts = name.split(".")
    for part in parts:
        if part.isdigit():
            return int(part)
    return num_blocks if any(part in _AFTER_THE_BLOCKS for part in parts) else 0

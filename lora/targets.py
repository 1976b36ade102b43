"""From a LoRAConfig to the layers it names: anchored patterns per tower, and an error when nothing matches.

Used once, when adapters are injected. A pattern is anchored on the tower's module prefix, because a bare
suffix such as "q_proj" would reach both towers of a CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora.config import TOWERS, LoRAConfig
from lora.split_attention import PARTS_OF_TARGET, can_split
from models.errors import UserError
from models.towers import Towers


@dataclass(frozen=True)
class TowerPlan:
    """The layers of one tower that get adapters.

    Attributes:
        tower: "vision" or "text".
        prefix_pattern: Regular expression that matches the module names of the tower and no others.
        pattern: Regular expression that matches the adapted modules in full, and nothing else.
        modules: Names of the adapted modules inside the CLIP, in the model's order.
        config: The LoRAConfig with this tower's overrides applied.
        blocks: Blocks whose attention gets adapters of q, k, v and out apart; `modules` names those then.
    """

    tower: str
    prefix_pattern: str
    pattern: str
    modules: tuple[str, ...]
    config: LoRAConfig
    blocks: tuple[str, ...] = ()

    @property
    def owners(self) -> tuple[str, ...]:
        """Names of the base modules beside the adapters, whose biases may train."""
        return tuple(f"{block}.attn" for block in self.blocks) or self.modules


def plan_towers(clip: nn.Module, towers: Towers, config: LoRAConfig) -> list[TowerPlan]:
    """One plan for each tower that the config names; "encoder" names those that the model has.

    Raises:
        UserError: the model has no such tower, or a tower has no layer of the wanted names; the message lists
            those it has. A layer whose forward pass is never called (the output projection inside a fused
            attention) counts as none.
    """
    suffixes = config.target_modules or list(towers.default_targets)
    there = [tower for tower in TOWERS if getattr(towers, tower)]
    if absent := [t for t in config.tower_names if t not in there and t in config.target_components]:
        raise UserError(
            f"this model has no {absent[0]} tower: set lora.target_components=[{', '.join(there)}]"
        )
    if towers.backend == "open_clip" and (split := [name for name in suffixes if name in PARTS_OF_TARGET]):
        if len(split) < len(suffixes):
            raise UserError(
                f"{' and '.join(split)} make adapters of q, k, v and out apart and go with no other target; "
                "take attn, PEFT's form for the whole attention, beside c_fc and c_proj"
            )
        return [
            _plan_split(clip, towers, tower, suffixes, config.for_tower(tower))
            for tower in config.tower_names
        ]
    return [
        _plan_tower(clip, towers, tower, suffixes, config.for_tower(tower))
        for tower in config.tower_names
        if tower in there
    ]


def _plan_tower(
    clip: nn.Module, towers: Towers, tower: str, suffixes: Sequence[str], config: LoRAConfig
) -> TowerPlan:
    prefixes = getattr(towers, tower)
    candidates = dict(adaptable_modules(clip, prefixes))
    if config.target_modules is None:  # towers of other architectures name their layers otherwise
        suffixes = [s for s in suffixes if any(_ends_with(name, s) for name in candidates)] or suffixes
    pattern = target_pattern(prefixes, suffixes, config.layers)
    modules = tuple(name for name in candidates if re.fullmatch(pattern, name))
    available = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    missing = [s for s in suffixes if not any(_ends_with(name, s) for name in candidates)]
    if missing:
        raise UserError(
            f"no layer named {missing} in the {tower} tower that can carry an adapter (linear and attention "
            f"layers can; embeddings and convolutions cannot); it has {available}: set lora.target_modules"
        )
    without = sorted(set(config.layers or []) - {block_of(name) for name in modules})
    if without or not modules:
        raise UserError(
            f"no {list(suffixes)} in layers {without} of the {tower} tower, which has "
            f"{num_blocks(clip, prefixes)} layers: set lora.layers, or lora.{tower}.layers for one tower"
        )
    return TowerPlan(tower, _prefix_pattern(prefixes), pattern, modules, config)


def _plan_split(
    clip: nn.Module, towers: Towers, tower: str, targets: Sequence[str], config: LoRAConfig
) -> TowerPlan:
    prefixes = getattr(towers, tower)
    blocks = [
        name
        for name, module in clip.named_modules()
        if any(name.startswith(f"{prefix}.") for prefix in prefixes) and can_split(module)
    ]
    chosen = tuple(b for b in blocks if config.layers is None or block_of(b) in config.layers)
    if without := sorted(set(config.layers or []) - {block_of(name) for name in chosen}):
        raise UserError(
            f"no attention in layers {without} of the {tower} tower, which has {len(blocks)}: set "
            f"lora.layers, or lora.{tower}.layers for one tower"
        )
    if not chosen:
        raise UserError(
            f"the {tower} tower has no fused attention whose {' and '.join(targets)} could be adapted: set "
            "lora.target_modules to other layers"
        )
    parts = [part for target in PARTS_OF_TARGET if target in targets for part in PARTS_OF_TARGET[target]]
    modules = tuple(f"{block}.lora_{part}" for block in chosen for part in parts)
    return TowerPlan(tower, _prefix_pattern(prefixes), "", modules, config, chosen)


def adaptable_modules(clip: nn.Module, prefixes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The layers under `prefixes` that can carry an adapter: Linear and MultiheadAttention.

    The output projection inside a MultiheadAttention is left out: its forward pass is never called, so an
    adapter there would train nothing; the adapter of the attention covers it.
    """
    inside: tuple[str, ...] = ()
    for name, module in clip.named_modules():
        if not any(name == p or name.startswith(f"{p}.") for p in prefixes) or name.startswith(inside):
            continue
        if isinstance(module, (nn.MultiheadAttention, LoraLayer)):  # noqa: UP038
            inside += (f"{name}.",)
            yield name, module
        elif isinstance(module, nn.Linear):
            yield name, module


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


NON_NUMERIC_PARTS = r"(?:[^.\d][^.]*\.)*"
"""The parts of a module's name before its first numeric part; each repetition ends at its own dot."""


def target_pattern(
    prefixes: Sequence[str], suffixes: Sequence[str], layers: Sequence[int] | None = None
) -> str:
    r"""A regular expression for full module names: prefix, optionally a block index, one of the suffixes.

    The block index is the first numeric part of the name: 3 in `vision_model.encoder.layers.3.mlp.fc1`.

    Examples:
        >>> target_pattern(["text_model"], ["q_proj"], [0, 1])
        '(?:text_model)\\.(?:[^.\\d][^.]*\\.)*(?:0|1)\\.(?:.*\\.)?(?:q_proj)'
    """
    names = "|".join(re.escape(s) for s in suffixes)
    middle = r"(?:.*\.)?"
    if layers is not None:
        middle = rf"{NON_NUMERIC_PARTS}(?:{'|'.join(str(i) for i in layers)})\.{middle}"
    pattern = rf"{_any_of(prefixes)}\.{middle}(?:{names})"
    whole = [p for p in prefixes if layers is None and any(p == s or p.endswith(f".{s}") for s in suffixes)]
    return f"{pattern}|{_any_of(whole)}" if whole else pattern


def block_of(name: str) -> int | None:
    """Index of the block that a module belongs to; None outside any block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def num_blocks(clip: nn.Module, prefixes: Sequence[str]) -> int:
    """How many numbered blocks a tower has."""
    indices = {block_of(name) for name, _ in adaptable_modules(clip, prefixes)}
    return len(indices - {None})


def _prefix_pattern(prefixes: Sequence[str]) -> str:
    return rf"^{_any_of(prefixes)}(?:\..*)?"  # without ^, PEFT lets "transformer" match "visual.transformer"


def _any_of(names: Sequence[str]) -> str:
    return f"(?:{'|'.join(re.escape(name) for name in names)})"

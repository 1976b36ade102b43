"""Count and check: how many parameters, which gradients, which layers of which block.

Used before round 1 (is the injection what was asked for?) and after a backward pass (does all that should
train get a gradient, and nothing else?). The counts for ViT-B/32 are held by a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TypedDict

from torch import nn

from lora.adapters import (
    DEFAULT_ADAPTER,
    adapter_layers,
    adapter_parameters,
    clip_of,
    factor_of,
    find_towers,
    is_adapter_parameter,
    lora_config_of,
    unwrap,
    wire_name,
)
from lora.biases import trained_in_base, trained_temperature
from lora.targets import block_of, plan_towers


class ParameterCounts(TypedDict):
    """Numbers of parameters.

    `total` counts everything, adapters included; `base` is `total` without adapters; `trainable` is what
    requires a gradient; `adapter` the default adapter's factors. `by_tower` splits `adapter` into vision,
    text and head; `by_kind` splits what LoRA trains into lora_A, lora_B, head (without an adapter), bias and
    temperature.
    """

    total: int
    base: int
    trainable: int
    adapter: int
    trainable_percent: float
    by_tower: dict[str, int]
    by_kind: dict[str, int]


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a wrapper, a federated model or a bare CLIP."""
    root = unwrap(model)
    named = dict(root.named_parameters())
    factors = adapter_parameters(root)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    total = _size(named)
    by_tower = {"vision": 0, "text": 0, "head": 0}
    in_base, temperature = trained_in_base(root), _size(trained_temperature(root))
    by_kind = {"lora_A": 0, "lora_B": 0, "head": 0}
    by_kind |= {"bias": _size(in_base) - temperature, "temperature": temperature}
    for name, parameter in factors.items():
        by_tower[_tower_of(root, name)] += parameter.numel()
        by_kind[factor_of(name) or ""] += parameter.numel()
    plain_head = {n: p for n, p in trainable.items() if n.startswith("head.") and not is_adapter_parameter(n)}
    by_kind["head"] = _size({n: p for n, p in plain_head.items() if n not in in_base})
    return {
        "total": total,
        "base": total - _size({n: p for n, p in named.items() if is_adapter_parameter(n)}),
        "trainable": _size(trainable),
        "adapter": _size(factors),
        "trainable_percent": 100 * _size(trainable) / total,
        "by_tower": by_tower,
        "by_kind": by_kind,
    }


def print_parameter_stats(model: nn.Module) -> dict[str, int]:
    """Print how many parameters there are, train, and are adapters.

    Returns:
        "total", "trainable" and "lora"; `count_parameters` has the parts.
    """
    counts = count_parameters(model)
    stats = {"total": counts["total"], "trainable": counts["trainable"], "lora": counts["adapter"]}
    for name, number in stats.items():
        print(f"{name:>9}: {number:>13,} ({number / counts['total']:.3%})")  # noqa: T201 - what it is for
    return stats


@dataclass(frozen=True)
class GradientReport:
    """What a backward pass left behind; true if everything that trains, and only that, has a gradient.

    Attributes:
        with_gradient: How many trainable parameters have a gradient.
        missing: Trainable parameters without one.
        unexpected: Frozen parameters with one.
        all_zero: Trainable lora_B whose gradient is zero throughout (no part of the verdict).
        has_trainable_adapter: Whether some factor trains at all.
    """

    with_gradient: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    all_zero: tuple[str, ...]
    has_trainable_adapter: bool

    def __bool__(self) -> bool:
        """Whether all is well."""
        return self.has_trainable_adapter and not self.missing and not self.unexpected

    def __str__(self) -> str:
        """One line per finding."""
        lines = [f"{self.with_gradient} trainable parameters have a gradient"]
        for title, names in (
            ("without", self.missing),
            ("frozen, yet with", self.unexpected),
            ("zero", self.all_zero),
        ):
            if names:
                lines.append(f"{title} gradient: {len(names)}, first {names[0]}")
        return "\n".join(lines)


def verify_gradients(model: nn.Module) -> GradientReport:
    """Check the gradients after `loss.backward()`, before the optimizer clears them."""
    named = {wire_name(name): p for name, p in unwrap(model).named_parameters()}
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    return GradientReport(
        with_gradient=sum(p.grad is not None for p in trainable.values()),
        missing=tuple(sorted(n for n, p in trainable.items() if p.grad is None)),
        unexpected=tuple(sorted(n for n, p in named.items() if not p.requires_grad and p.grad is not None)),
        all_zero=tuple(
            sorted(
                n
                for n, p in trainable.items()
                if factor_of(n) == "lora_B" and p.grad is not None and not p.grad.any()
            )
        ),
        has_trainable_adapter=any(factor_of(name) for name in trainable),
    )


@dataclass(frozen=True)
class BlockReport:
    """The adapters of one block.

    Attributes:
        tower: "vision", "text" or "head".
        block: Index of the block; None for layers outside any.
        ranks: Adapted layer, by its name inside the block -> rank.
        missing: Layers that the config asks for and that carry no adapter.
    """

    tower: str
    block: int | None
    ranks: dict[str, int]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class InjectionReport:
    """Where the adapters are, block by block; true if nothing that was asked for is missing."""

    blocks: tuple[BlockReport, ...]

    def __bool__(self) -> bool:
        """Whether there are adapters and none is missing."""
        return any(b.ranks for b in self.blocks) and not any(b.missing for b in self.blocks)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        """A line per block."""
        rows = []
        for b in self.blocks:
            layers = ", ".join(f"{name} (r={rank})" for name, rank in b.ranks.items()) or "no adapter"
            missing = f"; MISSING {', '.join(b.missing)}" if b.missing else ""
            rows.append(f"{b.tower} block {'-' if b.block is None else b.block}: {layers}{missing}")
        return "\n".join(rows)


def check_lora_injection(model: nn.Module) -> InjectionReport:
    """List the adapters of every block of every tower, and what is missing against the model's LoRAConfig.

    Adapters that came from plain PEFT have no LoRAConfig here; nothing is then reported as missing.
    """
    root = unwrap(model)
    clip, _ = clip_of(root)
    towers = find_towers(root)
    present = {
        _without_clip(n): layer.r[DEFAULT_ADAPTER]
        for n, layer in adapter_layers(root, DEFAULT_ADAPTER)
        if not n.endswith("base_layer.out_proj")  # the inner half of a fused attention's adapter
    }
    config = lora_config_of(root)
    wanted = (
        {name for plan in plan_towers(clip, towers, config) for name in plan.modules} if config else set()
    )
    if config and config.adapts_head:
        wanted.add("head")
    keys = {(_tower_of(root, n), block_of(n)) for n in {*present, *wanted}}
    keys |= {
        (t, block_of(n))
        for n, _ in clip.named_modules()
        if (t := towers.tower_of(n)) and block_of(n) is not None
    }
    blocks = []
    for tower, block in sorted(keys, key=lambda key: (key[0], -1 if key[1] is None else key[1])):
        here = {n for n in {*present, *wanted} if (_tower_of(root, n), block_of(n)) == (tower, block)}
        ranks = {_inside_block(n): present[n] for n in sorted(here) if n in present}
        blocks.append(
            BlockReport(tower, block, ranks, tuple(sorted(_inside_block(n) for n in here - set(present))))
        )
    return InjectionReport(tuple(blocks))


def _size(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters.values())


def _without_clip(name: str) -> str:
    return name.removeprefix("clip.")


def _tower_of(root: nn.Module, name: str) -> str:
    return find_towers(root).tower_of(_without_clip(name)) or "head"


def _inside_block(name: str) -> str:
    block = block_of(name)
    return name if block is None else name.split(f".{block}.", 1)[1]

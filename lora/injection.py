"""Put adapters into a model, before round 1.

PEFT injects (`inject_adapter_in_model`): classes and parameter names of the model stay as they are, no model
is nested in another. For a federated model this is also the one moment at which what trains and what travels
is named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora.adapters import (
    DEFAULT_ADAPTER,
    FACTORS,
    adapter_layers,
    clip_of,
    exchanged_names,
    find_towers,
    head_trains,
    init_adapters,
    unwrap,
)
from lora.attention import FusedAttentionLoRA
from lora.biases import is_bias, train_in_base
from lora.config import LoRAConfig
from lora.linear import LinearLoRA
from lora.split_attention import add_lora_to_attention_block, attention_parts
from lora.targets import TowerPlan, block_of, plan_towers
from models.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BeforeLoRA:
    """What trained and travelled before adapters were injected.

    Attributes:
        exchanged_names: Wire names of what travelled; None for a bare CLIP.
        trainability: Every parameter with its requires_grad.
    """

    exchanged_names: tuple[str, ...] | None
    trainability: tuple[tuple[nn.Parameter, bool], ...]

    @classmethod
    def of(cls, model: nn.Module) -> BeforeLoRA:
        """Remember a model's present state."""
        root = unwrap(model)
        names = getattr(root, "exchanged_names", None)
        return cls(names, tuple((p, p.requires_grad) for p in root.parameters()))

    def restore(self, model: nn.Module) -> None:
        """Put it back, once the adapters are gone."""
        root = unwrap(model)
        for parameter, requires_grad in self.trainability:
            parameter.requires_grad_(requires_grad)
        if self.exchanged_names is not None:
            root.set_exchanged(self.exchanged_names)


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, seed: int = 0, generator: torch.Generator | None = None
) -> None:
    """Add the default adapter to the towers and the head that `config` names, and freeze everything else.

    A federated model is told what travels from now on. lora_B starts at zero, so the model's outputs do not
    change. No global random state is touched.

    Args:
        model: A federated model or a bare CLIP; changed in place.
        config: What to adapt.
        seed: Seeds the draw of lora_A; equal seeds give equal factors.
        generator: Used instead of `seed` if given.

    Raises:
        UserError: nothing matches the targets, or the model has adapters already.
    """
    root = unwrap(model)
    if adapter_layers(root, DEFAULT_ADAPTER):
        raise UserError("this model has adapters already; call merge_and_unload on it or build a fresh one")
    clip, prefix = clip_of(root)
    plans = plan_towers(clip, find_towers(root), config)
    if config.adapts_head and not isinstance(getattr(root, "head", None), nn.Linear):
        raise UserError(
            "target_components has 'classifier' but this model has no head; take it out, or set "
            "task.name to classification"
        )
    if config.adapts_head and plans and clip is root:
        raise UserError(
            "target_components has 'classifier' beside a tower, which goes with CLIP alone: take one out"
        )
    root.requires_grad_(False)
    generator = generator or torch.Generator().manual_seed(seed)
    if any(plan.blocks for plan in plans):
        _split_attention(clip, plans, config, generator)
    elif plans:
        inject_peft(clip, peft_config_for(plans, config), DEFAULT_ADAPTER)
        _set_dropout(clip, plans)
    if config.adapts_head:
        _inject_head(root, config.for_tower("head"))
    init_adapters(root, generator)
    train_in_base(
        root, _biases_to_train(root, [prefix + name for plan in plans for name in plan.owners], config)
    )
    if config.train_temperature:
        train_in_base(root, [f"{prefix}logit_scale"])
    root.lora_config = config.model_copy(
        deep=True
    )  # what is in force, whatever is assigned to `config` later
    _name_what_trains_and_travels(root)
    _warn_of_idle_text_adapters(root, config)
    logger.info("injected %d adapted layers", len(adapter_layers(root)))


def inject_from_peft(model: nn.Module, peft_config: LoraConfig, base_names: Sequence[str] = ()) -> None:
    """Add the default adapter as a PEFT configuration says; biases and temperature so named train too.

    Args:
        model: A federated model or a bare CLIP; changed in place.
        peft_config: What to adapt.
        base_names: Names inside the CLIP of what else trains.

    Raises:
        UserError: the configuration matches no layer of the model.
    """
    root = unwrap(model)
    clip, prefix = clip_of(root)
    root.requires_grad_(False)
    inject_peft(clip, peft_config, DEFAULT_ADAPTER)
    train_in_base(root, [prefix + name for name in base_names])
    _name_what_trains_and_travels(root)


def apply_lora_to_text_encoder(  # noqa: PLR0913 - the documented signature
    model: nn.Module,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
    *,
    config: LoRAConfig | None = None,
    seed: int = 0,
) -> int:
    """Adapt the text tower alone; by default its q, k, v and out projections, each by itself.

    On ViT-B/32 the default trains exactly 786,432 parameters.

    Args:
        model: A federated model or a bare CLIP; changed in place.
        r: Rank.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Dropout of the adapters' inputs.
        target_modules: Layers to adapt.
        config: Takes the place of the four before it; its target_components are replaced by ["text"].
        seed: Seeds the draw of lora_A.

    Returns:
        How many blocks were adapted.
    """
    if config is None:
        is_fused = find_towers(unwrap(model)).backend == "open_clip"
        all_four = ["in_proj", "out_proj"] if is_fused else ["q_proj", "k_proj", "v_proj", "out_proj"]
        config = LoRAConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=all_four if target_modules is None else list(target_modules),
        )
    inject_lora(model, config.model_copy(update={"target_components": ["text"]}), seed=seed)
    return len({block_of(name) for name, _ in adapter_layers(model)} - {None})


def inject_peft(model: Any, peft_config: LoraConfig, adapter_name: str) -> None:
    """PEFT's injection without its side effects: no global random draw, no other adapter thawed.

    On the meta device the factors stay there too.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    peft_configs = model.__dict__.pop("peft_config", {})  # PEFT would warn about a second adapter
    peft_config._register_custom_module({nn.MultiheadAttention: FusedAttentionLoRA, nn.Linear: LinearLoRA})
    on_meta = any(p.is_meta for p in model.parameters())
    with torch.random.fork_rng(devices=[]):
        try:
            inject_adapter_in_model(peft_config, model, adapter_name, low_cpu_mem_usage=on_meta)
        except ValueError as error:
            raise UserError(f"the adapter does not fit {type(model).__name__}: {error}") from error
        finally:
            model.peft_config = peft_configs
    model.peft_config = {**peft_configs, adapter_name: peft_config}
    for _, layer in adapter_layers(model, adapter_name):
        layer.train(layer.get_base_layer().training)  # new modules start in training mode: dropout is on
        for factor in FACTORS:
            getattr(layer, factor)[adapter_name].float()  # half precision would lose small updates
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def peft_config_for(plans: Sequence[TowerPlan], config: LoRAConfig) -> LoraConfig:
    """The PEFT configuration of a set of towers; what is saved as adapter_config.json."""
    split = [name for plan in plans if plan.blocks for name in plan.modules]
    settings: dict[str, Any] = {
        "target_modules": split or "|".join(plan.pattern for plan in plans),
        "r": plans[0].config.r,
        "lora_alpha": plans[0].config.lora_alpha,
        "lora_dropout": plans[0].config.lora_dropout,
        "use_rslora": config.use_rslora,
    }
    if len({(plan.config.r, plan.config.lora_alpha) for plan in plans}) > 1:
        settings["rank_pattern"] = {plan.prefix_pattern: plan.config.r for plan in plans}
        settings["alpha_pattern"] = {plan.prefix_pattern: plan.config.lora_alpha for plan in plans}
    return LoraConfig(**settings)


def _split_attention(
    clip: Any, plans: Sequence[TowerPlan], config: LoRAConfig, generator: torch.Generator
) -> None:
    """Adapters of q, k, v and out apart; plain PEFT refuses the configuration, whose modules it lacks."""
    targets = config.target_modules or []
    for plan in plans:
        own = plan.config
        for block in map(clip.get_submodule, plan.blocks):
            add_lora_to_attention_block(
                block, own.r, own.lora_alpha, own.lora_dropout, targets, generator=generator
            )
            for _, part in attention_parts(block):
                part.layer.scaling = own.scaling
    clip.peft_config = {DEFAULT_ADAPTER: peft_config_for(plans, config)}


def _inject_head(root: nn.Module, config: LoRAConfig) -> None:
    peft_config = LoraConfig(
        target_modules="head",
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
    )
    inject_peft(root, peft_config, DEFAULT_ADAPTER)


def _set_dropout(clip: nn.Module, plans: Sequence[TowerPlan]) -> None:
    """PEFT has one dropout per adapter; a tower may have its own."""
    for plan in plans:
        for name in plan.modules:
            for module in clip.get_submodule(name).modules():
                if isinstance(module, LoraLayer):
                    p = plan.config.lora_dropout
                    dropout = nn.Dropout(p) if p > 0 else nn.Identity()
                    module.lora_dropout[DEFAULT_ADAPTER] = dropout.train(module.training)


def _warn_of_idle_text_adapters(root: Any, config: LoRAConfig) -> None:
    if "text" in config.tower_names and not getattr(getattr(root, "task", None), "uses_text", True):
        logger.warning(
            "task %s does not use the text tower: its adapters will travel and never change; "
            "set lora.target_components to [vision]",
            root.task.name,
        )


def _biases_to_train(root: nn.Module, modules: Sequence[str], config: LoRAConfig) -> list[str]:
    names = [name for name, _ in root.named_parameters() if is_bias(name)]
    if config.bias == "none":
        return []
    owners = list(modules)
    if config.bias == "all":
        towers, (_, prefix) = find_towers(root), clip_of(root)
        owners = [f"{prefix}{p}" for tower in config.tower_names for p in getattr(towers, tower)]
    owners += ["head"] if config.adapts_head else []
    return [n for n in names if any(n.startswith(f"{owner}.") for owner in owners)]


def _name_what_trains_and_travels(root: Any) -> None:
    for _, layer in adapter_layers(root):
        layer.set_adapter([DEFAULT_ADAPTER])  # which also lets its factors train
    if head_trains(root):
        root.head.requires_grad_(True)
    if hasattr(root, "set_exchanged"):
        root.set_exchanged(exchanged_names(root))

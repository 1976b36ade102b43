"""LoRA as functions over a model: names, states, scaling, which factors train.

THE place that knows what an adapter parameter is called and where it sits; everything else asks here. Every
function takes a wrapper, a federated model or a bare CLIP. In a round the client uses `set_scaling` and
`set_trainable_factors`; the rest runs before and after training. Injection itself is in `lora.injection`,
switching adapters on and off and merging them in `lora.switching`.

The adapter that trains and travels is PEFT's "default"; other names serve inference (`lora.named`).
Paper: Hu et al., arXiv:2106.09685: y = W x + (lora_alpha / r) B A x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from lora.biases import trained_in_base
from lora.config import LoRAConfig
from lora.lora_layer import DEFAULT_ADAPTER, FACTORS
from lora.split_attention import AttentionPart, attention_parts, is_adapted_block
from models.clip_loading import HUGGINGFACE_TOWERS
from models.errors import UserError
from models.state import State
from models.towers import Towers

_FACTOR = re.compile(r"\.(lora_[AB])(?:\.|$)")
_PARAMETER = re.compile(r"\.lora_[AB](\.[^.]+\.weight)?$")
_PAIRED = re.compile(r"\.lora_[AB](\.weight)?$")


@dataclass(frozen=True)
class FactorPair:
    """Wire names of the two factors of one adapted layer.

    Attributes:
        module: Name of the adapted layer.
        a: Name of lora_A, (r, d_in).
        b: Name of lora_B, (d_out, r).
    """

    module: str
    a: str
    b: str


def wire_name(parameter_name: str) -> str:
    """The name under which a parameter travels: PEFT's name without ".default".

    >>> wire_name("clip.text_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight")
    'clip.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return re.sub(rf"\.(lora_[AB])\.{DEFAULT_ADAPTER}\.", r".\1.", parameter_name)


def factor_of(name: str) -> str | None:
    """ "lora_A" or "lora_B" if a parameter or wire name is that of a factor, else None."""
    found = _FACTOR.search(name)
    return None if found is None else found[1]


def is_adapter_part(name: str) -> bool:
    """Whether a parameter or wire name is a factor's, or that of another matrix inside an adapter."""
    return ".lora_" in name


def factor_pairs(names: Iterable[str]) -> list[FactorPair]:
    """Pair the factors among wire names, sorted by module; names that are no factors are ignored.

    Raises:
        UserError: a factor without its partner.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if factor := factor_of(name):
            found.setdefault(_PAIRED.sub("", name), {})[factor] = name
    for module, factors in sorted(found.items()):
        if len(factors) < len(FACTORS):
            there, name = next(iter(factors.items()))
            missing = name.replace(f".{there}", f".{FACTORS[1 - FACTORS.index(there)]}")
            raise UserError(f"{module} has one factor only: {missing} is missing from the state")
    return [FactorPair(module, *(found[module][factor] for factor in FACTORS)) for module in sorted(found)]


def unwrap(model: nn.Module) -> Any:
    """The federated model inside a wrapper; any other model is returned as it is."""
    inner = getattr(model, "federated_model", None)
    return inner if isinstance(inner, nn.Module) else model


def clip_of(model: nn.Module) -> tuple[Any, str]:
    """The CLIP inside a model and the prefix of its names there ("clip." or "" for a bare CLIP)."""
    root = unwrap(model)
    clip = getattr(root, "clip", None)
    return (clip, "clip.") if isinstance(clip, nn.Module) else (root, "")


def find_towers(model: nn.Module) -> Towers:
    """The towers of a federated model, or of a bare CLIP in the Hugging Face or open_clip layout.

    Raises:
        UserError: the model has neither layout, and names no towers of its own.
    """
    root = unwrap(model)
    towers = getattr(root, "towers", None)
    if isinstance(towers, Towers) and (towers.vision or towers.text):
        return towers
    if hasattr(root, "vision_model") and hasattr(root, "text_model"):
        return HUGGINGFACE_TOWERS
    if hasattr(root, "visual") and hasattr(root, "transformer"):
        return Towers("open_clip", vision=("visual",), text=("transformer",), default_targets=("attn",))
    raise UserError(
        f"{type(root).__name__} has no towers that could carry adapters; pass a federated model that names "
        "its towers, or a bare CLIP"
    )


def adapter_layers(model: nn.Module, adapter_name: str | None = None) -> list[tuple[str, Any]]:
    """(name, layer) of every adapted layer by name; only those with `adapter_name` if given.

    A layer is PEFT's, or an `AttentionPart` with the same surface.
    """
    layers: list[tuple[str, Any]] = []
    for name, module in unwrap(model).named_modules():
        if isinstance(module, LoraLayer):
            layers.append((name, module))
        elif is_adapted_block(module):
            layers += [(f"{name}.{leaf}".lstrip("."), part) for leaf, part in attention_parts(module)]
    found = [(n, m) for n, m in layers if adapter_name is None or adapter_name in m.lora_A]
    return sorted(found, key=lambda item: item[0])


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapted layer -> the frozen weight, (d_out, d_in), that its product is added to; written in place."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in adapter_layers(model, DEFAULT_ADAPTER):
        if isinstance(layer, AttentionPart):
            found[name] = layer.base_weight
            continue
        base = layer.get_base_layer()
        found[name] = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
    return found


def adapter_parameters(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, nn.Parameter]:
    """Wire name -> parameter of every factor of one adapter, sorted by name."""
    found = {}
    for name, layer in adapter_layers(model, adapter_name):
        suffix = "" if isinstance(layer, AttentionPart) else ".weight"
        for factor in FACTORS:
            found[f"{name}.{factor}{suffix}"] = getattr(layer, factor)[adapter_name].weight
    return dict(sorted(found.items()))


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the parameter of this wire name (for a factor, its small Linear).

    Raises:
        KeyError: the model has no such parameter.
    """
    for parameter_name, _ in unwrap(model).named_parameters():
        if wire_name(parameter_name) == name:
            return unwrap(model).get_submodule(parameter_name.rpartition(".")[0])
    raise KeyError(name)


def is_adapter_parameter(name: str) -> bool:
    """Whether a name from `model.named_parameters()` is that of an adapter's factor, whatever the adapter."""
    return _PARAMETER.search(name) is not None


def get_lora_state_dict(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> State:
    """A detached copy on the CPU of one adapter's factors, under their wire names."""
    parameters = adapter_parameters(model, adapter_name)
    return {name: p.detach().cpu().clone() for name, p in parameters.items()}


@torch.no_grad()
def set_lora_state_dict(
    model: nn.Module, state: Mapping[str, torch.Tensor], adapter_name: str = DEFAULT_ADAPTER
) -> None:
    """Copy factors into the model, in place; names may leave out the prefix of the CLIP in the model.

    Raises:
        UserError: names or shapes differ from the model's; the message names the first few.
    """
    parameters = adapter_parameters(model, adapter_name)
    _, prefix = clip_of(model)
    state = {name if name in parameters else prefix + name: value for name, value in state.items()}
    check_same_layout(parameters, state)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def check_same_layout(
    wanted: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    source: str = "the given state",
    *,
    same: str = "rank r and base model",
) -> None:
    """Raise UserError, saying which and what to do, unless both have the same names and shapes.

    Args:
        wanted: The model's tensors by name.
        given: Those that should take their place.
        source: Where they are from.
        same: What both must share for shapes to agree.
    """
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        raise UserError(
            f"{source} does not fit this model: {len(missing)} missing {missing[:3]}, {len(extra)} not in "
            f"the model {extra[:3]}; give both the same target_modules, target_components, layers, bias and "
            "train_temperature"
        )
    for name in sorted(wanted):
        if wanted[name].shape != given[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(given[name].shape)}, the model's has "
                f"{tuple(wanted[name].shape)}; give both the same {same}"
            )


def is_merged(model: nn.Module) -> bool:
    """Whether some adapter is folded into the base weights just now."""
    return any(layer.merged for _, layer in adapter_layers(model))


def lora_config_of(model: nn.Module) -> LoRAConfig | None:
    """The LoRAConfig applied to a model; None if there is none, or its adapters came from plain PEFT."""
    return getattr(unwrap(model), "lora_config", None)


def scalings(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, float]:
    """Adapted layer -> the factor in front of its B @ A, under the module names of `factor_pairs`."""
    return {name: float(layer.scaling[adapter_name]) for name, layer in adapter_layers(model, adapter_name)}


def set_scaling(model: nn.Module, values: Mapping[str, float], adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Set the scaling of the named layers (for clients whose rank, zero-padded, differs from the model's).

    Raises:
        UserError: a name is not that of an adapted layer.
    """
    if is_merged(model):
        raise UserError("adapters are merged; call unmerge_lora(model) before changing their scaling")
    layers = dict(adapter_layers(model, adapter_name))
    for name, value in values.items():
        if name not in layers:
            raise UserError(f"no adapted layer named {name!r}; known are {list(layers)[:3]} and so on")
        layers[name].scaling[adapter_name] = float(value)


def set_trainable_factors(model: nn.Module, factors: Collection[str] = FACTORS) -> None:
    """Let only the given factors of the default adapter train ({"lora_B"} for FFA-LoRA). What travels stays.

    Raises:
        UserError: a factor other than "lora_A" and "lora_B".
    """
    if unknown := set(factors) - set(FACTORS):
        raise UserError(f"unknown factors {sorted(unknown)}; valid are {list(FACTORS)}")
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(factor_of(name) in factors)


@torch.no_grad()
def init_adapters(model: nn.Module, generator: torch.Generator, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Fresh factors: A Kaiming-uniform with a = sqrt(5), B = 0. Equal generators give equal factors.

    Drawn on the CPU in fp32, in the order of the names, so that the device does not matter.
    """
    for name, parameter in adapter_parameters(model, adapter_name).items():
        if parameter.is_meta:
            continue
        if factor_of(name) == "lora_B":
            parameter.zero_()
        else:
            fresh = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))


def exchanged_names(model: nn.Module) -> tuple[str, ...]:
    """Wire names of what travels, sorted: adapters, trained biases, temperature, and a head that trains."""
    root = unwrap(model)
    names = {*adapter_parameters(root), *trained_in_base(root)}
    if head_trains(root):
        names |= {f"head.{name}" for name, _ in root.head.named_parameters()}
    return tuple(sorted(names))


def head_trains(model: nn.Module) -> bool:
    """Whether the head itself trains and travels: there is one, it is not frozen and carries no adapter."""
    root = unwrap(model)
    head = getattr(root, "head", None)
    return isinstance(head, nn.Module) and not isinstance(head, LoraLayer) and bool(root.train_head)

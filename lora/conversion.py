"""Read adapters in the documented `.pt` layouts, and give them the names of this model's layers.

A file is `{"epoch", "lora_state_dict", "lora_config"}` (adapters alone) or `{"epoch", "state_dict",
"optimizer", "lora_config"}` (every weight, in open_clip's names). Its factors are called
`transformer.resblocks.0.lora_q.lora_A` (text tower), `visual.transformer.resblocks.0.lora_v.lora_B` (vision
tower) and so on; `lora_config` has the rank and alpha. It is read with weights_only=True
(`models.untrusted`).

open_clip models take such factors as they are (`lora.split_attention`). For a Hugging Face CLIP each of q, k,
v and out becomes the adapter of its projection. Where the attention carries PEFT's fused form, the three of
q, k, v become one of rank 3 r, A stacked and B block-diagonal, which is the same function.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from torch import nn

from lora.adapter_files import AdapterFile
from lora.adapters import adapter_layers, clip_of, factor_of, factor_pairs, find_towers
from lora.attention import FusedAttentionLoRA
from lora.config import MAX_RANK, LoRAConfig, TowerOverride
from lora.peft_settings import check_peft_settings
from lora.split_attention import PARTS_OF_TARGET
from models.errors import UserError, shortened
from models.state import State
from models.untrusted import parsing, read_pt

_KEY = re.compile(
    r"(?P<visual>visual\.)?transformer\.resblocks\.(?P<block>[0-9]{1,4})\.lora_(?P<part>q|k|v|out)"
    r"\.lora_(?P<factor>[AB])"
)
_UNTOUCHED = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
}
"""Weights that LoRA never touches: open_clip's name -> Hugging Face's."""
_ROUNDING = 1e-3
_LARGEST = 1e9  # of a rank, an alpha or a dropout
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
N = TypeVar("N", int, float)
Blocks = dict[
    tuple[str, int], dict[str, dict[str, torch.Tensor]]
]  # (tower, block) -> part -> "A"/"B" -> factor


def is_pt(path: Path) -> bool:
    """Whether a path is that of a `.pt` file and not of an adapter folder."""
    return path.suffix in {".pt", ".pth"}


def base_named_in(path: Path) -> str:
    """Return the base model that a `.pt` file names, "" if it does not.

    Raises:
        UserError: as `read_converted`.
    """
    content, _, _ = _parts(path)
    return str(content.get("model_name", content["lora_config"].get("model_name", "")))


def read_converted(path: Path, model: nn.Module, *, fused: bool = False) -> AdapterFile:
    """Read a `.pt` file and name its factors as `model`'s layers are named.

    Args:
        path: The file.
        model: A federated model or a bare CLIP.
        fused: Take PEFT's fused form for open_clip's attention even where the model carries no adapter yet.

    Raises:
        UserError: no such file, not this layout, a pickled object inside, or no rank or alpha.
    """
    content, factors, base = _parts(path)
    config = content["lora_config"]
    _check_settings(path, config)
    rank = _setting(path, config, int, "r")
    alpha = _setting(path, config, float, "lora_alpha")
    dropout = _setting(path, config, float, "lora_dropout", default=0.0)
    if not (1 <= rank <= MAX_RANK and 0 < alpha < math.inf and 0 <= dropout < 1):
        raise UserError(
            f"{path}: lora_config says r={rank}, lora_alpha={alpha}, lora_dropout={dropout}; a rank of 1 to "
            f"{MAX_RANK}, a positive alpha and a dropout below 1 are possible"
        )
    common = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": bool(config.get("use_rslora")),
    }
    metadata: dict[str, Any] = {key: content[key] for key in ("epoch", "metrics") if key in content}
    name = str(content.get("model_name", config.get("model_name", "")))
    found = AdapterFile(path, {}, base_model=name, metadata=metadata, base=base)
    if not any(_KEY.fullmatch(key) for key in factors) and all(map(factor_of, factors)) and factors:
        return _as_named(found, factors, common)
    return _named(found, _grouped(path, factors, rank), model, common, fused=fused)


def _named(
    found: AdapterFile, blocks: Blocks, model: nn.Module, common: dict[str, Any], *, fused: bool
) -> AdapterFile:
    """Add the factors under the model's names, and how to inject adapters for them."""
    ours = None
    if find_towers(model).backend != "open_clip":
        state, modules = _separate(blocks)
    elif fused or any(isinstance(layer, FusedAttentionLoRA) for _, layer in adapter_layers(model)):
        state, modules = _fused(blocks, common["r"])
        width = 3**0.5 if common["use_rslora"] else 3
        common = {**common, "r": 3 * common["r"], "lora_alpha": width * common["lora_alpha"]}
    else:
        state, modules = _split(blocks, common["r"])
        ours = _split_config(blocks, common)
    targets = "|".join(re.escape(name) for name in modules)
    peft_config = LoraConfig(target_modules=targets, **common)
    return replace(found, state=dict(sorted(state.items())), peft_config=peft_config, lora_config=ours)


def _as_named(found: AdapterFile, factors: Mapping[str, Any], common: dict[str, Any]) -> AdapterFile:
    """Take factors under the names that `get_lora_state_dict` gave them."""
    state = {name: _values(found.folder, name, tensor) for name, tensor in factors.items()}
    targets = "|".join(re.escape(pair.module) for pair in factor_pairs(state))
    peft_config = LoraConfig(target_modules=targets, **common)
    return replace(found, state=dict(sorted(state.items())), peft_config=peft_config)


def _parts(path: Path) -> tuple[dict[str, Any], Mapping[str, torch.Tensor], State]:
    """The content of a file, its factors, and its base weights if it holds every weight."""
    content = read_pt(path)
    layouts = ("lora_state_dict", "state_dict")
    key = next(
        (k for k in layouts if isinstance(content, dict) and isinstance(content.get(k), Mapping)), None
    )
    for wanted, there in ((" or ".join(map(repr, layouts)), key), ("'lora_config'", "lora_config")):
        if there is None or not isinstance(content.get(there), Mapping):
            raise UserError(
                f"{path} has no {wanted}; expected a dict with 'lora_state_dict' and 'lora_config'"
            )
    assert key is not None
    state = {
        str(name).removeprefix("module.").removeprefix("clip."): tensor
        for name, tensor in content[key].items()
    }
    if key == "lora_state_dict":
        return content, state, {}
    base = {name: tensor for name, tensor in state.items() if factor_of(name) is None}
    return (
        content,
        {name: tensor for name, tensor in state.items() if name not in base},
        {name: _values(path, name, tensor) for name, tensor in base.items() if _is_weight(tensor)},
    )


def _is_weight(tensor: Any) -> bool:
    """Whether it is one of the floats of a state; masks and counters are not."""
    return not isinstance(tensor, torch.Tensor) or tensor.dtype.is_floating_point


def check_base_weights(model: nn.Module, found: AdapterFile) -> None:
    """Refuse a file whose own base weights are not the model's, as far as LoRA never touches them.

    Raises:
        UserError: One of them differs.
    """
    clip, _ = clip_of(model)
    here = dict(clip.named_parameters())
    for theirs, other in _UNTOUCHED.items():
        mine = here.get(theirs, here.get(other))
        if theirs not in found.base or mine is None or mine.is_meta:
            continue
        value = found.base[theirs]
        if value.shape != mine.shape or not torch.allclose(
            value, mine.detach().cpu().float(), atol=_ROUNDING
        ):
            raise UserError(
                f"{found.folder}: its own {theirs} is not this model's; load the base model it was trained "
                "on, or pass --any-base (check_base=False) to use the adapter on this one all the same"
            )


def _setting(path: Path, config: Mapping[str, Any], kind: type[N], name: str, default: N | None = None) -> N:
    """Return a number of ``lora_config``."""
    value = config.get(name, default)
    if value is None:
        raise UserError(f"{path}: lora_config has no {name!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        raise UserError(f"{path}: lora_config has {name}={shortened(repr(value))}, which is no number")
    if kind(value) != value:
        raise UserError(f"{path}: lora_config has {name}={value}, which is no whole number")
    return kind(value)


def _check_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings of PEFT's that change what factors compute, as for PEFT's own files."""
    known = {field.name for field in fields(LoraConfig)}
    check_peft_settings(str(path), {key: value for key, value in config.items() if key in known})
    if patterns := [key for key in ("alpha_pattern", "rank_pattern") if config.get(key)]:
        raise UserError(f"{path}: {patterns} cannot be read from this layout; save the adapter with PEFT")


def _grouped(path: Path, factors: Mapping[str, torch.Tensor], rank: int) -> Blocks:
    blocks: Blocks = defaultdict(lambda: defaultdict(dict))
    for key, tensor in factors.items():
        match = _KEY.fullmatch(str(key))
        if match is None:
            raise UserError(
                f"{path}: unknown key {shortened(repr(key))}; expected names like "
                "transformer.resblocks.0.attn.lora_q.lora_A"
            )
        axis = 0 if match["factor"] == "A" else 1  # A is (r, d_in), B is (d_out, r)
        value = _values(path, key, tensor)
        if value.ndim != 2 or value.shape[axis] != rank:
            raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, which does not fit rank {rank}")
        tower = "vision" if match["visual"] else "text"
        blocks[tower, int(match["block"])][match["part"]][match["factor"]] = value.contiguous()
    for (tower, block), parts in blocks.items():
        for part, pair in parts.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{path}: lora_{part} of {tower} block {block} has one factor only")
    if not blocks:
        raise UserError(f"{path} holds no factors of LoRA")
    return blocks


def _values(path: Path, key: str, tensor: Any) -> torch.Tensor:
    """Return a factor in float32 and memory of its own: the file's is only mapped."""
    plain = (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
    )
    if not plain:
        kind = (
            f"{tensor.dtype} on {tensor.device}"
            if isinstance(tensor, torch.Tensor)
            else type(tensor).__name__
        )
        raise UserError(f"{path}: {key} is no array of floats ({kind}); save plain tensors")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise UserError(f"{path}: {key} claims shape {tuple(tensor.shape)}, which the file does not hold")
    with parsing(f"{path}: {key}", "cannot be read", "save plain tensors"):
        return tensor.detach().to(torch.float32, copy=True)


def _separate(blocks: Blocks) -> tuple[State, list[str]]:
    """One adapter per projection of a Hugging Face CLIP."""
    state: dict[str, torch.Tensor] = {}
    for (tower, block), parts in blocks.items():
        for part, pair in parts.items():
            module = f"{tower}_model.encoder.layers.{block}.self_attn.{part}_proj"
            state |= {f"{module}.lora_{factor}.weight": value for factor, value in pair.items()}
    return state, sorted({name.rsplit(".lora_", 1)[0] for name in state})


def _split(blocks: Blocks, rank: int) -> tuple[State, list[str]]:
    """Four adapters per attention, as in the file; what it leaves out is zero."""
    state: dict[str, torch.Tensor] = {}
    parts = [part for target in _targets(blocks) for part in PARTS_OF_TARGET[target]]
    for (tower, block), pairs in blocks.items():
        width = next(iter(pairs.values()))["A"].shape[1]
        zero = {"A": torch.zeros(rank, width), "B": torch.zeros(width, rank)}
        module = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{block}"
        for part in parts:
            pair = pairs.get(part, zero)
            state |= {f"{module}.lora_{part}.lora_{factor}": value for factor, value in pair.items()}
    return state, sorted({name.rsplit(".", 1)[0] for name in state})


def _targets(blocks: Blocks) -> list[str]:
    present = {part for pairs in blocks.values() for part in pairs}
    return [target for target, parts in PARTS_OF_TARGET.items() if present & set(parts)]


def _split_config(blocks: Blocks, common: Mapping[str, Any]) -> LoRAConfig:
    layers = {tower: sorted(block for t, block in blocks if t == tower) for tower, _ in blocks}
    towers: dict[str, Any] = {tower: TowerOverride(layers=found) for tower, found in layers.items()}
    return LoRAConfig(**common, target_modules=_targets(blocks), target_components=sorted(layers), **towers)


def _fused(blocks: Blocks, rank: int) -> tuple[State, list[str]]:
    """One adapter of rank 3 r per fused attention; what the file leaves out is zero."""
    state: dict[str, torch.Tensor] = {}
    modules = []
    for (tower, block), parts in blocks.items():
        module = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{block}.attn"
        modules.append(module)
        width = next(iter(parts.values()))["A"].shape[1]
        zero = {"A": torch.zeros(rank, width), "B": torch.zeros(width, rank)}
        q_k_v = [parts.get(part, zero) for part in ("q", "k", "v")]
        out = parts.get("out", zero)
        state[f"{module}.lora_A.weight"] = torch.cat([pair["A"] for pair in q_k_v])  # (3 r, d)
        state[f"{module}.lora_B.weight"] = torch.block_diag(*[pair["B"] for pair in q_k_v])  # (3 d, 3 r)
        padding = 2 * rank
        state[f"{module}.base_layer.out_proj.lora_A.weight"] = nn.functional.pad(out["A"], (0, 0, 0, padding))
        state[f"{module}.base_layer.out_proj.lora_B.weight"] = nn.functional.pad(out["B"], (0, padding))
    return state, sorted(modules)

"""Read adapters in the `.pt` layout of hand-written CLIP LoRA code and give them our names.

Such a file holds `lora_state_dict`, with keys like `transformer.resblocks.0.attn.lora_q.lora_A` (text tower)
and `visual.transformer.resblocks.0.attn.lora_v.lora_B` (vision tower), and `lora_config` with the rank and
alpha. It is read with weights_only=True: a file that would run code is refused. Used once, before round 1.

For a Hugging Face CLIP each of q, k, v and out becomes the adapter of its projection. For a fused attention
the three of q, k, v become one of rank 3 r, A stacked and B block-diagonal, which is the same function.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from torch import nn

from lora.adapter_files import AdapterFile
from lora.adapters import find_towers
from lora.config import MAX_RANK
from lora.peft_settings import check_peft_settings
from models.errors import UserError, shortened
from models.state import State
from models.untrusted import parsing

_KEY = re.compile(
    r"(?P<visual>visual\.)?transformer\.resblocks\.(?P<block>[0-9]{1,4})\.attn\.lora_(?P<part>q|k|v|out)(_proj)?\.lora_(?P<factor>[AB])(\.weight)?"
)
_LARGEST = 1e9  # of a rank, an alpha or a dropout
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
N = TypeVar("N", int, float)
Blocks = dict[
    tuple[str, int], dict[str, dict[str, torch.Tensor]]
]  # (tower, block) -> part -> "A"/"B" -> factor


def read_converted(path: Path, model: nn.Module) -> AdapterFile:
    """Read a `.pt` file and name its factors as `model`'s layers are named.

    Raises:
        UserError: no such file, not this layout, a pickled object inside, or no rank or alpha.
    """
    content = _read(path)
    config = content["lora_config"]
    _check_settings(path, config)
    rank = _setting(path, config, int, "r", "rank")
    alpha = _setting(path, config, float, "lora_alpha", "alpha")
    dropout = _setting(path, config, float, "lora_dropout", "dropout", default=0.0)
    if not (1 <= rank <= MAX_RANK and 0 < alpha < math.inf and 0 <= dropout < 1):
        raise UserError(
            f"{path}: lora_config says r={rank}, lora_alpha={alpha}, lora_dropout={dropout}; a rank of 1 to "
            f"{MAX_RANK}, a positive alpha and a dropout below 1 are possible"
        )
    blocks = _grouped(path, content["lora_state_dict"], rank)
    fused = find_towers(model).backend == "open_clip"
    state, modules = _fused(blocks, rank) if fused else _separate(blocks)
    width, rank_stabilised = 3 if fused else 1, bool(config.get("use_rslora"))
    peft_config = LoraConfig(
        r=width * rank,
        lora_alpha=(width**0.5 if rank_stabilised else width) * alpha,  # type: ignore[arg-type]
        use_rslora=rank_stabilised,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in modules),
    )
    metadata: dict[str, Any] = {key: content[key] for key in ("epoch", "metrics") if key in content}
    name = str(content.get("model_name", config.get("model_name", "")))
    return AdapterFile(path, dict(sorted(state.items())), {}, peft_config, None, name, metadata)


def _read(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    remedy = "save tensors and plain values only, with torch.save"
    with parsing(path, "cannot be read safely", remedy, pickle.UnpicklingError, zipfile.BadZipFile):
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key in ("lora_state_dict", "lora_config"):
        if not isinstance(content, dict) or not isinstance(content.get(key), Mapping):
            raise UserError(
                f"{path} has no {key!r}; expected a dict with 'lora_state_dict' and 'lora_config'"
            )
    return content


def _check_archive(path: Path) -> None:
    """Refuse an archive whose parts are together larger than it is: what torch unpacks is in memory then."""
    with zipfile.ZipFile(path) as archive:
        claimed = sum(part.file_size for part in archive.infolist())
    if claimed > path.stat().st_size:
        raise UserError(f"{path} claims to hold {claimed} bytes, more than it has; save it with torch.save")


def _setting(
    path: Path, config: Mapping[str, Any], kind: type[N], *names: str, default: N | None = None
) -> N:
    """Return a number of ``lora_config`` by the first of its names that is there."""
    value = next((config[name] for name in names if name in config), default)
    if value is None:
        raise UserError(f"{path}: lora_config has no {names[0]!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        raise UserError(f"{path}: lora_config has {names[0]}={shortened(repr(value))}, which is no number")
    if kind(value) != value:
        raise UserError(f"{path}: lora_config has {names[0]}={value}, which is no whole number")
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
        if value.ndim == 2 and value.shape[axis] != rank and value.shape[1 - axis] == rank:
            value = value.T
        if value.ndim != 2 or value.shape[axis] != rank:
            raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, which does not fit rank {rank}")
        tower = "vision" if match["visual"] else "text"
        blocks[tower, int(match["block"])][match["part"]][match["factor"]] = value.contiguous()
    for (tower, block), parts in blocks.items():
        for part, pair in parts.items():
            if set(pair) != {"A", "B"}:
                raise UserError(f"{path}: lora_{part} of {tower} block {block} has one factor only")
    if not blocks:
        raise UserError(f"{path}: lora_state_dict is empty")
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

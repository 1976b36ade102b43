"""What a run merged into the base weights, in a file beside the adapter.

Some aggregation rules (FLoRA, FedEx-LoRA) put part or all of what is learnt into the frozen base weights, so
that an adapter alone is not the model. Written after such a run and read with the adapter, before round 1 or
for inference. ``base_delta.safetensors`` holds for each module, under its name inside the CLIP,

    <module>.left (d_out, q) and <module>.right (q, d_in), whose product is added to the pre-trained weight,
    or <module>.dense (d_out, d_in) where that is fewer numbers.

In plain PEFT: ``PeftModel.from_pretrained(clip, folder)``, then add each product to that layer's
``base_layer.weight``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.adapters import base_weights, clip_of, unwrap
from models.errors import UserError
from models.state import save_state
from models.untrusted import read_tensors

BASE_DELTA_FILE = "base_delta.safetensors"
MOST_VALUES = 2**28
"""Most values of one base weight: CLIP's widest layers have about 2**26."""
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PRETRAINED = "pretrained_base_weights"


def save_base_delta(
    model: nn.Module, folder: str | Path, products: Mapping[str, Sequence[Tensor]], *, server_round: int
) -> Path | None:
    """Write what was merged into each base weight; nothing, and no old file stays, when there is none.

    Args:
        model: The federated model, for its names.
        folder: The adapter's folder.
        products: Module -> (left, right), or (dense,).
        server_round: Goes into the metadata.

    Returns:
        The file, if one was written.
    """
    path = Path(folder) / BASE_DELTA_FILE
    path.unlink(missing_ok=True)
    if not products:
        return None
    _, prefix = clip_of(model)
    state: dict[str, Tensor] = {}
    for module, factors in products.items():
        parts = ("dense",) if len(factors) == 1 else ("left", "right")
        state |= {
            f"{module.removeprefix(prefix)}.{part}": factor
            for part, factor in zip(parts, factors, strict=True)
        }
    save_state(dict(sorted(state.items())), path, {"format": "pt", "server_round": str(server_round)})
    return path


def read_base_delta(folder: str | Path, shapes: Mapping[str, torch.Size] | None = None) -> dict[str, Tensor]:
    """Return what is added to each base weight, (d_out, d_in), by module name inside the CLIP; empty if none.

    Args:
        folder: The adapter's folder.
        shapes: Of the base weights by the same names; what does not fit them is refused, not multiplied out.

    Raises:
        UserError: The file is damaged, or does not fit.
    """
    path = Path(folder) / BASE_DELTA_FILE
    if not os.path.isfile(path):
        return {}
    state, _ = read_tensors(path)
    modules = sorted({name.rpartition(".")[0] for name in state})
    return {module: _product(state, module, path, shapes) for module in modules}


def _product(
    state: Mapping[str, Tensor], module: str, path: Path, shapes: Mapping[str, torch.Size] | None
) -> Tensor:
    """Return what is added to one base weight; its shape is checked before it is multiplied out."""
    dense, left, right = (state.get(f"{module}.{part}") for part in ("dense", "left", "right"))
    factors = [part for part in (left, right) if part is not None] if dense is None else [dense]
    if dense is None and (left is None or right is None):
        raise UserError(f"{path}: {module} lacks 'dense', or 'left' and 'right'; copy it again")
    kinds = {part.dtype for part in factors}
    if any(part.ndim != 2 for part in factors) or len(kinds) > 1 or not kinds <= _DTYPES:
        found = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in factors)
        raise UserError(f"{path}: {module} is {found}, not a matrix of floats; copy it again")
    shape = (factors[0].shape[0], factors[-1].shape[1])
    if len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0]:
        raise UserError(
            f"{path}: the factors of {module} are {tuple(factors[0].shape)} and {tuple(factors[1].shape)}, "
            "which is no product; copy it again"
        )
    if (shapes is not None and shapes.get(module) != shape) or math.prod(shape) > MOST_VALUES:
        raise UserError(
            f"{path} has {module} {shape}, which does not fit this model's adapted layers; load it with the "
            "adapter it was saved with"
        )
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def fitting_base_delta(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """Return what is added to each base weight, by the model's module names; the model is not changed.

    Raises:
        UserError: The file is damaged or does not fit the model.
    """
    root = unwrap(model)
    _, prefix = clip_of(root)
    weights = base_weights(root)
    inside = {module.removeprefix(prefix): weight.shape for module, weight in weights.items()}
    shapes = inside | {module: weight.shape for module, weight in weights.items()}
    deltas = read_base_delta(folder, shapes)
    return {_full_name(module, prefix, weights): delta for module, delta in deltas.items()}


@torch.no_grad()
def set_base_delta(model: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    """Make the base weights the pre-trained ones plus what `fitting_base_delta` returned.

    Of several calls the last one counts, so that an adapter may be loaded again or replaced by another; an
    empty mapping puts the pre-trained weights back.

    Args:
        model: A wrapper, a federated model or a bare CLIP, with adapters; changed in place.
        deltas: What to add to each base weight, (d_out, d_in).
    """
    root = unwrap(model)
    weights = base_weights(root)
    pretrained = pretrained_base_weights(root)
    for module in pretrained.keys() - deltas.keys():
        weights[module].copy_(pretrained[module])
    for module, delta in deltas.items():
        start = pretrained.setdefault(module, weights[module].detach().clone())
        weights[module].copy_(start + delta.to(start))


def pretrained_base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The pre-trained values of overwritten base weights, by module; whoever overwrites one adds to it."""
    found: dict[str, Tensor] = unwrap(model).__dict__.setdefault(_PRETRAINED, {})
    return found


def _full_name(module: str, prefix: str, weights: Mapping[str, Tensor]) -> str:
    return prefix + module if prefix + module in weights else module

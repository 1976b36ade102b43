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

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora.adapters import base_weights, clip_of, unwrap
from models.errors import UserError
from models.state import save_state

BASE_DELTA_FILE = "base_delta.safetensors"
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


def read_base_delta(folder: str | Path) -> dict[str, Tensor]:
    """Return what is added to each base weight, (d_out, d_in), by module name inside the CLIP; empty if none.

    Raises:
        UserError: The file is damaged.
    """
    path = Path(folder) / BASE_DELTA_FILE
    if not path.is_file():
        return {}
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); save or copy it again"
        ) from error
    deltas: dict[str, Tensor] = {}
    for module in sorted({name.rpartition(".")[0] for name in state}):
        dense, left, right = (state.get(f"{module}.{part}") for part in ("dense", "left", "right"))
        if left is not None and right is not None:
            deltas[module] = left @ right
        elif dense is not None:
            deltas[module] = dense
        else:
            raise UserError(f"{path}: {module} lacks 'dense', or 'left' and 'right'; copy it again")
    return deltas


def fitting_base_delta(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """Return what is added to each base weight, by the model's module names; the model is not changed.

    Raises:
        UserError: The file is damaged or does not fit the model.
    """
    root = unwrap(model)
    _, prefix = clip_of(root)
    weights = base_weights(root)
    deltas = {_full_name(module, prefix, weights): delta for module, delta in read_base_delta(folder).items()}
    for module, delta in deltas.items():
        if module not in weights or weights[module].shape != delta.shape:
            raise UserError(
                f"{Path(folder) / BASE_DELTA_FILE} has {module} {tuple(delta.shape)}, which does not fit "
                "this model's adapted layers; load it with the adapter it was saved with"
            )
    return deltas


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

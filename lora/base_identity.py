"""Which base model an adapter belongs to: a hash over all of its weights, adapted ones included.

Computed when an adapter is saved or loaded, and kept on the CLIP until a weight changes. An adapter means
its own base alone; names say little (folders move, and what is in them changes), and a few values say less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapters import base_weights, clip_of, factor_of, unwrap
from lora.base_delta_file import pretrained_base_weights
from lora.biases import base_values

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a base may be held in, by the name that goes into files."""

_KEPT = "base_sha256"
_Stamp = tuple[tuple[int, int], ...]


def base_digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the base weights by precision: as they are, and rounded to each half precision.

    Neither adapters nor what was trained or merged beside them enters: a model gives the same digests before
    LoRA is applied, after training, and with its adapter merged for the time being. The head is not part of
    the base.

    Args:
        model: A wrapper, a federated model or a bare CLIP.

    Returns:
        "float32" and both half precisions for a float32 base; the own one for a base of half precision;
        nothing for a model without storage (meta device).
    """
    clip, _ = clip_of(model)
    tensors = _base_tensors(model)
    stamp, kept = _stamp(tensors), clip.__dict__.get(_KEPT)
    if kept is not None and kept[0] in (None, stamp):
        return dict(kept[1])
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    own = next((name for name, dtype in PRECISIONS.items() if dtypes == {dtype}), "float32")
    names = PRECISIONS if own == "float32" else (own,)
    digests = {name: _digest(tensors, PRECISIONS[name]) for name in names}
    clip.__dict__[_KEPT] = (stamp, digests)
    return dict(digests)


def hold_base_digests(model: nn.Module) -> None:
    """Keep the present digests while adapters are merged, which is undone up to rounding only."""
    clip, _ = clip_of(model)
    clip.__dict__[_KEPT] = (None, base_digests(model))


def forget_base_digests(model: nn.Module) -> None:
    """The weights as they are now are the base from now on."""
    clip_of(model)[0].__dict__.pop(_KEPT, None)


def agreeing_precision(mine: Mapping[str, str], theirs: Mapping[str, Any]) -> str | None:
    """The finest precision at which two bases have the same weights; None if there is none."""
    return next((name for name in PRECISIONS if name in mine and mine[name] == theirs.get(name)), None)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the base by its name in a CLIP without adapters, with the value it has there."""
    root = unwrap(model)
    clip, prefix = clip_of(root)
    overwritten = pretrained_base_weights(root)
    values = {
        name: value
        for name, value in clip.state_dict(keep_vars=True).items()
        if value.is_floating_point() and factor_of(name) is None
    }
    if not prefix:  # a family whose base is the model itself, less its head
        head = {id(value) for name, value in values.items() if name.startswith("head.")}
        values = {name: value for name, value in values.items() if id(value) not in head}
    live = dict(values)
    for module, weight in base_weights(root).items():
        if module in overwritten:
            name = next(name for name, value in live.items() if _holds(value, weight))
            first = weight.storage_offset() - live[name].storage_offset()  # not 0: a part of a stacked weight
            if values[name] is live[name]:
                values[name] = live[name].detach().clone()
            values[name].view(-1)[first : first + weight.numel()] = overwritten[module].flatten()
    values |= {n.removeprefix(prefix): v for n, v in base_values(root).items() if n.startswith(prefix)}
    return {name.replace("base_layer.", ""): value for name, value in sorted(values.items())}


def _holds(tensor: Tensor, part: Tensor) -> bool:
    """Whether a tensor's memory contains that of another."""
    first = part.storage_offset() - tensor.storage_offset()
    same = tensor.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    return same and 0 <= first <= tensor.numel() - part.numel()


def _stamp(tensors: Mapping[str, Tensor]) -> _Stamp:
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors.values())


def _digest(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_sample(model: nn.Module) -> list[float]:
    """A few values of weights that LoRA never touches (embeddings, convolutions), to recognise a base."""
    clip, prefix = clip_of(model)
    head = None if prefix else getattr(clip, "head", None)
    trained = {id(value) for value in head.parameters()} if isinstance(head, nn.Module) else set()
    sample: list[float] = []
    for _, module in sorted(clip.named_modules()):
        weight = module._parameters.get("weight")
        if (
            isinstance(module, nn.Embedding | nn.Conv2d)
            and isinstance(weight, torch.Tensor)
            and not weight.is_meta
            and id(weight) not in trained
        ):
            flat = weight.detach().flatten()
            picks = torch.stack([flat[i * (flat.numel() - 1) // 7] for i in range(8)])
            sample += [round(value, 6) for value in picks.float().tolist()]
    return sample


def base_model_name(model: nn.Module) -> str:
    """Name of the base model, "" if the model does not know it."""
    root = unwrap(model)
    clip, _ = clip_of(root)
    return str(
        getattr(root, "model_name", None) or getattr(getattr(clip, "config", None), "_name_or_path", "") or ""
    )

"""Several adapters on one base model, for inference: load, list, switch, compare.

Not part of a round: the adapter that trains and travels is "default". Others are loaded under names of their
own, frozen, and chosen in milliseconds; memory is one base model plus the adapters. Heads and temperatures
are not switched: what is compared and served are embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lora.adapters import (
    adapter_layers,
    adapter_parameters,
    check_same_layout,
    clip_of,
    unwrap,
)
from lora.base_check import check_base_model
from lora.base_delta_file import BASE_DELTA_FILE
from lora.conversion import check_base_weights
from lora.injection import inject_peft
from lora.loading import read_any
from lora.split_attention import AttentionPart
from lora.switching import (
    disable_lora,
    enable_lora,
    is_enabled,
    lora_disabled,
    trainability_kept,
)
from models.errors import UserError
from models.temperature import is_temperature


def load_named_adapter(model: nn.Module, source: str | Path, name: str, *, check_base: bool = True) -> None:
    """Load an adapter beside those that are there; the active one stays active.

    Args:
        model: A wrapper, a federated model or a bare CLIP.
        source: As in `load_lora_adapters`.
        name: Under which to switch to it; letters, digits, "_" and "-".
        check_base: Refuse an adapter that was trained on another base model.

    Raises:
        UserError: the name is taken or not usable, the file does not fit, or it brings trained biases.
    """
    root = unwrap(model)
    clip, _ = clip_of(root)
    if name in list_adapters(root) or not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(
            f"adapter name {name!r} is taken or not of letters, digits, '_' and '-'; choose another"
        )
    if any(isinstance(layer, AttentionPart) for _, layer in adapter_layers(root)):
        raise UserError(
            "adapters on in_proj and out_proj stand alone; take the target attn to load others beside"
        )
    found = read_any(root, source, fused=True)
    if check_base:
        check_base_model(root, found)
        check_base_weights(root, found)
    if (found.folder / BASE_DELTA_FILE).is_file():
        raise UserError(
            f"{source} comes with changes of the base weights ({BASE_DELTA_FILE}), which adapters loaded "
            "side by side share; open it alone with load_lora_adapters"
        )
    if found.peft_config is None or found.peft_config.bias != "none":
        raise UserError(
            f"{source}: only adapters of the towers without trained biases can be loaded side by side"
        )
    active = active_adapter(root)
    inject_peft(clip, found.peft_config, name)
    wanted = adapter_parameters(clip, name)
    try:
        factors = {key: value for key, value in found.state.items() if not is_temperature(key)}
        check_same_layout(wanted, factors, str(source))
        with torch.no_grad():
            for key, parameter in wanted.items():
                parameter.requires_grad_(False).copy_(factors[key])
    except UserError:
        remove_adapter(root, name)
        raise
    finally:
        set_active_adapter(root, active)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the loaded adapters, sorted."""
    return sorted({name for _, layer in adapter_layers(model) for name in layer.lora_A})


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter in force; None if the model acts as the base model."""
    layers = adapter_layers(model)
    active = layers[0][1].active_adapters if layers and is_enabled(model) else []
    return str(active[0]) if active else None


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to a loaded adapter, or to the base model with None. Which parameters train does not change.

    Raises:
        UserError: no such adapter, or adapters are merged into the base weights just now.
    """
    root = unwrap(model)
    layers = adapter_layers(root)
    if any(layer.merged for _, layer in layers):
        raise UserError(
            "an adapter is merged into the base weights; call unmerge_lora(model) before switching"
        )
    if name is None:
        disable_lora(root)
    elif not any(name in layer.lora_A for _, layer in layers):
        raise UserError(f"no adapter {name!r}; loaded are {list_adapters(root)}")
    else:
        with trainability_kept(layers):
            for _, layer in layers:
                layer.set_adapter([name])
        enable_lora(root)
    _refresh(root)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Forget a loaded adapter. If it was active, the base model is in force afterwards.

    Raises:
        UserError: no such adapter, or it is the one that trains and travels.
    """
    root = unwrap(model)
    if name == "default" or name not in list_adapters(root):
        raise UserError(f"cannot remove {name!r}; loaded beside the default are {list_adapters(root)}")
    active = active_adapter(root)
    layers = adapter_layers(root)
    with trainability_kept(layers):
        for _, layer in layers:
            layer.set_adapter([])
            layer.delete_adapter(name)
    set_active_adapter(root, None if active == name else active)


@torch.no_grad()
def compare_embeddings(
    model: nn.Module, *, pixel_values: torch.Tensor | None = None, texts: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """Cosine between the base model's and the active adapter's embeddings, example by example.

    Args:
        model: A wrapper or a federated model.
        pixel_values: Images, (B, 3, H, W).
        texts: N texts.

    Returns:
        "image" (B,) and "text" (N,), as far as asked for; 1 means that the adapter changes nothing.
    """
    root = unwrap(model)

    def embed() -> dict[str, torch.Tensor]:
        rows = {}
        if pixel_values is not None:
            rows["image"] = root.encode_image(pixel_values)
        if texts is not None:
            rows["text"] = root.encode_text(list(texts))
        return rows

    adapted = embed()
    with lora_disabled(root):
        base = embed()
    return {kind: functional.cosine_similarity(adapted[kind], base[kind], dim=-1) for kind in adapted}


def _refresh(root: nn.Module) -> None:
    """Cached class embeddings belong to the adapter that was active when they were computed."""
    refresh = getattr(root, "refresh", None)
    if callable(refresh):
        refresh()

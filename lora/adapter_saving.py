"""Write adapter folders in PEFT's format, and full checkpoints; `lora.adapter_files` reads them."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from lora.adapter_files import (
    ADAPTER_FILE,
    CLASS_NAMES,
    FILES,
    FULL_FILE,
    HEAD_FILE,
    PEFT_PREFIX,
    expected_scaling,
)
from lora.adapters import (
    DEFAULT_ADAPTER,
    adapter_layers,
    adapter_parameters,
    clip_of,
    lora_config_of,
    scalings,
    unwrap,
)
from lora.base_delta_file import save_base_delta
from lora.base_identity import base_digests, base_model_name, base_sample
from lora.biases import trained_in_base
from lora.input_identity import input_settings
from models.committed_folders import committed_folder
from models.errors import UserError
from models.files import json_text
from models.state import State, save_state

logger = logging.getLogger(__name__)


def save_lora_adapters(  # noqa: PLR0913 -- what goes into the metadata, one by one
    model: nn.Module,
    folder: str | Path,
    *,
    server_round: int | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, float] | None = None,
    adapter_name: str = DEFAULT_ADAPTER,
    products: Mapping[str, Sequence[Tensor]] | None = None,
    notes: Mapping[str, Any] | None = None,
    full: bool = False,
) -> Path:
    """Write one adapter, trained biases, temperature and head as a PEFT folder.

    Args:
        model: A wrapper, a federated model or a bare CLIP with adapters.
        folder: Created if need be; what an earlier save wrote there is replaced.
        server_round: Goes into the metadata.
        epoch: Likewise.
        metrics: Likewise.
        adapter_name: Which adapter.
        products: What was merged into each base weight, as `save_base_delta` takes it.
        notes: What the manifest says of the run, JSON values.
        full: Write every weight as well, as `save_full_checkpoint` does.

    Returns:
        The folder.

    Raises:
        UserError: the model has no such adapter, or the folder cannot be written.
    """
    root = unwrap(model)
    if not adapter_parameters(root, adapter_name):
        raise UserError(f"this model has no adapter {adapter_name!r} to save; apply LoRA first")
    about: dict[str, Any] = {"base_sha256": base_digests(root), "inputs": input_settings(root)}
    if getattr(root, "head", None) is not None:
        about |= {key: getattr(root, key, None) for key in ("class_names", "templates")}
    about |= {"server_round": server_round, "epoch": epoch}
    metadata = _metadata(root, **about, metrics=metrics)
    inside, outside = _split_state(root, adapter_name)
    folder = Path(folder)
    with committed_folder(folder, FILES, notes=notes) as fresh:
        if inside:
            _exported_config(root, adapter_name).save_pretrained(str(fresh))
            save_state({PEFT_PREFIX + name: t for name, t in inside.items()}, fresh / ADAPTER_FILE, metadata)
        if outside:
            save_state(outside, fresh / HEAD_FILE, metadata)
        save_base_delta(root, fresh, products or {}, server_round=server_round or 0)
        if full:
            _write_full(root, fresh, metadata)
    logger.info("saved adapter %s to %s", adapter_name, folder)
    return folder


def save_full_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    server_round: int | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, float] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write every weight (base, adapters, head) to `model.safetensors`; else as `save_lora_adapters`."""
    root, folder = unwrap(model), Path(folder)
    with committed_folder(folder, FILES, notes=notes) as fresh:
        _write_full(root, fresh, _metadata(root, server_round=server_round, epoch=epoch, metrics=metrics))
    return folder


def _metadata(root: nn.Module, **extra: Any) -> dict[str, str]:
    config = lora_config_of(root)
    values = {
        "base_model": base_model_name(root),
        "base_sample": base_sample(root),
        "lora_config": None if config is None else config.model_dump(mode="json"),
        **extra,
    }
    present = {key: value for key, value in values.items() if value not in (None, {})}
    return {"format": "pt"} | {
        k: v if isinstance(v, str) else json_text(v, default=float) for k, v in present.items()
    }


def _class_names(root: nn.Module) -> dict[str, str]:
    """Metadata of a file that holds a head: which class each output is."""
    names = getattr(root, "class_names", None)
    return {} if names is None else {CLASS_NAMES: json.dumps(list(names))}


def _write_full(root: nn.Module, folder: Path, metadata: Mapping[str, str]) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in root.state_dict().items()}
    save_state(state, folder / FULL_FILE, {**metadata, **_class_names(root)})


def _split_state(root: nn.Module, adapter_name: str) -> tuple[State, State]:
    """What lies inside the CLIP (by name there) and outside it (by wire name), detached on the CPU."""
    _, prefix = clip_of(root)
    parameters: dict[str, nn.Parameter] = {**adapter_parameters(root, adapter_name), **trained_in_base(root)}
    head = getattr(root, "head", None)
    if isinstance(head, nn.Module) and not adapter_layers(head):
        parameters |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    state = {name: p.detach().cpu().clone().contiguous() for name, p in parameters.items()}
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and not _is_head(n)}
    return inside, {n: t for n, t in state.items() if _is_head(n)}


def _is_head(name: str) -> bool:
    return name.startswith("head.")


def _exported_config(root: nn.Module, adapter_name: str) -> LoraConfig:
    """PEFT's configuration with the scaling that is in force, which `set_scaling` may have changed."""
    clip, prefix = clip_of(root)
    config = copy.deepcopy(clip.peft_config[adapter_name])
    config.base_model_name_or_path = base_model_name(root)
    config.inference_mode = True
    ours = lora_config_of(root)
    config.bias = "none" if ours is None else ours.bias
    ranks = {name: layer.r[adapter_name] for name, layer in adapter_layers(clip, adapter_name)}
    actual = scalings(clip, adapter_name)
    if any(not math.isclose(actual[n], expected_scaling(config, n, r)) for n, r in ranks.items()):
        divisors = {n: math.sqrt(r) if config.use_rslora else r for n, r in ranks.items()}
        config.alpha_pattern = {f"^{re.escape(n)}": actual[n] * d for n, d in divisors.items()}
    return config

"""Put saved adapters and checkpoints into a model, after checking that they belong there.

Before round 1 (start from an adapter), or for inference. `lora.adapter_files` reads the files.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.adapter_files import AdapterFile, expected_scaling, read_adapter, read_full_checkpoint, saved_config
from lora.adapters import (
    DEFAULT_ADAPTER,
    adapter_layers,
    adapter_parameters,
    check_same_layout,
    clip_of,
    factor_of,
    find_towers,
    unwrap,
)
from lora.base_check import check_base_model
from lora.base_delta_file import fitting_base_delta, set_base_delta
from lora.base_identity import forget_base_digests
from lora.biases import trained_in_base
from lora.conversion import check_base_weights, is_pt, read_converted
from lora.injection import BeforeLoRA, inject_from_peft, inject_lora
from lora.switching import (
    merge_and_unload,
)
from models.errors import UserError
from models.state import State
from models.temperature import is_temperature

logger = logging.getLogger(__name__)


def load_lora_adapters(model: nn.Module, source: str | Path, *, check_base: bool = True) -> AdapterFile:
    """Load the default adapter, trained biases, temperature and head from a PEFT folder or a `.pt` file.

    A model without adapters gets them injected as the file says; one that has them must match the file. What
    the file lacks of head and temperature stays as it is in the model.

    Args:
        model: A wrapper, a federated model or a bare CLIP; changed in place.
        source: A folder that this package or plain PEFT wrote, or a `.pt` file (see `lora.conversion`).
        check_base: Refuse an adapter that was trained on another base model.

    Returns:
        What was read, with its metadata (round, epoch, metrics, base model).

    Raises:
        UserError: no such file, not an adapter, damaged, or its rank, targets, scaling or base model differ
            from the model's. The model is then as it was before.
    """
    root = unwrap(model)
    found = read_any(root, source)
    if check_base:
        check_base_model(root, found)
        if find_towers(root).backend != "open_clip":  # which takes the file's own base weights
            check_base_weights(root, found)
    with _as_before_on_error(root):
        if not adapter_layers(root, DEFAULT_ADAPTER):
            _inject(root, found)
        _fill(root, found)
    return found


def load_full_checkpoint(model: nn.Module, folder: str | Path) -> dict[str, Any]:
    """Load every weight from a full checkpoint; adapters are injected first if the checkpoint has them.

    Returns:
        The checkpoint's metadata.

    Raises:
        UserError: the file is missing or damaged, or does not fit the model, which is then as it was before.
    """
    root = unwrap(model)
    state, metadata = read_full_checkpoint(folder)
    config = saved_config(metadata, str(folder))
    with _as_before_on_error(root):
        if config is not None and not adapter_layers(root, DEFAULT_ADAPTER):
            inject_lora(root, config)
        check_same_layout(root.state_dict(), state, str(folder))
    root.load_state_dict(state)
    forget_base_digests(root)
    return metadata


def read_any(model: nn.Module, source: str | Path, *, fused: bool = False) -> AdapterFile:
    """Read a PEFT folder, or convert a `.pt` file to this model's layer names (as `read_converted` does)."""
    path = Path(source)
    return read_converted(path, model, fused=fused) if is_pt(path) else read_adapter(path)


@contextlib.contextmanager
def _as_before_on_error(root: nn.Module) -> Iterator[None]:
    """Take adapters that the block injects out again if it raises UserError.

    The block must raise before it copies anything: lora_B is zero then, and the base stays exactly as it was.
    """
    had_adapters, before = bool(adapter_layers(root, DEFAULT_ADAPTER)), BeforeLoRA.of(root)
    try:
        yield
    except UserError:
        if not had_adapters:
            merge_and_unload(root)
            before.restore(root)
        raise


def _inject(root: nn.Module, found: AdapterFile) -> None:
    if found.lora_config is not None:
        inject_lora(root, found.lora_config)
    elif found.peft_config is not None:
        inject_from_peft(root, found.peft_config, [n for n in found.state if factor_of(n) is None])
    else:
        raise UserError(
            f"{found.folder} does not say how its adapter was made; apply LoRA to the model first"
        )


def _fill(root: nn.Module, found: AdapterFile) -> None:
    """Check everything, then copy everything."""
    inside, outside = _parameters(root)
    if temperature := [name for name in inside if is_temperature(name) and name not in found.state]:
        logger.info("%s holds no temperature; the model keeps its own", found.folder)
        del inside[temperature[0]]
    check_same_layout(inside, found.state, str(found.folder))
    _check_scaling(root, found)
    head = _fitting_head(outside, in_class_order(root, found))
    deltas = fitting_base_delta(root, found.folder)
    base = _fitting_base(root, found)
    if base:
        _copy(base, {name: found.base[name] for name in base})
        forget_base_digests(root)
    _copy(inside, found.state)
    _copy(outside, head)
    set_base_delta(root, deltas)


def _fitting_base(root: nn.Module, found: AdapterFile) -> dict[str, nn.Parameter]:
    """Where the base weights of a full `.pt` file go, by their names there; empty if they stay out.

    Raises:
        UserError: They are those of another architecture.
    """
    if not found.base or find_towers(root).backend != "open_clip":
        return {}
    clip, _ = clip_of(root)
    named = {n.replace("base_layer.", ""): p for n, p in clip.named_parameters() if factor_of(n) is None}
    there = {name: tensor for name, tensor in found.base.items() if name in named}
    check_same_layout(named, there, f"{found.folder}, base weights", same="architecture")
    return named


def _parameters(root: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Where the values go: by name inside the CLIP, and by wire name outside it."""
    _, prefix = clip_of(root)
    both = {**adapter_parameters(root), **trained_in_base(root)}
    inside = {n.removeprefix(prefix): p for n, p in both.items() if not n.startswith("head.")}
    outside = {n: p for n, p in both.items() if n.startswith("head.")}
    head = getattr(root, "head", None)
    if isinstance(head, nn.Module) and not adapter_layers(head):
        outside |= {f"head.{name}": parameter for name, parameter in head.named_parameters()}
    return inside, outside


def _check_scaling(root: nn.Module, found: AdapterFile) -> None:
    clip, _ = clip_of(root)
    if found.peft_config is None:
        return
    for name, layer in adapter_layers(clip, DEFAULT_ADAPTER):
        value = float(layer.scaling[DEFAULT_ADAPTER])
        wanted = expected_scaling(found.peft_config, name, layer.r[DEFAULT_ADAPTER])
        if not math.isclose(value, wanted, rel_tol=1e-6):
            raise UserError(
                f"{found.folder}: scaling of {name} is {wanted:g} in the file and {value:g} in the model; "
                "give both the same lora_alpha, r and use_rslora"
            )


def _fitting_head(outside: Mapping[str, nn.Parameter], found: AdapterFile) -> State:
    """The file's head if the model has a place for it; the model's head adapter must be in the file."""
    if found.head and not outside:
        logger.warning(
            "%s holds a head, which this model has not; only the adapters are loaded", found.folder
        )
        return {}
    if not found.head and any(factor_of(name) is None for name in outside):
        logger.info("%s holds no head; the model keeps its own", found.folder)
        return {}
    check_same_layout(
        outside,
        found.head,
        f"{found.folder}, head",
        same="classes, base model and rank of the head's adapter",
    )
    return found.head


def in_class_order(model: nn.Module, found: AdapterFile) -> AdapterFile:
    """The file with its head's rows in the order of the model's classes, where both name theirs.

    Raises:
        UserError: The classes differ, or the head's adapter was trained on other prompts.
    """
    root, theirs = unwrap(model), found.class_names
    mine = getattr(root, "class_names", None)
    if not found.head or not mine or theirs is None:
        return found
    templates = found.metadata.get("templates")
    if any(factor_of(name) for name in found.head) and templates not in (None, list(root.templates)):
        raise UserError(
            f"{found.folder}: its head was adapted with templates {templates}; set task.templates so"
        )
    if tuple(mine) == theirs:
        return found
    if sorted(mine) != sorted(theirs) or len(set(mine)) < len(mine):
        others = sorted(set(mine) ^ set(theirs))
        raise UserError(
            f"{found.folder}: its head knows {len(theirs)} classes, the model here {len(mine)}; they differ "
            f"in {others[:3]}; use data with the classes of the training"
        )
    rows = [theirs.index(name) for name in mine]
    head = {
        n: t[rows] if t.shape[0] == len(rows) and factor_of(n) != "lora_A" else t
        for n, t in found.head.items()
    }
    return replace(found, head=head)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], state: State) -> None:
    for name, tensor in state.items():
        parameters[name].copy_(tensor)

"""Adapter files in PEFT's format, and full checkpoints: what they hold, and reading them.

Safetensors and JSON, never pickle; `lora.adapter_saving` writes them. A folder holds

    adapter_config.json         PEFT's configuration
    adapter_model.safetensors   factors under `base_model.model.` + path inside the CLIP, and, so named too,
                                trained biases and temperature
    head.safetensors            what lies outside the CLIP: the head, or its adapter
    base_delta.safetensors      what was merged into the base weights, if anything (`lora.base_delta_file`)
    manifest.json               the files with their SHA-256 (`models.committed_folders`)

The first two load in plain `peft.PeftModel.from_pretrained` on the CLIP. The safetensors metadata carry the
round or epoch, the base model's name, hashes of all its weights, how its inputs are prepared, our LoRAConfig,
the metrics and, where there is a head, its classes. A folder is committed whole: an interrupted save leaves
the old one.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lora.adapters import (
    factor_of,
)
from lora.base_delta_file import BASE_DELTA_FILE
from lora.biases import is_bias
from lora.config import MAX_RANK, Bias, LoRAConfig
from lora.peft_settings import check_peft_settings
from lora.targets import NON_NUMERIC_PARTS
from models.committed_folders import check_committed, current_folder
from models.errors import UserError, shortened
from models.state import State
from models.temperature import is_temperature
from models.untrusted import check, parse_json, parsing, read_json, read_tensors

logger = logging.getLogger(__name__)

CONFIG_FILE, ADAPTER_FILE, HEAD_FILE = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
FULL_FILE = "model.safetensors"
FILES = (CONFIG_FILE, ADAPTER_FILE, HEAD_FILE, BASE_DELTA_FILE, FULL_FILE)
CLASS_NAMES = "class_names"
PEFT_PREFIX = "base_model.model."
MAX_PATTERN = 100_000
"""Longest pattern for the names of modules; a list of every module of a CLIP has about 10,000 characters."""


def _pattern(text: str) -> str:
    """Return a regular expression whose matching takes no exponential time: no group of it is repeated.

    The one exception is ``NON_NUMERIC_PARTS``, whose repetitions cannot overlap.
    """
    if len(text) > MAX_PATTERN or re.search(r"(?<!\\)\)[*+{]", text.replace(NON_NUMERIC_PARTS, "")):
        raise ValueError("a pattern that is too long, or that repeats a group; name the modules one by one")
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no pattern for names of modules: {error}") from error
    return text


_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[int | float, Field(gt=0, allow_inf_nan=False)]
_Pattern = Annotated[str, AfterValidator(_pattern)]


class _PeftFile(TypedDict, total=False):
    """What is read of ``adapter_config.json``; PEFT looks at the rest."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None
    r: _Rank
    lora_alpha: _Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    bias: Bias
    use_rslora: bool
    target_modules: _Pattern | list[str] | None
    exclude_modules: _Pattern | list[str] | None
    rank_pattern: dict[_Pattern, _Rank] | None
    alpha_pattern: dict[_Pattern, _Alpha] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[_Pattern] | _Pattern | None


class _Metadata(TypedDict, total=False):
    """What is read of the metadata of a safetensors file."""

    server_round: int
    epoch: int
    metrics: dict[str, Any]
    base_sample: list[float]
    lora_config: dict[str, Any]


_PEFT_FILE, _METADATA = TypeAdapter(_PeftFile), TypeAdapter(_Metadata)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
        folder: Where it was read from.
        state: Factors, trained biases and temperature by their names inside the CLIP.
        head: What lies outside the CLIP, by wire name ("head.weight").
        peft_config: PEFT's configuration; None if only the head has an adapter.
        lora_config: Our configuration; None for files that plain PEFT wrote.
        base_model: Name of the base model, "" if unknown.
        metadata: The file's metadata: server_round, epoch, metrics, base_sample, base_sha256, inputs,
            class_names, templates, as far as present.
        class_names: Of the head's outputs, in order; None where the file does not say.
        notes: What the folder's manifest says of the run.
        base: Base weights in open_clip's names, where a `.pt` file holds every weight.
    """

    folder: Path
    state: State
    head: State = field(default_factory=dict)
    peft_config: LoraConfig | None = None
    lora_config: LoRAConfig | None = None
    base_model: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    base: State = field(default_factory=dict)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read an adapter folder, ours or plain PEFT's, without touching a model.

    Raises:
        UserError: there is no such folder, it is no PEFT folder, a file is missing or damaged, or the adapter
            uses something that is not plain LoRA.
    """
    folder = current_folder(Path(folder))
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; give the folder that holds {CONFIG_FILE}")
    head, head_metadata = (
        _read_tensors(folder / HEAD_FILE) if os.path.isfile(folder / HEAD_FILE) else ({}, {})
    )
    if not os.path.isfile(folder / CONFIG_FILE):
        if not head:
            raise UserError(f"{folder} is no PEFT adapter: {CONFIG_FILE} is missing")
        return _adapter_file(folder, ({}, head), None, head_metadata)
    if not os.path.isfile(folder / ADAPTER_FILE):
        pickled = os.path.isfile(folder / "adapter_model.bin")
        remedy = "save it again with safe_serialization=True" if pickled else "copy the whole folder"
        raise UserError(f"{folder}: {ADAPTER_FILE} is missing; {remedy}")
    peft_config = _read_peft_config(folder)
    tensors, metadata = _read_tensors(folder / ADAPTER_FILE)
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    foreign = [n for n in state if factor_of(n) is None and not (is_bias(n) or is_temperature(n))]
    if foreign:
        raise UserError(
            f"{folder}: {len(foreign)} arrays are not plain LoRA, first {foreign[0]}; merge it in PEFT first"
        )
    metadata |= {CLASS_NAMES: head_metadata[CLASS_NAMES]} if CLASS_NAMES in head_metadata else {}
    return _adapter_file(folder, (state, head), peft_config, metadata)


def read_full_checkpoint(folder: str | Path) -> tuple[State, dict[str, Any]]:
    """Every weight and the metadata of a full checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = current_folder(Path(folder))
    path = folder / FULL_FILE
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing; was the model saved with save_only_trainable: true?")
    check_committed(folder, FILES)
    return _read_tensors(path)


def read_notes(folder: Path) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """Return what an adapter folder or full checkpoint says without its weights being read.

    Returns:
        The classes of the head, in order, None where no file says; the manifest's notes.

    Raises:
        UserError: a file is damaged, missing or changed.
    """
    notes = check_committed(folder, FILES)
    for name in (HEAD_FILE, FULL_FILE):
        if (folder / name).is_file():
            return names_of_classes(_read_tensors(folder / name, only_metadata=True)[1], folder), notes
    return None, notes


def num_head_classes(found: AdapterFile) -> int:
    """Return how many outputs the head in an adapter file has; 0 without one."""
    outputs = (found.head.get(name) for name in ("head.weight", "head.lora_B.weight"))
    return next((int(tensor.shape[0]) for tensor in outputs if tensor is not None), 0)


def names_of_classes(metadata: Mapping[str, Any], source: str | Path) -> tuple[str, ...] | None:
    """Return the classes of the head, in order, from a file's metadata; None where it does not say.

    Raises:
        UserError: they are no list of texts.
    """
    names = metadata.get(CLASS_NAMES)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{source}: {CLASS_NAMES} is no list of class names; copy the folder again")
    return None if names is None else tuple(names)


def saved_config(metadata: Mapping[str, Any], source: str) -> LoRAConfig | None:
    """Our configuration in a file's metadata; None where there is none.

    Raises:
        UserError: it is not one that this version knows.
    """
    values = metadata.get("lora_config")
    if not isinstance(values, dict):
        return None
    try:
        return LoRAConfig(**values)
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise UserError(
            f"{source}: its LoRA configuration cannot be read ({keys}); was it saved by a newer version?"
        ) from error


def expected_scaling(config: LoraConfig, module: str, rank: int) -> float:
    """The scaling that PEFT gives a layer of this configuration."""
    patterns = config.alpha_pattern or {}
    keys = (k for k in patterns if re.match(rf"(.*\.)?({k})$", module))
    alpha = next((patterns[k] for k in keys), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _read_tensors(path: Path, *, only_metadata: bool = False) -> tuple[State, dict[str, Any]]:
    tensors, metadata = read_tensors(path, only_metadata=only_metadata)
    values = {key: _decoded(value, f"{path}, {key}") for key, value in metadata.items()}
    check(_METADATA, values, path)
    return tensors, values


def _decoded(value: str, source: str) -> Any:
    """Return a value of the metadata: what is no JSON is a text."""
    try:
        return parse_json(value.encode(), source)
    except UserError:
        return value


def _read_peft_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path}: peft_type is {shortened(repr(kind))}; only LORA adapters can be loaded")
    check_peft_settings(str(path), raw)
    check(_PEFT_FILE, raw, path)
    with parsing(path, "is no configuration that PEFT accepts", "save the adapter again"):
        config = LoraConfig.from_pretrained(str(folder))
    config.init_lora_weights = True
    return config


def _adapter_file(
    folder: Path,
    states: tuple[State, State],
    peft_config: LoraConfig | None,
    metadata: dict[str, Any],
) -> AdapterFile:
    return AdapterFile(
        folder=folder,
        state=states[0],
        head=states[1],
        peft_config=peft_config,
        lora_config=saved_config(metadata, str(folder)),
        base_model=str(
            metadata.get("base_model") or (peft_config and peft_config.base_model_name_or_path) or ""
        ),
        metadata=metadata,
        class_names=names_of_classes(metadata, folder),
        notes=check_committed(folder, FILES),
    )

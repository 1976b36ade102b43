"""Starting a run from an adapter that is there already, ours or plain PEFT's, before round 1.

The model has its adapters by then, as the configuration says. The file must fit them: rank, scaling, layers,
base model. What does not fit is named with the setting that would.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from lora.adapter_files import ADAPTER_FILE, HEAD_FILE, AdapterFile, read_adapter
from lora.adapters import adapter_parameters, factor_of, lora_config_of, unwrap
from lora.base_delta_file import BASE_DELTA_FILE
from lora.config import LoRAConfig
from lora.loading import load_lora_adapters
from models.committed_folders import current_folder
from models.errors import UserError

_WITHOUT_EFFECT = {"lora_dropout", "save_only_trainable", "enabled"}
"""Settings that may differ: the factors mean the same."""


def adapter_folder(source: str | Path) -> Path:
    """Return where an adapter's files are: a run's folder stands for the adapter of its last round.

    Raises:
        UserError: The run has none.
    """
    path = Path(source)
    if not (path / "metrics.jsonl").is_file():
        return current_folder(path)
    folder = current_folder(path / "adapter")
    if not folder.is_dir():
        raise UserError(f"{path} has no adapter/: the run did not come to its end; name its adapter_best/")
    return folder


def start_from_adapter(model: nn.Module, source: str | Path) -> AdapterFile:
    """Load an adapter, and a head where the file has one, into a model with adapters of the same form.

    Args:
        model: Changed in place.
        source: A run folder, or the folder of an adapter.

    Returns:
        What was read.

    Raises:
        UserError: It is no adapter, does not fit the model, or belongs to another base model.
    """
    folder = adapter_folder(source)
    if (folder / BASE_DELTA_FILE).is_file():
        raise UserError(
            f"{source} merged what it learnt into the base weights, so that its adapter alone is no start; "
            f"write the whole model with `fedlora export {source} FOLDER --merge` and set "
            "model.model_name=FOLDER"
        )
    found = read_adapter(folder)
    try:
        return load_lora_adapters(model, folder)
    except UserError as error:
        if differing := _differing_settings(model, found):
            wanted = ", ".join(f"lora.{key}={theirs}" for key, theirs, _ in differing)
            here = ", ".join(f"lora.{key}={mine}" for key, _, mine in differing)
            raise UserError(
                f"{source} does not fit: it was made with {wanted}, the model here with {here}; set {wanted}"
            ) from error
        if (
            found.head
            and found.class_names
            and found.class_names != getattr(unwrap(model), "class_names", None)
        ):
            raise UserError(
                f"{error}; or take its adapter without the head: `fedlora export {source} FOLDER`, remove "
                f"{HEAD_FILE} and manifest.json there, and start from FOLDER"
            ) from error
        raise


def adapter_identity(source: str | Path) -> dict[str, str]:
    """Return the path of an adapter and the SHA-256 of its weights, for a run's records."""
    folder = adapter_folder(source)
    path = next((folder / name for name in (ADAPTER_FILE, HEAD_FILE) if (folder / name).is_file()), folder)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": os.path.abspath(source), "sha256": digest}


def _differing_settings(model: nn.Module, found: AdapterFile) -> list[tuple[str, Any, Any]]:
    """Return (setting, in the file, in the model) of what makes an adapter another one."""
    mine = lora_config_of(model) or LoRAConfig()
    if found.lora_config is not None:
        theirs = found.lora_config
        return [
            (key, _shown(getattr(theirs, key)), _shown(getattr(mine, key)))
            for key in LoRAConfig.model_fields
            if key not in _WITHOUT_EFFECT and getattr(theirs, key) != getattr(mine, key)
        ]
    if found.peft_config is None:
        return []
    here = {name for name in adapter_parameters(model) if not name.startswith("head.")}
    pairs = [
        (key, getattr(found.peft_config, key), getattr(mine, key))
        for key in ("r", "lora_alpha", "use_rslora")
    ]
    pairs.append(("target_modules", _leaves(set(found.state)), _leaves(here)))
    return [(key, _shown(theirs), _shown(ours)) for key, theirs, ours in pairs if theirs != ours]


def _leaves(names: set[str]) -> list[str]:
    """Return the last parts of the names of adapted layers, sorted."""
    modules = (name.rsplit(".", 2)[0] for name in names if factor_of(name) is not None)
    return sorted({module.rpartition(".")[2] for module in modules})


def _shown(value: Any) -> str:
    """Write a setting as it stands on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)

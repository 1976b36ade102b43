"""Thin doors for scripts and notebooks: build a model from a config, keep configs and models in folders.

A run builds its models in `federated.rounds.build`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ValidationError
from torch import nn

from lora.adapter_files import CONFIG_FILE, FULL_FILE, HEAD_FILE, AdapterFile, num_head_classes, read_adapter
from lora.adapter_saving import save_lora_adapters
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.conversion import base_named_in, is_pt
from lora.loading import load_full_checkpoint, load_lora_adapters
from lora.start_adapter import start_from_adapter
from lora.vqa_wrapper import VQALoRAWrapper
from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.files import write_text
from models.shipped_configs import find_config
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text
from models.vqa import FederatedVQAModel

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
MODEL_TYPES = ("clip", "clip_lora", "vqa", "vqa_lora")


def quick_clip_lora(  # noqa: PLR0913 - the documented signature; all but four are keyword-only
    model_name: str = DEFAULT_MODEL,
    num_classes: int = 10,
    r: int = 16,
    lora_alpha: float = 32,
    *,
    lora_dropout: float = 0.1,
    target_modules: Sequence[str] | None = None,
    target_components: Sequence[str] = ("encoder",),
    lora_r: int | None = None,
    seed: int = 0,
    **model_options: Any,
) -> CLIPLoRAWrapper:
    """A CLIP with adapters in one call.

    Args:
        model_name: "tiny", a hub name, a local folder or "open_clip:<architecture>".
        num_classes: Classes of the head.
        r: Rank.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Dropout on the adapters' input.
        target_modules: Layers to adapt; the backend's default if left out.
        target_components: Any of "encoder", "vision", "text", "classifier".
        lora_r: Another name of `r`.
        seed: Seeds the draw of lora_A.
        **model_options: Further arguments of FederatedCLIPModel, such as class_names or pretrained.
    """
    config = LoRAConfig(
        r=r if lora_r is None else lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=None if target_modules is None else list(target_modules),
        target_components=list(target_components),
    )
    options = {"strategy": "lora", "seed": seed, **model_options}
    model = FederatedCLIPModel(model_name, num_classes, **options)
    return CLIPLoRAWrapper(model, config, seed=seed).apply_lora_to_federated_model()


def create_model(config: Any, **model_options: Any) -> nn.Module:
    """Build the model that a configuration describes.

    Args:
        config: With sections `model` (type, model_name, num_classes, ...), `lora` and `task`; other sections
            are not looked at. A mapping, an object with attributes, a loaded configuration, the path of a
            YAML file, or the name of a shipped configuration.
        **model_options: Further arguments of the model, such as class_names.

    Returns:
        A FederatedCLIPModel for `model.type: clip`, an applied CLIPLoRAWrapper for `clip_lora`; a
        FederatedVQAModel for `vqa`, an applied VQALoRAWrapper for `vqa_lora`.

    Raises:
        UserError: an unknown type or key, with the nearest valid one.
    """
    tree = _read_yaml(find_config(config)) if isinstance(config, str | Path) else _plain(config)
    if not isinstance(tree, dict):
        raise UserError(
            f"a {type(config).__name__} is no configuration; give sections, a YAML file or a name"
        )
    section = {key: value for key, value in (tree.get("model") or {}).items() if value not in (None, {})}
    adapter = section.pop("adapter", None)
    model_type = section.pop("type", "clip_lora")
    if model_type not in MODEL_TYPES:
        raise UserError(f"model.type {model_type!r} is unknown; valid are {', '.join(MODEL_TYPES)}")
    family, adapted = model_type.removesuffix("_lora"), model_type.endswith("_lora")
    build, wrap = _BUILT[family]
    task = dict(tree.get("task") or {})
    if family == "vqa":
        task = {key: value for key, value in task.items() if key not in ("name", "templates")}
        section |= section.pop("options", {})
        section.setdefault("fine_tuning", "full")
    options = _model_options(section, task, build, uses_adapters=adapted)
    seed = int(tree.get("seed", 0))
    model = build(**{"seed": seed, **options, **model_options})
    if not adapted:
        return model
    lora = tree.get("lora")
    settings = None if family == "vqa" and not lora else _lora_config(lora or {}, "lora")
    wrapper = wrap(model, settings, seed=seed).apply_lora_to_federated_model()
    if adapter is not None:
        start_from_adapter(wrapper, adapter)
    return wrapper


def load_model_with_lora(
    source: str | Path, model_name: str | None = None, *, check_base: bool = True, **model_options: Any
) -> FederatedCLIPModel:
    """Build the base model of an adapter and put the adapter on it, ready to encode and to evaluate.

    Args:
        source: An adapter folder, or a `.pt` file of a documented layout (`lora.conversion`).
        model_name: The base model, where the adapter does not name it; ViT-B/32 if nothing says.
        check_base: Refuse a base model that the adapter was not trained on.
        **model_options: Further arguments of FederatedCLIPModel, such as device or class_names.

    Returns:
        The model in eval mode; with a head where the adapter brings one.

    Raises:
        UserError: The file is missing or damaged, or does not go with the model.
    """
    path = Path(source)
    found = AdapterFile(path, {}, base_model=base_named_in(path)) if is_pt(path) else read_adapter(path)
    num_classes, names = num_head_classes(found), found.class_names
    if names is not None and len(names) != num_classes:
        raise UserError(f"{path} has a head for {num_classes} classes and names {len(names)}; copy it again")
    task = "classification" if num_classes else "zero_shot"
    options: dict[str, Any] = {"class_names": names, "task": task, "strategy": "lora", **model_options}
    model = FederatedCLIPModel(model_name or found.base_model or DEFAULT_MODEL, num_classes or 2, **options)
    load_lora_adapters(model, path, check_base=check_base)
    return model.eval()


class LoRAConfigManager:
    """LoRA configurations by name, one YAML file each."""

    def __init__(self, root: str | Path = "./lora_configs") -> None:
        """Keep the files in `root`, which is made when something is saved."""
        self.root = Path(root)

    def save_config(self, config: LoRAConfig, name: str) -> Path:
        """Write a configuration; an older one of the same name is replaced."""
        path = self.root / f"{_checked(name)}.yaml"
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return path

    def load_config(self, name: str) -> LoRAConfig:
        """Read a configuration.

        Raises:
            UserError: no such name (the message lists the known ones), or the file is not valid.
        """
        path = self.root / f"{_checked(name)}.yaml"
        if not path.is_file():
            raise UserError(f"no LoRA configuration {name!r} in {self.root}; known are {self.list_configs()}")
        return _lora_config(_read_yaml(path), str(path))

    def list_configs(self) -> list[str]:
        """Names of the saved configurations, sorted."""
        return sorted(path.stem for path in self.root.glob("*.yaml"))


class LoRAModelManager:
    """Saved models by name, one folder each, in the formats of `lora.adapter_saving`."""

    def __init__(self, root: str | Path = "./lora_models") -> None:
        """Keep the models in `root`, which is made when something is saved."""
        self.root = Path(root)

    def save_model(
        self,
        model: nn.Module,
        name: str,
        *,
        server_round: int | None = None,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Write adapters and head; with `save_only_trainable: false` every weight as well."""
        folder = self.root / _checked(name)
        full = not getattr(model, "lora_config", LoRAConfig()).save_only_trainable
        save_lora_adapters(model, folder, server_round=server_round, epoch=epoch, metrics=metrics, full=full)
        return folder

    def load_model(self, name: str, model: nn.Module) -> nn.Module:
        """Load a saved model into `model` and return it: every weight if saved, else adapters and head.

        Raises:
            UserError: no such name (the message lists the known ones), or it does not fit the model.
        """
        folder = self._folder(name)
        if (folder / FULL_FILE).is_file():
            load_full_checkpoint(model, folder)
        else:
            load_lora_adapters(model, folder)
        return model

    def get_model_info(self, name: str) -> dict[str, Any]:
        """What is known about a saved model, from its files: base model, config, metrics, sizes."""
        folder = self._folder(name)
        found = read_adapter(folder)
        state = {**found.state, **found.head}
        details = {
            key: found.metadata[key] for key in ("server_round", "epoch", "metrics") if key in found.metadata
        }
        return {
            "name": name,
            "path": str(folder),
            "base_model": found.base_model,
            "lora_config": None if found.lora_config is None else found.lora_config.model_dump(mode="json"),
            "num_parameters": sum(tensor.numel() for tensor in state.values()),
            "size_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
            "has_head": bool(found.head),
            "is_full": (folder / FULL_FILE).is_file(),
            **details,
        }

    def list_models(self) -> list[str]:
        """Names of the saved models, sorted."""
        marks = (CONFIG_FILE, HEAD_FILE)
        return sorted({path.parent.name for mark in marks for path in self.root.glob(f"[!.]*/{mark}")})

    def _folder(self, name: str) -> Path:
        folder = self.root / _checked(name)
        if not folder.is_dir():
            raise UserError(f"no saved model {name!r} in {self.root}; known are {self.list_models()}")
        return folder


def _plain(config: Any) -> Any:
    """Mappings, loaded configurations and objects with attributes as dicts; other values as they are."""
    if isinstance(config, BaseModel):
        return config.model_dump(mode="json")
    if isinstance(config, Mapping) or type(config).__module__ != "builtins" and hasattr(config, "__dict__"):
        values = config if isinstance(config, Mapping) else vars(config)
        return {str(key): _plain(value) for key, value in values.items()}
    return config


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(f"{name!r} cannot be a file name; use letters, digits, '_', '-' and '.'")
    return name


def _read_yaml(path: Path) -> dict[str, Any]:
    tree = parse_yaml(read_text(path, MOST_YAML_BYTES), path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping, not {type(tree).__name__}")
    return tree


def _lora_config(tree: Mapping[str, Any], source: str) -> LoRAConfig:
    try:
        return LoRAConfig(**tree)
    except ValidationError as error:
        lines = [_explained(source, detail) for detail in error.errors()]
        raise UserError("; ".join(lines)) from error


def _explained(source: str, detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    near = difflib.get_close_matches(key, LoRAConfig.model_fields, n=1)
    hint = f" (did you mean {near[0]}?)" if near and detail["type"] == "extra_forbidden" else ""
    return f"{source}: {key}: {detail['msg']}{hint}"


_BUILT: dict[str, tuple[Any, Any]] = {
    "clip": (FederatedCLIPModel, CLIPLoRAWrapper),
    "vqa": (FederatedVQAModel, VQALoRAWrapper),
}
"""Model family -> its model and wrapper."""


def _model_options(
    section: dict[str, Any], task: dict[str, Any], build: Any, *, uses_adapters: bool
) -> dict[str, Any]:
    """Arguments of a model from the `model` and `task` sections of a configuration."""
    renamed = {"fine_tuning": "strategy"}
    options = {renamed.get(key, key): value for key, value in section.items()}
    options |= {"task" if key == "name" else key: value for key, value in task.items()}
    if isinstance(options.get("dtype"), str):
        options["dtype"] = getattr(torch, options["dtype"], options["dtype"])
    if uses_adapters:
        options["strategy"] = "lora"
    valid = [name for name in inspect.signature(build.__init__).parameters if name != "self"]
    for key in options:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(valid)}"
            raise UserError(f"model: unknown key {key!r}{hint}")
    return options

"""What ``fedlora doctor`` finds out: versions, devices, and whether the parts work here, in seconds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from federated.config.config_files import load_config, shipped_names
from lora.adapter_saving import save_lora_adapters
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.factory import create_model, load_model_with_lora, quick_clip_lora
from lora.verify import check_lora_injection, verify_gradients
from models.clip import FederatedCLIPModel
from models.errors import UserError

NEEDED = ("torch", "transformers", "peft", "flwr", "datasets", "safetensors", "pydantic")
EXTRAS = {"faiss": "faiss-cpu", "open_clip": "open_clip_torch", "ray": "ray", "tensorboard": "tensorboard"}
"""Module -> distribution of what may be missing."""
CLOSE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line of the check.

    Attributes:
        name: What was looked at.
        ok: Whether it works.
        detail: What was found, or why it does not work.
    """

    name: str
    ok: bool
    detail: str


def versions() -> list[Finding]:
    """Return Python, fedlora and the packages it needs, then those it can use."""
    found = [Finding("python", True, f"{platform.python_version()} on {platform.platform()}")]
    for name in ("fedlora", *NEEDED):
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "missing: install fedlora again"))
    for module, distribution in EXTRAS.items():
        there = find_spec(module) is not None
        detail = _version(distribution) if there else "not installed (optional)"
        found.append(Finding(module, True, detail))
    return found


def devices() -> list[Finding]:
    """Return the processor and every accelerator that torch can use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [Finding("cpu", True, f"{cores} cores, {torch.get_num_threads()} threads of torch")]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(Finding(f"cuda:{number}", True, f"{about.name}, {about.total_memory / 1e9:.1f} GB"))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", True, "Apple's graphics processor"))
    return found


def self_check() -> list[Finding]:
    """Try configurations, wrapper, factory and CLIP with the bundled model; nothing is left behind."""
    checks: dict[str, Callable[[], str]] = {
        "configurations": _check_configs,
        "wrapper": _check_wrapper,
        "factory": _check_factory,
        "CLIP integration": _check_clip,
    }
    found = []
    for name, check in checks.items():
        try:
            found.append(Finding(name, True, check()))
        except (
            UserError,
            AssertionError,
            RuntimeError,
            ImportError,
            OSError,
            ValueError,
            TypeError,
        ) as error:
            found.append(Finding(name, False, f"{type(error).__name__}: {error}"))
    return found


def _check_configs() -> str:
    names = shipped_names()
    for name in names:
        load_config(name)
    presets = (LoRAConfig(), LoRAConfig.for_clip_model(), LoRAConfig.for_classification_head())
    _require(len(names) > 0 and all(preset.enabled for preset in presets), "no configuration is shipped")
    return f"{len(names)} shipped, {len(presets)} presets"


def _check_wrapper() -> str:
    model = FederatedCLIPModel("tiny", 3)
    wrapper = CLIPLoRAWrapper(model, LoRAConfig(r=4), ["vision"]).apply_lora_to_federated_model()
    images, labels = _images(), torch.tensor([0, 1, 2, 0])
    first = wrapper.train_step(images, labels, learning_rate=1e-3)
    gradients = verify_gradients(wrapper)
    _require(bool(gradients), str(gradients))
    injected = check_lora_injection(wrapper)
    _require(bool(injected), str(injected))
    last = [wrapper.train_step(images, labels) for _ in range(5)][-1]
    _require(last < first, f"the loss rose from {first:.3f} to {last:.3f} on the batch it trained on")
    parameters = wrapper.get_parameters()
    wrapper.set_parameters(parameters)
    return f"loss {first:.3f} → {last:.3f} in six steps, {sum(p.size for p in parameters):,} values travel"


def _check_factory() -> str:
    section = {"type": "clip_lora", "model_name": "tiny", "num_classes": 3}
    built = create_model({"model": section, "lora": {"r": 2, "target_components": ["vision"]}})
    quick = quick_clip_lora("tiny", 3, r=2, target_components=["vision"])
    _require(type(built) is type(quick), f"{type(built).__name__} and {type(quick).__name__}")
    return "create_model and quick_clip_lora agree"


def _check_clip() -> str:
    model = FederatedCLIPModel("tiny", task="zero_shot", strategy="lora")
    before, images = model.encode_text(["a dress"]), _images()
    model.apply_lora_to_text_encoder(r=4)
    state = {name: tensor + 0.01 for name, tensor in model.get_lora_state_dict().items()}
    model.load_lora_state_dict(state)
    after = model.encode_text(["a dress"])
    _require(not torch.allclose(after, before, atol=CLOSE), "the adapters change nothing")
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model_with_lora(save_lora_adapters(model, f"{folder}/adapter"))
        _require(torch.allclose(loaded.encode_text(["a dress"]), after, atol=CLOSE), "saving lost something")
    model.merge_lora()
    _require(torch.allclose(model.encode_text(["a dress"]), after, atol=10 * CLOSE), "merging changes it")
    return f"images {tuple(model.encode_image(images).shape)}; adapters save, load and merge"


def _images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # (B, 3, H, W)


def _require(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise UserError(otherwise)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def examine() -> dict[str, list[Finding]]:
    """Return titled findings: versions, devices, self-check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"Versions": versions(), "Devices": devices(), "Self-check": self_check()}

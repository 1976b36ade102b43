"""The card (README.md) of an exported model: what it is, how well it did, how to use it, how it was trained.

It names no place on the machine that trained it. Its code runs as it stands in the exported folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from federated.config.schema import ExperimentConfig
from federated.results.records import RunRecord
from federated.results.report_cards import subtitle
from federated.results.wording import format_bytes, format_metric, metric_label
from models.clip import FederatedCLIPModel

_MERGED = """\
import torch
from transformers import AutoProcessor, CLIPModel

folder = "."  # this folder
clip = CLIPModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
"""

_ADAPTER = """\
import torch
from peft import PeftModel
from transformers import AutoProcessor, CLIPModel

folder = "."  # this folder
base = {base}{remark}
clip = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder).eval().base_model.model
processor = AutoProcessor.from_pretrained(base)
"""

_IMAGES = '''

def image_features(images):
    """Unit vectors of PIL images, (N, D)."""
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)  # transformers 5, or before
    return torch.nn.functional.normalize(features, dim=-1)
'''

_CLASSIFY = '''

with safe_open(f"{folder}/classifier.safetensors", "pt") as file:
    class_names = json.loads(file.metadata()["class_names"])
    weight, bias = file.get_tensor("weight"), file.get_tensor("bias")


def class_logits(images):
    """Logits of the classes for PIL images, (N, C)."""
    with torch.no_grad():
        return clip.logit_scale.exp() * image_features(images) @ weight.T + bias
'''

_TEXTS = '''

def text_features(texts):
    """Unit vectors of texts, (M, D)."""
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = clip.get_text_features(**tokens)
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features, dim=-1)


def similarities(images, texts):
    """Logits of texts for PIL images, (N, M)."""
    with torch.no_grad():
        return clip.logit_scale.exp() * image_features(images) @ text_features(texts).T
'''

_LOCAL = "  # what this prints: python -c 'from models.clip_loading import TINY_FOLDER; print(TINY_FOLDER)'"


@dataclass(frozen=True, eq=False)
class CardFacts:
    """What a card is made of.

    Attributes:
        model: The model, for its names, classes and task.
        merged: Whether the folder holds the whole model.
        record: The run's files; None for an adapter by itself.
        config: The run's settings; likewise.
        metadata: Of the file of the weights: server_round or epoch, metrics.
    """

    model: FederatedCLIPModel
    merged: bool
    record: RunRecord | None
    config: ExperimentConfig | None
    metadata: Mapping[str, Any]


def model_card(facts: CardFacts) -> str:
    """Return the card, Markdown after a header that the hub reads."""
    name = "adapter" if facts.record is None else facts.record.name
    header = {
        "library_name": "transformers" if facts.merged else "peft",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "lora", "federated-learning", "fedlora"],
    }
    base = facts.model.model_name
    if _is_hub_name(base):
        header["base_model"] = base
    kind = "its LoRA adapters merged into the weights" if facts.merged else "a LoRA adapter for it"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{_base_in_words(base)}, fine-tuned by fedlora: {kind}.\n",
        *_figures(facts),
        "## Use\n",
        *_usage(facts),
        *_classes(facts),
        *_settings(facts),
    ]
    return "\n".join(parts)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "~", "open_clip:"))


def _base_in_words(name: str) -> str:
    if name == "tiny":
        return "The small CLIP that fedlora bundles"
    return f"The CLIP `{name if _is_hub_name(name) else Path(name).name}`"


def _figures(facts: CardFacts) -> Iterator[str]:
    """Yield the table of what was reached and sent."""
    metadata, record = facts.metadata, facts.record
    rows = []
    before = None if record is None else record.headline["zero_shot"]
    for metric, value in dict(metadata.get("metrics") or {}).items():
        if record is not None and metric == record.metric and before is not None and record.kind.has_clients:
            rows.append((f"{metric_label(metric)} before training", format_metric(metric, before)))
        rows.append((metric_label(metric), format_metric(metric, value)))
    for key in ("server_round", "epoch"):
        if metadata.get(key) is not None:
            rows.append((f"weights after {key.replace('server_', '')}", str(metadata[key])))
    if record is not None and record.kind.has_clients:
        rows.append(("sent in the whole run", format_bytes(record.ledger.total().wire_bytes)))
    if rows:
        yield "| figure | value |\n|---|---|"
        yield from (f"| {label} | {value} |" for label, value in rows)
        yield "\nThe figures are on the test rows of the run's own data.\n"


def _usage(facts: CardFacts) -> Iterator[str]:
    """Yield how to load it and what to do with it, as code."""
    model = facts.model
    if model.model_name.startswith("open_clip:"):
        yield (
            "The adapter is for the torch module that `open_clip.create_model_and_transforms` returns for "
            f"`{model.model_name.removeprefix('open_clip:')}`: "
            "`peft.PeftModel.from_pretrained(module, folder)`.\n"
        )
        return
    remark = (
        "" if _is_hub_name(model.model_name) else _LOCAL if model.model_name == "tiny" else "  # its folder"
    )
    base = model.model_name if _is_hub_name(model.model_name) else f"path/to/{Path(model.model_name).name}"
    load = (
        _MERGED if facts.merged else _ADAPTER.format(base=json.dumps(base, ensure_ascii=False), remark=remark)
    )
    if model.task.reads_captions or model.class_names is None:
        yield f"```python\n{load}{_IMAGES}{_TEXTS}```\n"
        return
    imports = "import json\n\n"
    load = load.replace("import torch\n", f"{imports}import torch\n", 1)
    load = load.replace("from transformers", "from safetensors import safe_open\nfrom transformers", 1)
    yield f"```python\n{load}{_IMAGES}{_CLASSIFY}```\n"
    if model.task.uses_head:
        yield (
            "The classes have a trained linear head, `classifier.safetensors`; its rows stand in the space "
            "of the features. `CLIPModel` alone does not use it: class prompts give other logits.\n"
        )
    else:
        prompts = ", ".join(f"`{template}`" for template in model.templates)
        yield (
            f"The rows of `classifier.safetensors` are the text features of the class names in {prompts}, "
            "averaged over the prompts and of length 1; the features of other texts classify likewise.\n"
        )


def _classes(facts: CardFacts) -> Iterator[str]:
    names = facts.model.class_names
    if names is not None and not facts.model.task.reads_captions:
        yield f"Classes, in order: {', '.join(f'`{name}`' for name in names)}.\n"


def _settings(facts: CardFacts) -> Iterator[str]:
    """Yield how it was trained: the settings without places on this machine."""
    if facts.config is None or facts.record is None:
        return
    tree = facts.config.model_dump(mode="json", exclude_defaults=True, exclude={"output": True})
    for section, key in (("data", "path"), ("model", "adapter"), ("cache", "folder")):
        tree.get(section, {}).pop(key, None)
    name = facts.config.model.model_name
    if "model_name" in tree.get("model", {}) and not _is_hub_name(name):
        tree["model"]["model_name"] = Path(name).name
    tree = _without_places(tree)
    yield "## Training\n"
    yield f"{subtitle(facts.record).replace(name, _base_in_words(name), 1)}.\n"
    yield "Settings that differ from fedlora's defaults:\n"
    yield f"```yaml\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}```\n"


def _without_places(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out absolute paths, which nobody else has."""
    kept = {key: _without_places(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {
        key: value
        for key, value in kept.items()
        if not (isinstance(value, str) and value.startswith(("/", "~")))
    }

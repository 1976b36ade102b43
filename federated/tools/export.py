"""Handing a trained model on: a folder that transformers or PEFT load without this package.

Merged, it is a complete CLIP in the hub's format: weights, configuration, tokenizer, image processor. As an
adapter it holds PEFT's two files, to be put on the base model. Both have a card, and where there are classes

    classifier.safetensors   weight (C, D) and bias (C,) with logits = exp(logit_scale) W f + b on normalised
                             image features f: the trained head, or the embeddings of the class prompts; the
                             metadata name the classes and the prompts
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from federated.config.config_files import load_config
from federated.results.records import read_run
from federated.results.run_place import check_place
from federated.rounds.trained_record import TrainedRecord
from federated.tools.model_card import CardFacts, model_card
from federated.tools.trained_models import CLASSIFIER_FILE, OpenedModel, open_model, record_of_adapter
from lora.adapter_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FILES,
    FULL_FILE,
    HEAD_FILE,
    read_adapter,
    read_full_checkpoint,
)
from lora.base_delta_file import BASE_DELTA_FILE
from lora.switching import merge_and_unload
from models.clip import FederatedCLIPModel
from models.clip_loading import without_progress_bar
from models.committed_folders import MANIFEST_FILE, committed_folder
from models.errors import UserError
from models.files import write_text
from models.hub_tokenizer import HubTokenizer
from models.image_settings import read_image_settings
from models.state import save_state
from models.untrusted import read_json

CARD_FILE = "README.md"
_EXPORTED = "exported"


def export_model(
    source: str | Path, folder: str | Path, *, merge: bool = False, overwrite: bool = False
) -> Path:
    """Write a run's model as a folder for transformers, or its adapter as a folder for PEFT.

    Args:
        source: A run folder, one of its adapters (``RUN/adapter_best``), or an adapter that names its base.
        folder: What to write.
        merge: Write the whole model, adapters merged; otherwise the adapter alone.
        overwrite: Replace an earlier export there.

    Returns:
        The folder.

    Raises:
        UserError: The source has no model to hand on, the form does not hold all of it, or the folder is
            taken.
    """
    folder = Path(folder)
    _check_target(folder, overwrite=overwrite)
    opened = open_model(source)
    if opened.adapter is None:
        raise UserError(f"{source} is a plain model: there is nothing trained to export; give a run's folder")
    trained = Path(opened.adapter)
    if merge:
        _check_can_merge(opened)
    else:
        _check_is_adapter(trained, source)
    facts = _facts(opened, merged=merge)
    merge_and_unload(opened.model)
    with _export_folder(folder, record_of_adapter(trained), merged=merge) as fresh:
        if merge:
            _write_merged(opened.model, fresh)
        else:
            for name in (CONFIG_FILE, ADAPTER_FILE, HEAD_FILE):
                if (trained / name).is_file():
                    shutil.copyfile(trained / name, fresh / name)
        _write_classifier(opened.model, fresh)
    write_text(folder / CARD_FILE, model_card(facts))
    return folder


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Make sure that nothing is there, or an earlier export that may be replaced."""
    check_place(folder, "name another folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    manifest = folder / MANIFEST_FILE
    tree = read_json(manifest) if manifest.is_file() else None
    if not isinstance(tree, dict) or _EXPORTED not in (tree.get("notes") or {}):
        raise UserError(f"{folder} exists and is no export: it is not replaced; name another folder")
    if not overwrite:
        raise UserError(f"{folder} already exists: pass --overwrite to replace it, or name another folder")


def _check_can_merge(opened: OpenedModel) -> None:
    if not isinstance(opened.model.tokenize, HubTokenizer):
        raise UserError(
            f"{opened.model.model_name} is no transformers model, so it cannot be written as one; leave "
            "--merge out for the adapter, or train on the model's transformers version"
        )


def _check_is_adapter(trained: Path, source: str | Path) -> None:
    """Refuse what PEFT would load without an error, and be another model."""
    if (trained / BASE_DELTA_FILE).is_file():
        raise UserError(
            f"{source} merged what it learnt into the base weights ({BASE_DELTA_FILE}), which an adapter "
            "does not hold: export the whole model with --merge"
        )
    if not (trained / CONFIG_FILE).is_file():
        kind = "every weight" if (trained / FULL_FILE).is_file() else "a head"
        raise UserError(
            f"{source} trained {kind} and no adapter inside the CLIP: export the whole model with --merge"
        )


@contextmanager
def _export_folder(folder: Path, record: TrainedRecord, *, merged: bool) -> Iterator[Path]:
    """Yield the folder to fill; its manifest says what it is, without places on this machine."""
    notes: dict[str, Any] = {_EXPORTED: "merged" if merged else "adapter", "seed": record.seed}
    notes["class_names"] = None if record.class_names is None else list(record.class_names)
    with committed_folder(folder, (*FILES, CLASSIFIER_FILE), notes=notes) as fresh:
        yield fresh


def _write_merged(model: FederatedCLIPModel, folder: Path) -> None:
    """Write CLIP, tokenizer and image processor in the hub's format."""
    tokenize = cast(HubTokenizer, model.tokenize)
    tokenize([""])  # read, and checked
    clip: Any = model.clip
    if model.class_names is not None:
        clip.config.id2label = dict(enumerate(model.class_names))
        clip.config.label2id = {name: number for number, name in enumerate(model.class_names)}
    with without_progress_bar():
        clip.save_pretrained(str(folder))
    for weights in folder.glob("*.safetensors"):  # written for their owner alone
        weights.chmod((folder / "config.json").stat().st_mode)
    tokenize.tokenizer.save_pretrained(str(folder))
    settings = read_image_settings(
        model.model_name,
        tokenize.source,
        model.image_size,
        pretrained=model.pretrained,
        local_only=tokenize.local_only(tokenize.source),
        cache_dir=tokenize.cache_dir,
    )
    settings.save_pretrained(str(folder))


@torch.no_grad()
def _write_classifier(model: FederatedCLIPModel, folder: Path) -> None:
    """Write the head, or the embeddings of the class prompts, where the model knows classes."""
    weight: torch.Tensor
    bias: torch.Tensor
    if isinstance(model.head, nn.Linear):
        weight, bias = model.head.weight, model.head.bias
    elif model.class_names is not None and not model.task.reads_captions:
        weight, bias = model.class_embeddings(), torch.zeros(model.num_classes)
    else:
        return
    about = {"format": "pt", "class_names": json.dumps(model.class_names)}
    about["templates"] = json.dumps(model.templates)
    state = {"weight": weight.detach().float().cpu().contiguous(), "bias": bias.detach().float().cpu()}
    save_state(state, folder / CLASSIFIER_FILE, about)


def _facts(opened: OpenedModel, *, merged: bool) -> CardFacts:
    """Gather what the card says."""
    model, trained = opened.model, Path(cast(str, opened.adapter))
    run = None if opened.run is None else Path(opened.run)
    metadata: Mapping[str, Any] = (
        read_full_checkpoint(trained)[1]
        if (trained / FULL_FILE).is_file()
        else read_adapter(trained).metadata
    )
    return CardFacts(
        model=model,
        merged=merged,
        record=None if run is None else read_run(run),
        config=None if run is None else load_config(run / "config.yaml"),
        metadata=metadata,
    )

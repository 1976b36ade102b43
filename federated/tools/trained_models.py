"""Opening a trained model for use: a run folder, an adapter folder, or a plain model by name.

What a run folder holds decides how it is used: its configuration names the base model and the task,
``adapter/`` the trained part, ``partition.json`` the classes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from federated.communication.run_files import PartitionFile, read_run_file
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.methods import aggregator_from_name
from federated.rounds.build import build_bare_model, usable_device
from federated.rounds.checkpoint import CHECKPOINT_FILES, latest_checkpoint
from federated.rounds.trained_record import TrainedRecord, record_from
from lora.adapter_files import (
    CLASS_NAMES,
    CONFIG_FILE,
    FILES,
    FULL_FILE,
    HEAD_FILE,
    names_of_classes,
    read_adapter,
    read_notes,
)
from lora.conversion import base_named_in, is_pt
from lora.factory import load_model_with_lora
from lora.loading import load_full_checkpoint, load_lora_adapters
from models.clip import FederatedCLIPModel
from models.committed_folders import check_committed, current_folder
from models.errors import UserError
from models.federated_model import FederatedModel
from models.tasks import CLIP, TASKS
from models.untrusted import parse_json, read_tensors

log = logging.getLogger(__name__)

CLASSIFIER_FILE = "classifier.safetensors"
"""In what ``fedlora export`` wrote: weight (C, D) and bias (C,) of the classes that its metadata name."""
ADAPTER_FOLDERS = ("adapter", "adapter_best")
"""Where a run keeps the trained part of its last and its best round."""

NAME_AN_ADAPTER = "name an adapter with --adapter, or copy the whole run again"


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model that is ready to be used.

    Attributes:
        model: On its device, in eval mode, with adapters if it has any.
        run: The run folder it came from, absolute; None otherwise.
        adapter: Folder or file of the trained part, absolute; None for a plain model.
        uses_head: Whether the run trained a classification head for ``model.class_names``.
    """

    model: FederatedCLIPModel
    run: str | None = None
    adapter: str | None = None
    uses_head: bool = False

    def __str__(self) -> str:
        """Name it as messages do."""
        if self.run is not None:
            return f"run {self.run}"
        adapter = "without adapter" if self.adapter is None else f"with adapter {self.adapter}"
        return f"model {self.model.model_name} {adapter}"


def open_model(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    base_model: str | None = None,
    device: str = "cpu",
    any_base: bool = False,
) -> OpenedModel:
    """Open a CLIP: a run folder, an adapter folder (or ``.pt`` file), or a model by name.

    Args:
        source: One of them. The ``adapter/`` of a run stands for the run.
        adapter: An adapter to put on a model given by name.
        base_model: The base model of an adapter that does not name it.
        device: Where the model runs.
        any_base: Take an adapter although the base model is not known to be its own.

    Raises:
        UserError: it is none of them, incomplete, does not fit together, or there is no such device.
    """
    path, place = Path(source), usable_device(device, "--device cpu")
    run = run_of(path)
    if run is not None or _is_adapter(path):
        if adapter is not None:
            raise UserError(f"{source} brings its own adapter; leave --adapter out, or give a model's name")
        if run is not None and base_model is not None:
            raise UserError(f"{source} belongs to a run, which names its base model; leave --model out")
        if run is None:
            return _open_adapter(path, base_model, place, any_base=any_base)
        folder = run / (path.name if path != run else "adapter")
        return _open_run(run, place, folder, any_base=any_base)
    if base_model is not None:
        raise UserError(f"{source} is no run and no adapter, so --model {base_model} does not go with it")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{source} is neither a run folder (metrics.jsonl), nor an adapter ({CONFIG_FILE}), nor a model "
            "in the hub's format (config.json)"
        )
    if len(path.parts) > 1 and not path.exists() and path.parent.is_dir():
        raise UserError(f"{source} does not exist; give a run folder, an adapter, or a model's name")
    name = str(path.resolve()) if path.is_dir() else str(source)
    if adapter is not None:
        return _open_adapter(Path(adapter), name, place, any_base=any_base)
    classifier = path / CLASSIFIER_FILE
    if classifier.is_file():
        return _open_exported(name, classifier, place)
    return OpenedModel(FederatedCLIPModel(name, task="zero_shot", strategy="lora", device=place))


def record_of_run(run: Path) -> TrainedRecord:
    """Return what a run folder says of its training: the manifest of its weights, or its older files.

    Raises:
        UserError: ``partition.json`` or ``config.yaml`` cannot be read.
    """
    places = ((latest_checkpoint(run), CHECKPOINT_FILES), (current_folder(run / "adapter"), FILES))
    for folder, files in places:
        notes = check_committed(folder, files, remedy=NAME_AN_ADAPTER)
        if notes:
            return record_from(notes, run)
    config = load_config(run / "config.yaml")
    notes = {"seed": config.seed, "data": config.data.model_dump(mode="json")}
    return record_from({**notes, "class_names": _listed_class_names(run)}, run)


def record_of_adapter(adapter: Path) -> TrainedRecord:
    """Return what an adapter, or a full checkpoint, says of its training: its files, or those of its run.

    Raises:
        UserError: It cannot be read, or is not as it was committed.
    """
    run, folder = run_of(adapter), current_folder(adapter)
    if is_pt(adapter) or not folder.is_dir():
        return TrainedRecord(adapter)
    names, notes = read_notes(folder)
    if not notes and run is not None:
        record = record_of_run(run)
        return record if names is None else replace(record, class_names=names)
    if names is None and not notes and (folder / HEAD_FILE).is_file():
        log.warning("%s does not name its classes: they are taken to be the data's, in their order", adapter)
    return record_from(notes, adapter, names)


def check_names(run: Path, config: ExperimentConfig, names: tuple[str, ...] | None) -> None:
    """Make sure that a run says which classes its classifier knows.

    Raises:
        UserError: It does not; the data's classes may have changed since.
    """
    if names is None and TASKS[config.task.name].uses_head:
        raise UserError(f"{run / 'partition.json'} is missing, which names the classes; copy the whole run")


def run_of(path: Path) -> Path | None:
    """Return the run that a path stands for: itself, or the one whose adapter, last or best, it is."""
    candidates = (path, path.parent) if path.name in ADAPTER_FOLDERS else (path,)
    return next(
        (c for c in candidates if all((c / f).is_file() for f in ("config.yaml", "metrics.jsonl"))), None
    )


def _is_adapter(path: Path) -> bool:
    path = current_folder(path)
    return is_pt(path) or any((path / name).is_file() for name in (CONFIG_FILE, HEAD_FILE))


def _open_run(run: Path, device: torch.device, folder: Path, *, any_base: bool) -> OpenedModel:
    config = load_config(run / "config.yaml")
    if config.model.family != CLIP:
        raise UserError(
            f"{run} holds a model of type {config.model.type}, and this command knows CLIP alone: fedlora "
            f"evaluate {run} writes metrics and predictions, its adapter/ is in PEFT's format"
        )
    folder, model = current_folder(folder), model_of_run(run, folder, device, any_base=any_base)
    assert isinstance(model, FederatedCLIPModel)
    return OpenedModel(
        model,
        run=str(run.resolve()),
        adapter=str(folder.resolve()),
        uses_head=model.task.uses_head,
    )


def model_of_run(
    run: Path,
    folder: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - does not change
    *,
    any_base: bool = False,
) -> FederatedModel:
    """Return the trained model of a run, of any family, in eval mode.

    Args:
        run: The run folder.
        folder: Of the trained part.
        device: Where the model goes.
        any_base: Take the trained part although the base model is not known to be its own.

    Raises:
        UserError: The run did not end, or has no global model, or what it left does not fit together.
    """
    config, folder = load_config(run / "config.yaml"), current_folder(folder)
    if not folder.is_dir():
        raise UserError(f"{run} has no {folder.name}/: the run did not come to its end; let it finish first")
    check_global_model(run, config)
    names = record_of_adapter(folder).class_names
    check_names(run, config, names)
    section = config.model.model_copy(update={"device": str(device)})
    model = build_bare_model(config.model_copy(update={"model": section}), names)
    load_adapter_or_checkpoint(model, folder, any_base=any_base)
    return model.eval()


def load_adapter_or_checkpoint(model: nn.Module, folder: Path, *, any_base: bool = False) -> None:
    """Load every weight where a folder has them, else the adapter and head.

    Raises:
        UserError: the folder is incomplete, or does not belong on this model.
    """
    if (folder / FULL_FILE).is_file():
        load_full_checkpoint(model, folder)
    else:
        load_lora_adapters(model, folder, check_base=not any_base)


def has_global_model(config: ExperimentConfig) -> bool:
    """Return whether a run of this configuration ends with one model, and not with its clients' alone."""
    aggregation = config.aggregation
    return aggregator_from_name(aggregation.name, aggregation.options, seed=config.seed).has_global_model


def check_global_model(run: Path, config: ExperimentConfig) -> None:
    """Refuse a run that left no global model behind.

    Raises:
        UserError: its aggregator leaves complete models to the clients alone.
    """
    if not has_global_model(config):
        raise UserError(
            f"{run} was aggregated by {config.aggregation.name}, where only the clients hold complete "
            "models: it has no global model to use. Run it again with another aggregation.name, "
            "such as fedavg"
        )


def _listed_class_names(run: Path) -> list[str] | None:
    """The classes that a run wrote down beside its partition."""
    path = run / "partition.json"
    return read_run_file(path, PartitionFile).get("class_names") if path.is_file() else None


def _open_adapter(
    folder: Path, base_model: str | None, device: torch.device, *, any_base: bool
) -> OpenedModel:
    name = base_model or (base_named_in(folder) if is_pt(folder) else read_adapter(folder).base_model)
    if not name:
        raise UserError(f"{folder} does not name its base model; give it with --model")
    model = load_model_with_lora(folder, name, device=device, check_base=not any_base)
    return OpenedModel(model, adapter=str(folder.resolve()), uses_head=model.class_names is not None)


def _open_exported(name: str, classifier: Path, device: torch.device) -> OpenedModel:
    """Open a whole model that was exported with the classifier of its run."""
    state, about = read_tensors(classifier)
    keys = (CLASS_NAMES, "templates")
    texts = {key: parse_json(about.get(key, "null").encode(), classifier) for key in keys}
    names = names_of_classes(texts, classifier) or ()
    templates = tuple(map(str, texts["templates"] or ("a photo of a {}.",)))
    model = FederatedCLIPModel(
        name, len(names), class_names=names, templates=templates, strategy="lora", device=device
    )
    assert model.head is not None
    shapes = {key: tuple(value.shape) for key, value in model.head.state_dict().items()}
    if {key: tuple(value.shape) for key, value in state.items()} != shapes:
        raise UserError(f"{classifier} does not fit the model beside it: export the run again")
    model.head.load_state_dict(state)
    return OpenedModel(model.eval(), uses_head=True)

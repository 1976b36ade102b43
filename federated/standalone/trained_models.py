"""Opening a trained model for use: a run folder, an adapter folder, or a plain model by name.

Stands after the rounds. What a run folder holds decides how it is used: its configuration names the base
model and the task, ``adapter/`` the trained part, ``partition.json`` the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from federated.aggregators import aggregator_from_name
from federated.builders import build_model, load_run_data, usable_device
from federated.config import ExperimentConfig, load_config
from federated.run_files import PartitionFile, read_run_file
from lora.checkpoint import CONFIG_FILE, FULL_FILE, HEAD_FILE, AdapterFile, read_adapter
from lora.loading import load_full_checkpoint, load_lora_adapters
from models.clip import FederatedCLIPModel
from models.errors import UserError


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
) -> OpenedModel:
    """Open a run folder, an adapter folder (or ``.pt`` file), or a model by name.

    Args:
        source: One of them. The ``adapter/`` of a run stands for the run.
        adapter: An adapter to put on a model given by name.
        base_model: The base model of an adapter that does not name it.
        device: Where the model runs.

    Raises:
        UserError: it is none of them, incomplete, does not fit together, or there is no such device.
    """
    path, place = Path(source), usable_device(device, "--device cpu")
    run = _run_of(path)
    if run is not None or _is_adapter(path):
        if adapter is not None:
            raise UserError(f"{source} brings its own adapter; leave --adapter out, or give a model's name")
        if run is not None and base_model is not None:
            raise UserError(f"{source} belongs to a run, which names its base model; leave --model out")
        return _open_adapter(path, base_model, place) if run is None else _open_run(run, place)
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
        return _open_adapter(Path(adapter), name, place)
    return OpenedModel(_plain_model(name, 0, place))


def _run_of(path: Path) -> Path | None:
    """The run that a path stands for: itself, or the one whose ``adapter/`` it is."""
    candidates = (path, path.parent) if path.name == "adapter" else (path,)
    return next(
        (c for c in candidates if all((c / f).is_file() for f in ("config.yaml", "metrics.jsonl"))), None
    )


def _is_adapter(path: Path) -> bool:
    return path.suffix in {".pt", ".pth"} or any((path / name).is_file() for name in (CONFIG_FILE, HEAD_FILE))


def _open_run(run: Path, device: torch.device) -> OpenedModel:
    config = load_config(run / "config.yaml")
    folder = run / "adapter"
    if not folder.is_dir():
        raise UserError(f"{run} has no adapter/: the run did not come to its end; let it finish first")
    check_global_model(run, config)
    bare = config.model.model_copy(update={"type": "clip", "fine_tuning": "lora", "device": str(device)})
    model = build_model(config.model_copy(update={"model": bare}), _class_names(run, config))
    assert isinstance(model, FederatedCLIPModel)
    load = load_full_checkpoint if (folder / FULL_FILE).is_file() else load_lora_adapters
    load(model, folder)
    return OpenedModel(
        model.eval(),
        run=str(run.resolve()),
        adapter=str(folder.resolve()),
        uses_head=model.task.uses_head,
    )


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
            "models: it has no global model to use"
        )


def _class_names(run: Path, config: ExperimentConfig) -> tuple[str, ...] | None:
    """The classes that the run wrote down; from its data where it did not."""
    path = run / "partition.json"
    names = read_run_file(path, PartitionFile).get("class_names") if path.is_file() else None
    return tuple(names) if names else load_run_data(config).class_names


def _open_adapter(folder: Path, base_model: str | None, device: torch.device) -> OpenedModel:
    found = read_adapter(folder) if folder.suffix not in {".pt", ".pth"} else AdapterFile(folder, state={})
    name = base_model or found.base_model
    if not name:
        raise UserError(f"{folder} does not name its base model; give it with --model")
    model = _plain_model(name, _num_head_classes(found), device)
    load_lora_adapters(model, folder)
    return OpenedModel(model.eval(), adapter=str(folder.resolve()))


def _plain_model(name: str, num_classes: int, device: torch.device) -> FederatedCLIPModel:
    """A model without class names; with a head only where an adapter file brings one."""
    task = "classification" if num_classes else "zero_shot"
    return FederatedCLIPModel(name, num_classes or 2, task=task, strategy="lora", device=device)


def _num_head_classes(found: AdapterFile) -> int:
    """C of the head in an adapter file; 0 without one."""
    outputs = (found.head.get(name) for name in ("head.weight", "head.lora_B.weight"))
    return next((int(tensor.shape[0]) for tensor in outputs if tensor is not None), 0)

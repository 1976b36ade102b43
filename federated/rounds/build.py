"""From a configuration to the parts of a run: data, model, settings of local training, shards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from federated.communication.codec import Codec, codec_from_name
from federated.config import choices
from federated.config.schema import ADAPTED, ExperimentConfig
from federated.config.seeding import generator
from federated.data.dataset import FederatedData, check_task_data, load_data
from federated.data.names import listed
from federated.data.partition import Partition
from federated.data.row_reader import ReadingSettings
from federated.data.splits import IntArray, hold_out
from federated.rounds.families import FAMILIES, FAMILY, ModelSetup
from lora.gradient_checkpointing import enable_gradient_checkpointing
from lora.second_adapter import add_second_adapter
from lora.start_adapter import start_from_adapter
from lora.wrapper import LoRAWrapper
from models.errors import UserError
from models.federated_model import FederatedModel
from models.tasks import TASKS, tasks_of
from models.training import TrainingSettings


def load_run_data(config: ExperimentConfig) -> FederatedData:
    """Load the data of a configuration, with what its task needs.

    Raises:
        UserError: It is missing or unusable; the message names the file.
    """
    check_family(config)
    section = config.data
    data = load_data(
        section.source,
        path=section.path,
        seed=config.seed,
        validation_fraction=section.validation_fraction,
        max_train_samples=section.max_train_samples,
        max_validation_samples=section.max_validation_samples,
        max_test_samples=section.max_test_samples,
        **own_options("data", section.options, load_data),
    )
    check_task_data(data, config.task.name)
    return data


def own_options(section: str, options: Mapping[str, Any], function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the options of a section that are left to the choice which it names.

    Args:
        section: ``data`` or ``partition``.
        options: As they are configured.
        function: What they are given to, beside what it is told in any case.

    Raises:
        UserError: An option is called as something that the function is told in any case.
    """
    for option in options:
        if option in inspect.signature(function).parameters:
            key = "seed" if option == "seed" else f"{section}.{option}"
            raise UserError(
                f"{section}.options.{option}: {option} is no option of its own here; leave it out, or set "
                f"{key} if there is such a key"
            )
    return options


def build_model(
    config: ExperimentConfig, class_names: tuple[str, ...] | None, *, weights: bool = True
) -> FederatedModel | LoRAWrapper:
    """Build the federated model of a configuration, with adapters when it asks for them.

    Args:
        config: The configuration.
        class_names: Of the data, if it has classes.
        weights: False: shapes alone, on torch's meta device, whatever ``model.device`` is.

    Raises:
        UserError: The task is another family's, the number of classes does not fit the data, or the model
            cannot be had.
    """
    fine_tuning = "lora" if config.uses_adapters else config.model.fine_tuning or "full"
    model = build_bare_model(config, class_names, fine_tuning, weights=weights)
    if config.client.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if not config.uses_adapters:
        return model
    wrapper = FAMILIES[config.model.family].adapt(model, config.lora, config.seed)
    if config.model.adapter is not None and weights:
        start_from_adapter(wrapper, config.model.adapter)
    if config.aggregation.name == "dual":
        add_second_adapter(
            wrapper, config.aggregation.options.get("private_adapter", "private"), seed=config.seed + 1
        )
    return wrapper


def build_bare_model(
    config: ExperimentConfig,
    class_names: tuple[str, ...] | None,
    fine_tuning: str = "lora",
    *,
    weights: bool = True,
) -> FederatedModel:
    """Build the federated model of a configuration before adapters are put into it.

    Args:
        config: The configuration.
        class_names: Of the data, if it has classes.
        fine_tuning: What trains and travels; "lora": what adapters will bring.
        weights: As for ``build_model``.

    Raises:
        UserError: As ``build_model``.
    """
    section, task = config.model, TASKS[config.task.name]
    if section.num_classes and class_names and section.num_classes != len(class_names):
        raise UserError(
            f"model.num_classes is {section.num_classes} but the data has {len(class_names)} classes "
            f"({listed(map(repr, class_names))}): set model.num_classes=null (the data's number), or "
            "correct it"
        )
    check_family(config)
    setup = ModelSetup(
        task=task,
        num_classes=section.num_classes or len(class_names or ()) or 2,
        class_names=class_names,
        model_name=section.model_name,
        pretrained=section.pretrained,
        cache_dir=section.cache_dir,
        fine_tuning=fine_tuning,
        train_head=config.task.train_head,
        templates=config.task.templates,
        background=config.data.background,
        device=usable_device(section.device, "model.device=cpu") if weights else torch.device("meta"),
        dtype=getattr(torch, section.dtype),
        seed=config.seed,
        keeps_class_embeddings=config.cache.class_embeddings,
        trims_prompts=config.cache.trim_prompts,
    )
    build = FAMILIES[section.family].build
    if not section.options and not choices.options_of(build).model_fields:
        return build(setup)  # what it refuses is no option
    return choices.build({section.family: build}, FAMILY, section.family, section.options, setup)


def check_family(config: ExperimentConfig) -> None:
    """Refuse a task of another model family.

    Raises:
        UserError: Says which tasks the family takes.
    """
    family, task = config.model.family, TASKS[config.task.name]
    if task.family != family:
        raise UserError(
            f"task.name={task.name} goes with model.type={task.family}, and model.type={config.model.type} "
            f"takes {', '.join(tasks_of(family)) or 'no registered task'}: set task.name, or "
            f"model.type={task.family}{ADAPTED if config.uses_adapters else ''}"
        )


def reading_settings(config: ExperimentConfig) -> ReadingSettings:
    """Return the settings of reading rows."""
    return ReadingSettings(
        batch_size=config.client.batch_size,
        cache_bytes=config.data.cache_bytes,
        caches=config.cache,
        augmentation=config.client.augmentation,
    )


def usable_device(name: str, remedy: str) -> torch.device:
    """Return the device of that name.

    Args:
        name: As torch spells it, ``cpu`` or ``cuda:1``.
        remedy: What to write for the CPU, where the name was written.

    Raises:
        UserError: There is no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here ({reason}); take {remedy}") from error
    return device


def training_settings(config: ExperimentConfig) -> TrainingSettings:
    """Return the settings of local training."""
    client = config.client
    return TrainingSettings(
        learning_rate=client.learning_rate,
        weight_decay=client.weight_decay,
        optimizer=client.optimizer,
        momentum=client.momentum,
        warmup_steps=client.warmup_steps,
        warmup_ratio=client.warmup_ratio,
        schedule=client.schedule,
        clip_norm=client.clip_norm,
        micro_batch_size=client.micro_batch_size,
        precision=client.precision,
    )


@dataclass(frozen=True)
class ClientSettings:
    """What clients need of a configuration beside ``TrainingSettings``.

    Attributes:
        seed: Of the run.
        local_steps: Optimizer steps a round.
        batch_size: Rows a step.
        uplink: Encodes what clients send.
        downlink: Decodes what they receive.
        error_every: Rounds between measurements of the aggregation error; 0: never.
    """

    seed: int
    local_steps: int
    batch_size: int
    uplink: Codec
    downlink: Codec
    error_every: int


def client_settings(config: ExperimentConfig) -> ClientSettings:
    """Return the settings of the run's clients."""
    return ClientSettings(
        seed=config.seed,
        local_steps=config.client.local_steps,
        batch_size=config.client.batch_size,
        uplink=codec_from_name(config.communication.uplink),
        downlink=codec_from_name(config.communication.downlink),
        error_every=config.evaluation.aggregation_error_every,
    )


@dataclass(frozen=True)
class Shard:
    """One client's rows of the training data.

    Attributes:
        train: Rows it trains on.
        test: Rows it keeps for its own evaluation.
    """

    train: IntArray
    test: IntArray


def split_shards(config: ExperimentConfig, data: FederatedData, split: Partition) -> tuple[Shard, ...]:
    """Set each client's own test rows apart from those it trains on; a concept or picture stays whole."""
    fraction = config.partition.local_test_fraction
    labels = data.labels() if data.label_column else None
    groups = data.groups()
    shards = []
    for client_id, rows in enumerate(split.indices):
        rng = generator(config.seed, "hold-out", client_id)
        train, test = hold_out(rows, fraction, rng, labels, groups=groups)
        shards.append(Shard(train, test))
    return tuple(shards)

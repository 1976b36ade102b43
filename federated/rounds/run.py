"""An experiment: the model, the data and the shards that a configuration describes, built once a process.

Server and clients of one process ask for it by the text of the configuration and get the same object, so that
one frozen base model serves all simulated clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from federated.communication.savings import ModelSizes
from federated.config.augmentation_options import Augmentation
from federated.config.schema import ExperimentConfig, load_config, parse_config
from federated.config.seeding import generator
from federated.data.augmented_batches import augment_batch, training_augmentation
from federated.data.dataset import FederatedData, ImageTensors, image_tensors
from federated.data.feature_cache import FeatureCaches, build_feature_caches
from federated.data.partition import Partition, partition, save_partition
from federated.data.splits import IntArray
from federated.methods import Aggregator, ServerState, cut_to_rank
from federated.rounds.base_weights import BaseWeights
from federated.rounds.build import (
    Shard,
    build_model,
    load_run_data,
    own_options,
    split_shards,
    training_settings,
)
from federated.rounds.compatibility import build_aggregator, check_client_ranks
from federated.rounds.trained_record import notes_of
from lora.adapter_files import save_full_checkpoint, save_lora_adapters
from lora.adapters import factor_pairs, scalings, unwrap
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.verify import count_parameters
from models.clip import FederatedCLIPModel
from models.metrics import CONCEPT, PICTURE, TEXT
from models.spare_memory import return_freed_memory
from models.state import Layout, State, layout_of, num_values
from models.training import Batch, TrainingSettings
from models.untrusted import parse_yaml

CONFIG_KEY, OVERRIDES_KEY = "config", "overrides"
"""Keys of Flower's run config: a configuration (name, path or YAML text) and ``key=value`` overrides."""

BYTES_PER_FP32 = 4


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that server and clients share.

    Attributes:
        config: The run's settings.
        model: The federated model, with adapters when the configuration asks for them.
        data: The rows.
        partition: Which client holds which training rows.
        shards: The same, split into training and local test rows.
        train_images: Tensors of the training rows.
        test_images: Tensors of the server's test rows.
        initial_state: What travels, before round 1.
        layout: Names and shapes of ``initial_state``.
        aggregator: How updates are combined, and what follows from that for clients.
        base: The base weights, for aggregators that merge into them.
        scaling: Module -> s, the factor in front of B @ A at the model's rank.
        training_settings: How clients train.
        augmentation: What is done to the images and captions that clients train on.
        caches: What of the frozen towers is computed once.
        prepared: (round, client id) -> gives the result of local training that
            ``federated.engines.batched_clients`` does in groups; empty where clients train one by one.
    """

    config: ExperimentConfig
    model: FederatedCLIPModel | CLIPLoRAWrapper
    data: FederatedData
    partition: Partition
    shards: tuple[Shard, ...]
    train_images: ImageTensors
    test_images: ImageTensors
    initial_state: State
    layout: Layout
    aggregator: Aggregator
    base: BaseWeights
    scaling: Mapping[str, float]
    training_settings: TrainingSettings
    augmentation: Augmentation
    caches: FeatureCaches
    prepared: dict[tuple[int, int], Callable[[], Any]] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.shards)

    @property
    def headline_metric(self) -> str:
        """The metric that the run is judged by."""
        return self.model.task.headline_metric

    @property
    def mixed_ranks(self) -> bool:
        """Whether clients have ranks of their own: given ones, or such as a rule lets fall in training."""
        return self.config.client.ranks is not None or self.aggregator.client.changes_ranks

    def rank_of(self, client_id: int) -> int | None:
        """Return a client's rank before round 1; None where all have the model's for good."""
        if not self.mixed_ranks:
            return None
        state = self.initial_state
        ranks = self.config.client.ranks or [max(state[pair.a].shape[0] for pair in factor_pairs(state))]
        return ranks[client_id % len(ranks)]

    def scaling_at(self, rank: int | None) -> dict[str, float]:
        """Return module -> s of an adapter of another rank: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        if rank is None:
            return dict(self.scaling)
        power = 0.5 if self.config.lora.use_rslora else 1.0
        ranks = {
            pair.module: self.initial_state[pair.a].shape[0] for pair in factor_pairs(self.initial_state)
        }
        return {
            module: s * (ranks[module] / min(rank, ranks[module])) ** power
            for module, s in self.scaling.items()
        }

    @functools.cached_property
    def initial_server_state(self) -> ServerState:
        """The aggregator's state before round 1."""
        return self.aggregator.init(self.initial_state, self.scaling)

    @functools.cached_property
    def downlink_layout(self) -> Layout:
        """Names and shapes of a downlink that carries everything; other downlinks bring their own."""
        return layout_of(self.initial_server_state.state)

    @functools.cached_property
    def exchanged_layout(self) -> Layout:
        """Names and shapes of what clients send in some round: private parts are not among them."""
        state = self.wire_state()
        names = {name for r in (1, 2) for name in self.aggregator.uplink(state, r)}
        return layout_of({name: state[name] for name in sorted(names)})

    def wire_state(self, rank: int | None = None) -> State:
        """Return the wire state of a client of this rank that has received nothing yet."""
        private = {name: self.initial_state[name] for name in self.aggregator.private(self.initial_state)}
        state = {**self.initial_server_state.state, **private}
        return state if rank is None else cut_to_rank(state, rank)

    def exchanged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the live parameters of what travels, by wire name."""
        return self.model.exchanged_parameters

    def reset(self) -> None:
        """Put model and base back to where they were before round 1."""
        self.base.reset()
        self.model.set_state(self.initial_state)

    def num_examples(self, client_id: int) -> int:
        """Return a client's weight: its number of training rows."""
        return len(self.shards[client_id].train)

    def local_batches(
        self, client_id: int, num_steps: int, rng: np.random.Generator, *, server_round: int
    ) -> Iterator[Batch]:
        """Yield the batches of a client's local steps in a round, augmented where the configuration says."""
        images, batch_size = self.train_images, self.config.client.batch_size
        kept = self.caches.serves_images(images, training=True)
        rows = self.shards[client_id].train
        batches = images.local_batches(rows, batch_size, num_steps, rng, pixels=not kept)
        if self.augmentation.changes_anything:
            augment_rng = generator(self.config.seed, "augment", server_round, client_id)
            batches = (augment_batch(batch, self.augmentation, augment_rng) for batch in batches)
        for batch in batches:
            yield self.model_batch(batch, images if kept else None)

    def evaluate_client(self, client_id: int) -> dict[str, float]:
        """Evaluate the model, as it is, on a client's own test rows."""
        return self.evaluate_rows(self.train_images, self.shards[client_id].test)

    def evaluate_server(self) -> dict[str, float]:
        """Evaluate the model, as it is, on the server's test rows, or on one seeded part of them."""
        wanted, rows = self.config.evaluation.max_samples, None
        if wanted is not None and wanted < len(self.test_images):
            rng = generator(self.config.seed, "test rows")
            rows = np.sort(rng.choice(len(self.test_images), size=wanted, replace=False))
        return self.evaluate_rows(self.test_images, rows)

    def model_batch(self, batch: Mapping[str, Any], kept: ImageTensors | None = None) -> Batch:
        """Keep what the model's task reads; captions become tokens.

        Args:
            batch: As ``ImageTensors.batch`` makes it.
            kept: The split that the rows of a batch without pixels are from.
        """
        keys: tuple[str, ...] = ("pixel_values", "labels")
        if self.config.task.name == "retrieval":
            keys = (*keys, CONCEPT, PICTURE, TEXT)
        tensors = {key: batch[key] for key in keys if key in batch}
        if kept is not None:
            tensors |= self.caches.of_images(kept, batch["index"])
        if self.config.task.name == "retrieval":
            tensors |= self.caches.of_texts(batch["captions"])
        return tensors

    def evaluate_rows(self, images: ImageTensors, rows: IntArray | None = None) -> dict[str, float]:
        """Evaluate the model, as it is, on some rows; None: all of them."""
        kept = self.caches.serves_images(images, training=False)
        batches = images.batches(rows, self.config.evaluation.batch_size, rng=None, pixels=not kept)
        return self.model.evaluate(self.model_batch(batch, images if kept else None) for batch in batches)

    def parameter_counts(self) -> dict[str, int]:
        """Return how many parameters there are, train, and travel."""
        counts = count_parameters(self.model)
        return {
            "total": counts["total"],
            "trainable": counts["trainable"],
            "exchanged": num_values(self.exchanged_layout),
        }

    def model_sizes(self) -> ModelSizes:
        """Return what one transfer costs in other ways of training, in fp32 bytes."""
        full = count_parameters(self.model)["base"]  # the head included, adapters not
        head = 0 if self.model.head is None else (self.model.embedding_dim + 1) * self.model.num_classes
        preinstalled = self.config.communication.base_preinstalled
        return ModelSizes(
            full_model_bytes=full * BYTES_PER_FP32,
            head_bytes=head * BYTES_PER_FP32 if head else None,
            base_bytes=0 if preinstalled else (full - head) * BYTES_PER_FP32,
            ships_base=not self.config.uses_adapters and self.config.model.fine_tuning in (None, "full"),
        )

    def save_partition(self, path: Path) -> None:
        """Write ``partition.json``."""
        labels = self.data.labels() if self.data.label_column else None
        save_partition(self.partition, path, labels, self.data.class_names)

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """What the manifests beside the weights say of the run."""
        return notes_of(self.config, self.data)

    def save_adapter(
        self,
        folder: Path,
        *,
        server_round: int,
        final: float,
        products: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Write the global adapter in PEFT's format, or the full model where there are no adapters.

        Args:
            folder: Committed whole.
            server_round: The round that the weights are of.
            final: Its headline metric.
            products: What was merged into each base weight.
        """
        about: dict[str, Any] = {"server_round": server_round, "metrics": {self.headline_metric: final}}
        if self.config.uses_adapters:
            save_lora_adapters(self.model, folder, products=products, notes=self.notes, **about)
        else:
            save_full_checkpoint(self.model, folder, notes=self.notes, **about)


def experiment_of(run_config: Mapping[str, Any]) -> Experiment:
    """Return the experiment that a Flower run config describes; the same object each time in one process.

    Torch's threads follow the configuration here, because Flower's engines call the apps in processes of
    their own, and the number of threads decides the last bits of a result.
    """
    experiment = _cached_experiment(str(run_config[CONFIG_KEY]), str(run_config.get(OVERRIDES_KEY, "")))
    if torch.get_num_threads() != experiment.config.engine.threads:
        torch.set_num_threads(experiment.config.engine.threads)
    return experiment


@functools.lru_cache(maxsize=1)
def _cached_experiment(config: str, overrides: str) -> Experiment:
    if "\n" in config:
        parsed = parse_config(parse_yaml(config, "the run config") or {}, source="the run config")
    else:
        parsed = load_config(config, overrides.split())
    return build_experiment(parsed)


def build_experiment(config: ExperimentConfig, data: FederatedData | None = None) -> Experiment:
    """Load data and model, inject adapters, split the data over clients.

    Args:
        config: The run.
        data: Its rows; loaded when not given.

    Raises:
        UserError: Something the configuration names is missing or does not fit the rest.
    """
    aggregator = build_aggregator(config)  # a wrong name should not come up after minutes of loading
    data = load_run_data(config) if data is None else data
    split = partition(
        data.train,
        name=config.partition.name,
        num_clients=config.partition.num_clients,
        seed=config.seed,
        label_column=data.label_column,
        domain_column=data.domain_column,
        **own_options("partition", config.partition.options, partition),
    )
    model = build_model(config, data.class_names)
    images = {
        name: image_tensors(data, name, model.preprocess, cache_bytes=config.data.cache_bytes)
        for name in ("train", "test")
    }
    initial_state, scaling = model.get_state(), scalings(model)
    augmentation = training_augmentation(
        config.client.augmentation, model.preprocess, captions=config.task.name == "retrieval"
    )
    experiment = Experiment(
        config=config,
        model=model,
        data=data,
        partition=split,
        shards=split_shards(config, data, split),
        train_images=images["train"],
        test_images=images["test"],
        initial_state=initial_state,
        layout=layout_of(initial_state),
        aggregator=aggregator,
        base=BaseWeights(model),
        scaling=scaling,
        training_settings=training_settings(config),
        augmentation=augmentation,
        caches=build_feature_caches(
            unwrap(model), images, config.cache, augmentation, batch_size=config.client.batch_size
        ),
    )
    check_client_ranks(config, aggregator, experiment.initial_server_state)
    return_freed_memory()
    return experiment

"""A run: the model, the data and the shards that a configuration describes, built once a process.

Server and clients of one process are given the same run, so that one frozen base model serves all simulated
clients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from federated.config.schema import ExperimentConfig
from federated.data.dataset import FederatedData
from federated.data.partition import Partition, partition
from federated.data.row_reader import RowReader
from federated.methods import Aggregator, ServerState, cut_to_rank
from federated.rounds.base_weights import BaseWeights
from federated.rounds.build import (
    ClientSettings,
    Shard,
    build_model,
    client_settings,
    load_run_data,
    own_options,
    reading_settings,
    split_shards,
    training_settings,
)
from federated.rounds.client_devices import simulated_clock
from federated.rounds.compatibility import build_aggregator, check_client_ranks
from federated.rounds.families import FAMILIES, ModelFamily
from federated.rounds.trained_record import check_start, notes_of
from lora.adapters import scalings, unwrap
from lora.wrapper import LoRAWrapper
from models.federated_model import FederatedModel
from models.progress import doing
from models.spare_memory import return_freed_memory
from models.state import Layout, State, layout_of
from models.training import TrainingSettings


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that server and clients share.

    Attributes:
        config: The run's settings.
        family: What kind of model it has.
        model: The federated model, with adapters when the configuration asks for them.
        data: The rows.
        partition: Which client holds which training rows.
        shards: The same, split into training and local test rows.
        reader: Makes batches of the rows.
        initial_state: What travels, before round 1.
        layout: Names and shapes of ``initial_state``.
        aggregator: How updates are combined, and what follows from that for clients.
        base: The base weights, for aggregators that merge into them.
        scaling: Module -> s, the factor in front of B @ A at the model's rank.
        clients: What clients draw, decode and encode with.
        training_settings: How their optimizers step.
    """

    config: ExperimentConfig
    family: ModelFamily
    model: FederatedModel | LoRAWrapper
    data: FederatedData
    partition: Partition
    shards: tuple[Shard, ...]
    reader: RowReader
    initial_state: State
    layout: Layout
    aggregator: Aggregator
    base: BaseWeights
    scaling: Mapping[str, float]
    clients: ClientSettings
    training_settings: TrainingSettings

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.shards)

    @property
    def headline_metric(self) -> str:
        """The metric that the run is judged by."""
        return self.model.task.headline_metric

    @functools.cached_property
    def initial_server_state(self) -> ServerState:
        """The aggregator's state before round 1."""
        return self.aggregator.init(self.initial_state, self.scaling)

    @functools.cached_property
    def downlink_layout(self) -> Layout:
        """Names and shapes of a downlink that carries everything; other downlinks bring their own."""
        return layout_of(self.initial_server_state.state)

    def wire_state(self, rank: int | None = None) -> State:
        """Return the wire state of a client of this rank that has received nothing yet."""
        private = {name: self.initial_state[name] for name in self.aggregator.private(self.initial_state)}
        state = {**self.initial_server_state.state, **private}
        return state if rank is None else cut_to_rank(state, rank)

    def reset(self) -> None:
        """Put model and base back to where they were before round 1."""
        self.base.reset()
        self.model.set_state(self.initial_state)

    def num_examples(self, client_id: int) -> int:
        """Return a client's weight: its number of training rows."""
        return len(self.shards[client_id].train)

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """What the manifests beside the weights say of the run."""
        return notes_of(self.config, self.data)


def build_run(config: ExperimentConfig, data: FederatedData | None = None) -> Run:
    """Load data and model, inject adapters, split the data over clients.

    Args:
        config: The run.
        data: Its rows; loaded when not given.

    Raises:
        UserError: Something the configuration names is missing or does not fit the rest.
    """
    aggregator = build_aggregator(config)  # a wrong name should not come up after minutes of loading
    simulated_clock(config)
    with doing("loading data"):
        data = load_run_data(config) if data is None else data
    if config.model.adapter is not None:
        check_start(config, data)
    split = partition(
        data.train,
        name=config.partition.name,
        num_clients=config.partition.num_clients,
        seed=config.seed,
        label_column=data.label_column,
        domain_column=data.domain_column,
        **own_options("partition", config.partition.options, partition),
    )
    family = FAMILIES[config.model.family]
    with doing("loading model"):
        model = build_model(config, data.class_names)
    initial_state, scaling = model.get_state(), scalings(model)
    run = Run(
        config=config,
        family=family,
        model=model,
        data=data,
        partition=split,
        shards=split_shards(config, data, split),
        reader=family.read(unwrap(model), data, reading_settings(config)),
        initial_state=initial_state,
        layout=layout_of(initial_state),
        aggregator=aggregator,
        base=BaseWeights(model),
        scaling=scaling,
        clients=client_settings(config),
        training_settings=training_settings(config),
    )
    check_client_ranks(config, aggregator, run.initial_server_state)
    return_freed_memory()
    return run

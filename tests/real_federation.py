"""A federation on the bundled model without a run folder: the real server, client app, codecs and ledger.

Each client also has base weights of its own here, made of nothing but what it received, so that the tests
see what a client alone on its machine would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message

import federated.rounds.client
import federated.rounds.strategy
from federated.communication.ledger import Ledger
from federated.communication.metered_grid import MeteredGrid
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.methods import NEVER, BaseDelta, Downlink
from federated.rounds.build import client_settings, training_settings
from federated.rounds.client import LocalTraining, client_app
from federated.rounds.client_ranks import scaling_at
from federated.rounds.client_state import HELD, recall
from federated.rounds.compatibility import build_aggregator
from federated.rounds.global_model import load_global_state
from federated.rounds.local_training import Assignment, LocalResult, train_locally
from federated.rounds.run import Run, build_run
from federated.rounds.run_strategy import build_strategy
from lora.adapters import factor_pairs
from models.state import State

NUM_CLIENTS = 4
RANK = 4
SMALL = (
    f"lora.r={RANK}",
    "lora.layers=[3]",
    "lora.target_modules=[q_proj, fc1]",
    f"partition.num_clients={NUM_CLIENTS}",
    "federation.rounds=3",
    "client.local_steps=2",
    "client.batch_size=4",
    "data.max_train_samples=120",
    "data.max_test_samples=20",
    "engine.batched_clients=off",
)
"""Two adapted layers in the last block, one of them not square; what lies below is computed once."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {}),
    "ffa": ("ffa", {}),
    "rolora": ("rolora", {}),
    "flora": ("flora", {}),
    "fedex": ("fedex", {}),
    "fedex(rank_cap=2)": ("fedex", {"rank_cap": 2}),
    "flexlora": ("flexlora", {}),
    "hetlora": ("hetlora", {}),
    "fedsa": ("fedsa", {}),
    "lora_fair": ("lora_fair", {}),
    "fedsvd": ("fedsvd", {}),
    "fed_sb": ("fed_sb", {}),
    "dual": ("dual", {}),
}
EXACT = ("ffa", "rolora", "flora", "fedex", "fedsvd", "fed_sb")


def small_config(*overrides: str) -> ExperimentConfig:
    return load_config("quickstart", [*SMALL, *overrides])


def with_method(experiment: Run, method: str, *, trained: bool = False, **client: Any) -> Run:
    """The same experiment under another aggregator and client settings; ``dual`` needs its own model."""
    name, options = METHODS[method]
    config = experiment.config
    section = config.aggregation.model_copy(update={"name": name, "options": options})
    config = config.model_copy(
        update={"aggregation": section, "client": config.client.model_copy(update=client)}
    )
    if name == "dual" and not any(".private." in key for key in experiment.initial_state):
        experiment = build_run(config)
    state = dict(experiment.initial_state)
    if trained:
        generator = torch.Generator().manual_seed(5)
        state |= {
            n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in state.items() if "lora_B" in n
        }
    return replace(
        experiment,
        config=config,
        aggregator=build_aggregator(config),
        initial_state=state,
        clients=client_settings(config),
        training_settings=training_settings(config),
    )


class RealFederation:
    """A server with its clients, and what each client held before and after its local training.

    Args:
        experiment: Model, data and settings; used in place, from its first state.
        monkeypatch: Watches what clients receive and encode.
        order: Reorders the clients of a round.
    """

    def __init__(
        self,
        experiment: Run,
        monkeypatch: pytest.MonkeyPatch,
        order: Callable[[Sequence[Message]], Sequence[Message]] | None = None,
    ) -> None:
        experiment.reset()
        self.experiment = experiment
        self.pretrained = experiment.base.current()
        self.bases = {i: dict(self.pretrained) for i in range(experiment.num_clients)}
        self.merged: dict[int, dict[str, BaseDelta]] = {i: {} for i in range(experiment.num_clients)}
        self.versions: dict[int, int] = {}
        self.starts: dict[int, State] = {}
        self.ends: dict[int, State] = {}
        self.held: dict[int, State] = {}
        self.trained: dict[int, State] = {}
        self.uplinks: list[tuple[int, State]] = []
        self.ledger = Ledger()
        self.local_training: LocalTraining = train_locally
        self.run_of_process: Callable[[], Run] = lambda: experiment
        deliver: Any = self._deliver
        self.grid = InProcessGrid(deliver, experiment.num_clients, execution_order=order)
        clients = {i: node_id_of(i) for i in range(experiment.num_clients)}
        of_node = {node: i for i, node in clients.items()}
        self.metered = MeteredGrid(self.grid, self.ledger, of_node.__getitem__)
        self.strategy = build_strategy(experiment, clients)
        self.cohort: list[int] = []
        self.broadcasts: list[tuple[State, State]] = []
        monkeypatch.setattr(federated.rounds.strategy, "sample_cohort", lambda *arguments: list(self.cohort))
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original_receive, original_encode = (
            getattr(federated.rounds.client, name) for name in ("receive_message", "encode")
        )
        original_unpack, original_read = (
            federated.rounds.client.unpack_downlink,
            federated.rounds.client.read_broadcast,
        )
        current = [0]

        def read_broadcast(*arguments: Any) -> State:
            shared = original_read(*arguments)
            self.broadcasts.append((shared, {name: tensor.clone() for name, tensor in shared.items()}))
            return shared

        def receive_message(experiment: Run, message: Message, context: Any) -> Any:
            current[0] = int(context.node_config["partition-id"])
            assignment, held = original_receive(experiment, message, context)
            self.held[current[0]] = held
            return assignment, held

        def unpack_downlink(*arguments: Any) -> Downlink:
            downlink = original_unpack(*arguments)
            merged, base = self.merged[current[0]], self.bases[current[0]]
            version = self.versions.get(current[0], NEVER)
            for module, update in downlink.base_updates.items():
                merged[module] = merged.get(module, BaseDelta()).received(update, version)
                base[module] = self.pretrained[module] + merged[module].total()
            self.versions[current[0]] = downlink.version
            return downlink

        def encode(experiment: Run, delta: State, context: Any, assignment: Any) -> Any:
            self.uplinks.append((assignment.client_id, delta))
            return original_encode(experiment, delta, context, assignment)

        for name, function in (("receive_message", receive_message), ("encode", encode)):
            monkeypatch.setattr(federated.rounds.client, name, function)
        monkeypatch.setattr(federated.rounds.client, "read_broadcast", read_broadcast)
        monkeypatch.setattr(federated.rounds.client, "unpack_downlink", unpack_downlink)

    def _deliver(self, message: Message, context: Context) -> Message:
        """Hand a message to its client, in the process that it reaches."""
        return client_app(self.run_of_process(), self._train)(message, context)

    def _train(self, experiment: Run, assignment: Assignment, held: State) -> LocalResult:
        result, client_id = self.local_training(experiment, assignment, held), assignment.client_id
        self.starts[client_id] = self.weights(client_id, held, assignment.rank)
        self.ends[client_id] = self.weights(client_id, result.state, assignment.rank)
        trained = {name: tensor.clone() for name, tensor in result.state.items()}
        self.trained[client_id] = trained  # the client computes its update in place
        return result

    def play(self, server_round: int, cohort: Iterable[int]) -> None:
        """One round of training with these clients."""
        self.cohort = sorted(cohort)
        messages = self.strategy.configure_train(server_round, ArrayRecord(), ConfigRecord(), self.metered)
        self.strategy.aggregate_train(server_round, self.metered.send_and_receive(messages))
        self.check_broadcasts()

    def check_broadcasts(self) -> None:
        """Clients share what they decode, so none may have written to it."""
        for shared, as_decoded in self.broadcasts:
            assert all(torch.equal(shared[name], tensor) for name, tensor in as_decoded.items())

    def evaluate(self, server_round: int, clients: Sequence[int]) -> None:
        """Let these clients take in the present state and evaluate."""
        self.strategy._evaluates = lambda _: list(clients)
        messages = self.strategy.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), self.metered)
        self.strategy.aggregate_evaluate(server_round, self.metered.send_and_receive(messages))

    def weights(self, client_id: int, held: State, rank: int | None = None) -> State:
        """W0 + what this client folded + s B A of all its adapters, by module."""
        experiment = self.experiment
        values = experiment.aggregator.client.to_model(held)
        scaling = scaling_at(experiment, rank)
        shared = {n: t for n, t in values.items() if ".private." not in n}
        result = {}
        for pair in factor_pairs(shared):
            weight = (
                self.bases[client_id][pair.module] + scaling[pair.module] * values[pair.b] @ values[pair.a]
            )
            a, b = (f"{pair.module}.{f}.private.weight" for f in ("lora_A", "lora_B"))
            if a in values:
                weight = weight + scaling[pair.module] * values[b] @ values[a]
            result[pair.module] = weight
        return result

    def client_weights(self, client_id: int) -> State:
        """The weights that a client computes with after it has taken in the last message."""
        rank = self.strategy._profile(client_id).rank
        return self.weights(client_id, self.held[client_id], rank)

    def global_features(self) -> torch.Tensor:
        """Image features of the global model, (20, D)."""
        load_global_state(self.experiment, self.strategy.server_state)
        with torch.no_grad():
            return self.experiment.model.encode_image(
                self.experiment.reader.test_images.pixel_values(range(20))
            )

    def private_state(self, client_id: int) -> State:
        """What a client keeps for itself in its ``Context.state``."""
        held = recall(self.grid.context(client_id), HELD)
        return {name: held[name] for name in self.experiment.aggregator.private(held)}


def same(first: State, second: State) -> bool:
    """Bitwise equality of two states."""
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


def distance(found: State, wanted: State) -> float:
    """Largest absolute difference."""
    return max(float((found[n] - wanted[n]).abs().max()) for n in wanted)

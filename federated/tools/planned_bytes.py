"""The payload of every round of a run before it is run: exactly what the ledger will say if no client fails.

What travels depends on who took part before and on the method, not on what is learnt: cohorts are drawn as in
the run, and only a method that merges into the base applies updates, of any values, so that its server holds
terms of the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from federated.communication.codec import Codec, codec_from_name
from federated.config.schema import ExperimentConfig
from federated.methods import Aggregator, ClientProfile, ServerState, Update, join_auxiliary
from federated.methods.downlinks import pack_downlink, receive
from federated.methods.hetlora import cut_to_rank
from federated.methods.protocol import NEVER, skip_round
from federated.rounds.client_ranks import mixed_ranks, rank_of, scaling_at
from federated.rounds.cohort import sample_cohort
from models.state import Layout, State, layout_of, num_values


@dataclass(frozen=True)
class PlannedRound:
    """What a round will send, over its whole cohort, payload alone.

    Attributes:
        server_round: The round, from 1.
        clients: Clients that train.
        newcomers: Those among them that take part for the first time.
        downlink_values: Numbers that the server sends them.
        downlink_bytes: The same, encoded.
        uplink_values: Numbers that they send back.
        uplink_bytes: The same, encoded.
        evaluation_bytes: What clients receive afterwards to evaluate the new model.
    """

    server_round: int
    clients: int
    newcomers: int
    downlink_values: int
    downlink_bytes: int
    uplink_values: int
    uplink_bytes: int
    evaluation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both ways, evaluation included."""
        return self.downlink_bytes + self.uplink_bytes + self.evaluation_bytes


@dataclass(frozen=True, eq=False)
class Plan:
    """What the bytes of a run follow from; what ``client_ranks`` reads of a run.

    Attributes:
        config: The run's settings.
        aggregator: The method.
        initial_state: What travels, before round 1, of any values.
        scaling: Module -> s at the model's rank.
    """

    config: ExperimentConfig
    aggregator: Aggregator
    initial_state: State
    scaling: Mapping[str, float]


def planned_rounds(plan: Plan) -> Iterator[PlannedRound]:
    """Yield each round of a run, all clients having rows to evaluate on and none of them failing."""
    config, rule = plan.config, plan.aggregator
    number, cohort_size = config.partition.num_clients, config.cohort_size
    up, down = (
        codec_from_name(name) for name in (config.communication.uplink, config.communication.downlink)
    )
    server = rule.init(plan.initial_state, plan.scaling)
    versions: dict[int, int] = {}
    seen: set[int] = set()
    for server_round in range(1, config.federation.rounds + 1):
        cohort = sample_cohort(config.seed, server_round, number, cohort_size)
        sent = _Layouts(plan, server, versions, train=True)
        downlinks = [sent.downlink(client_id) for client_id in cohort]
        replies = [sent.reply(client_id) for client_id in cohort]
        versions.update(dict.fromkeys(cohort, server.server_round))
        newcomers, seen = len(set(cohort) - seen), seen | set(cohort)
        server = _after(sent, server, cohort)
        evaluators = evaluating(config, server_round)
        after = _Layouts(plan, server, versions, train=False)
        evaluation = [after.downlink(client_id) for client_id in evaluators]
        versions.update(dict.fromkeys(evaluators, server.server_round))
        yield PlannedRound(
            server_round,
            len(cohort),
            newcomers,
            sum(map(num_values, downlinks)),
            _bytes(down, downlinks),
            sum(map(up.num_sent, replies)),
            _bytes(up, replies),
            _bytes(down, evaluation),
        )


class _Layouts:
    """What goes out at one version of the server, each distinct downlink and reply made once."""

    def __init__(self, plan: Plan, server: ServerState, versions: Mapping[int, int], *, train: bool) -> None:
        self._plan, self._server, self._versions = plan, server, dict(versions)
        self._auxiliary = plan.aggregator.auxiliary(server)
        self._beside = self._auxiliary if train else {}
        self._downlinks: dict[tuple[int, int | None], Layout] = {}
        self._starts: dict[int | None, State] = {}
        self._trained: dict[int | None, State] = {}

    def profile(self, client_id: int) -> ClientProfile:
        rank = rank_of(self._plan, client_id)
        remembers = self._plan.aggregator.clients_remember
        version = self._versions.get(client_id, NEVER) if remembers else NEVER
        scaling = scaling_at(self._plan, rank) if mixed_ranks(self._plan) else None
        return ClientProfile(rank, scaling, version)

    def downlink(self, client_id: int) -> Layout:
        profile = self.profile(client_id)
        key = profile.version, profile.rank
        if key not in self._downlinks:
            found = self._plan.aggregator.downlink(self._server, profile)
            self._downlinks[key] = layout_of(pack_downlink(replace(found, auxiliary=self._beside))[0])
        return self._downlinks[key]

    def reply(self, client_id: int) -> Layout:
        return layout_of(join_auxiliary(self.start(client_id), self._auxiliary))

    def start(self, client_id: int) -> State:
        """Return the values of what a client sends, before its training."""
        profile, rule, server = self.profile(client_id), self._plan.aggregator, self._server
        if profile.rank not in self._starts:
            state = server.state
            if profile.rank is not None:
                newcomer = replace(profile, version=NEVER)
                state = receive(rule.downlink(server, newcomer), cut_to_rank(server.state, profile.rank))
            names = rule.uplink(server.state, server.server_round + 1)
            self._starts[profile.rank] = {name: state[name] for name in names}
        return self._starts[profile.rank]

    def update(self, client_id: int) -> Update:
        profile, start = self.profile(client_id), self.start(client_id)
        if profile.rank not in self._trained:
            changes = any_values(start)
            self._trained[profile.rank] = {name: value + changes[name] for name, value in start.items()}
        trained, scaling = self._trained[profile.rank], profile.scaling or self._server.scaling
        return Update(client_id, 1, trained, scaling, profile.rank, start, self._auxiliary)


def _after(sent: _Layouts, server: ServerState, cohort: list[int]) -> ServerState:
    """Return a server that holds values of the shapes that the next one will hold."""
    if not sent._plan.aggregator.merges_into_base:
        return skip_round(server)
    return sent._plan.aggregator.apply(server, [sent.update(client_id) for client_id in cohort])


def evaluating(config: ExperimentConfig, server_round: int) -> list[int]:
    """Return clients that evaluate after a round; of more than are asked, the first."""
    settings = config.evaluation
    every = settings.clients_every
    due = server_round == config.federation.rounds or (every and server_round % every == 0)
    number = min(config.partition.num_clients, settings.max_clients)
    return list(range(number)) if settings.clients and due else []


def _bytes(codec: Codec, layouts: list[Layout]) -> int:
    return sum(codec.num_bytes(layout) for layout in layouts)


def any_values(state: Mapping[str, torch.Tensor]) -> State:
    """Return a state of the same shapes with small values, none of them 0."""
    drawn = torch.Generator().manual_seed(0)
    return {name: torch.rand(tensor.shape, generator=drawn) + 0.1 for name, tensor in state.items()}


def zeros(state: Mapping[str, torch.Tensor]) -> State:
    """Return a state of the same shapes that is 0 throughout."""
    return {name: torch.zeros(tensor.shape) for name, tensor in state.items()}

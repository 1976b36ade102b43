"""The one Flower strategy of this project: seeded cohorts, encoded payloads, any aggregator.

Flower's ``Strategy.start`` is the round loop; it calls, in this order, ``configure_train`` (sample the
cohort, encode the downlink), the grid, ``aggregate_train`` (decode in client order, refuse what cannot be
used, apply the aggregator), ``configure_evaluate``, the grid, ``aggregate_evaluate``. The strategy keeps the global state
as named fp32 tensors; what Flower passes along between these calls is a copy packed for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from federated.aggregators import (
    NEVER,
    Aggregator,
    ClientProfile,
    ServerState,
    Update,
    cut_to_rank,
    pack_downlink,
    receive,
    run_round,
)
from federated.codecs import Codec, codec_from_name
from federated.messages import (
    CLIENT_ID,
    NUM_EXAMPLES,
    RANK,
    SERVER_ROUND,
    TRAIN_LOSS,
    read_state,
    write_state,
)
from federated.payload import ARRAYS, METRICS, PayloadError, layout_of
from federated.seeding import generator
from models.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A client whose answer could not be used in a round."""

    client_id: int
    reason: str


@dataclass
class RoundRecord:
    """What one round produced, as it goes into ``metrics.jsonl``."""

    server_round: int
    cohort: list[int] = field(default_factory=list)
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: list[Failure] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False


def sample_cohort(seed: int, server_round: int, num_clients: int, cohort_size: int) -> list[int]:
    """Draw the clients of a round without replacement; a function of seed and round alone.

    Returns:
        Client ids in ascending order.
    """
    if cohort_size >= num_clients:
        return list(range(num_clients))
    rng = generator(seed, "cohort", server_round)
    return sorted(int(i) for i in rng.choice(num_clients, size=cohort_size, replace=False))


@dataclass(frozen=True)
class Ranks:
    """The adapter ranks of clients that differ.

    Attributes:
        of: Rank of a client before round 1; None: the server's.
        scaling: Module -> s at a rank.
    """

    of: Callable[[int], int | None] = lambda client_id: None
    scaling: Callable[[int | None], Mapping[str, float] | None] = lambda rank: None


class LoRAStrategy(FedAvg):
    """FedAvg's protocol with adapters, codecs and aggregators.

    Args:
        aggregator: How updates are combined.
        server_state: The aggregator's state before round 1.
        clients: Node id of each client id.
        seed: Seed of the run.
        cohort_size: Clients sampled a round.
        uplink: Name of the codec of the clients' updates.
        downlink: Name of the codec of what the server sends.
        ranks: The clients' ranks where they differ.
        evaluates: Which clients evaluate after a round; none by default.
        on_broadcast: Told ``(server_round, number of clients, message type)`` before messages go out.
    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        *,
        aggregator: Aggregator,
        server_state: ServerState,
        clients: Mapping[int, int],
        seed: int,
        cohort_size: int,
        uplink: str = "fp32",
        downlink: str = "fp32",
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        evaluates: Callable[[int], list[int]] = lambda server_round: [],
        on_broadcast: Callable[[int, int, str], None] = lambda server_round, num_clients, phase: None,
    ) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=len(clients))
        self.aggregator = aggregator
        self.server_state = server_state
        self.record = RoundRecord(server_round=0)
        self._nodes = dict(clients)
        self._clients = {node_id: client_id for client_id, node_id in clients.items()}
        self._seed = seed
        self._cohort_size = cohort_size
        self._uplink: Codec = codec_from_name(uplink)
        self._downlink: Codec = codec_from_name(downlink)
        self._ranks = ranks
        self._current_ranks: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._evaluates = evaluates
        self._on_broadcast = on_broadcast
        self._addressed: set[int] = set()
        self._sent_version = NEVER

    # ---- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort and encode what each of its clients receives."""
        cohort = sample_cohort(self._seed, server_round, len(self._nodes), self._cohort_size)
        self.record = RoundRecord(server_round=server_round, cohort=cohort)
        return self._broadcast(server_round, cohort, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the updates in client order, refuse what cannot be used, apply the aggregator."""
        answers = self._sort_out(replies)
        updates = [update for reply in answers if (update := self._decode(reply)) is not None]
        self.server_state, accepted, refused = run_round(self.aggregator, self.server_state, updates)
        self.record.failed += [Failure(client_id, reason) for client_id, reason in refused]
        self.record.failed.sort(key=lambda failure: failure.client_id)
        if not accepted:
            self.record.skipped = True
            return None, None
        losses = {self._client_of(reply): float(_metrics(reply)[TRAIN_LOSS]) for reply in answers}
        for update in accepted:
            loss = losses[update.client_id]
            self.record.clients[update.client_id] = {"train_loss": loss, "num_examples": update.num_examples}
        weights = [update.num_examples for update in accepted]
        train_loss = np.average([losses[update.client_id] for update in accepted], weights=weights)
        self.record.metrics["train_loss"] = float(train_loss)
        return self.packed_state(), MetricRecord(dict(self.record.metrics))

    # ---- evaluation by clients

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the new global state to the clients that evaluate after this round."""
        return self._broadcast(server_round, self._evaluates(server_round), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect each client's own metrics; they are reported one by one, not averaged away."""
        for reply in self._sort_out(replies):
            metrics = _metrics(reply)
            entry = self.record.clients.setdefault(int(metrics.pop(CLIENT_ID)), {})
            entry["eval_examples"] = int(metrics.pop(NUM_EXAMPLES))
            entry |= {"eval_loss" if key == "loss" else key: value for key, value in metrics.items()}
        self.record.clients = dict(sorted(self.record.clients.items()))
        return None

    def summary(self) -> None:
        """Log what the strategy does."""
        log.info(
            "aggregator %s, cohort %d of %d, uplink %s, downlink %s",
            self.aggregator.name,
            self._cohort_size,
            len(self._nodes),
            self._uplink.name,
            self._downlink.name,
        )

    def packed_state(self) -> ArrayRecord:
        """Return the global state as Flower passes it along: one flat fp32 array."""
        content, _ = write_state(
            self.server_state.state, codec_from_name("fp32"), np.random.default_rng(0), {}
        )
        return content.array_records[ARRAYS]

    # ---- both directions

    def _broadcast(self, server_round: int, client_ids: list[int], message_type: str) -> list[Message]:
        """Encode each distinct downlink once and address it to its clients."""
        self._addressed = set(client_ids)
        self._sent_version = self.server_state.server_round
        if client_ids:
            self._on_broadcast(server_round, len(client_ids), message_type)
        contents: dict[tuple[int, int | None], RecordDict] = {}
        messages = []
        for client_id in client_ids:
            profile = self._profile(client_id)
            key = (profile.version, profile.rank)
            if key not in contents:
                contents[key] = self._downlink_content(server_round, profile)
            messages.append(Message(contents[key], self._nodes[client_id], message_type))
        return messages

    def _downlink_content(self, server_round: int, profile: ClientProfile) -> RecordDict:
        state, meta = pack_downlink(self.aggregator.downlink(self.server_state, profile))
        rng = generator(self._seed, "codec", server_round)
        content, _ = write_state(
            state,
            self._downlink,
            rng,
            {SERVER_ROUND: server_round, RANK: profile.rank or 0, **meta},
            send_layout=layout_of(state) != layout_of(self.server_state.state),
        )
        return content

    def _profile(self, client_id: int) -> ClientProfile:
        rank = self._current_ranks.get(client_id, self._ranks.of(client_id))
        remembers = self.aggregator.clients_remember
        version = self._versions.get(client_id, NEVER) if remembers else NEVER
        return ClientProfile(rank=rank, scaling=self._ranks.scaling(rank), version=version)

    def _sort_out(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies with content in client order; name the clients that failed or stayed silent."""
        replies = sorted(replies, key=self._client_of)
        silent = sorted(self._addressed - {self._client_of(reply) for reply in replies})
        self.record.failed += [Failure(client_id, "no reply within the timeout") for client_id in silent]
        answered = []
        for reply in replies:
            client_id = self._client_of(reply)
            if reply.has_error():
                self.record.failed.append(Failure(client_id, str(reply.error.reason)))
            else:
                answered.append(reply)
                self._versions[client_id] = self._sent_version
        return answered

    def _decode(self, reply: Message) -> Update | None:
        """Turn a delta into the client's new values; None (and a named failure) when it cannot be read."""
        client_id = self._client_of(reply)
        profile = self._profile(client_id)
        reference = self._reference(profile)
        try:
            delta = read_state(reply.content, self._uplink, layout_of(reference))
        except PayloadError as error:
            self.record.failed.append(Failure(client_id, str(error)))
            return None
        metrics = _metrics(reply)
        if profile.rank is not None and metrics[RANK]:
            self._current_ranks[client_id] = int(metrics[RANK])
        return Update(
            client_id=client_id,
            num_examples=int(metrics[NUM_EXAMPLES]),
            state={name: reference[name] + change for name, change in delta.items() if name in reference},
            scaling=profile.scaling or self.server_state.scaling,
            rank=profile.rank,
        )

    def _reference(self, profile: ClientProfile) -> State:
        """Return, in full precision, what a client started from of the names that travel up."""
        server = self.server_state
        uplink = self.aggregator.uplink(server.state, server.server_round + 1)
        state = server.state
        if profile.rank is not None:
            newcomer = ClientProfile(profile.rank, profile.scaling, NEVER)
            state = receive(
                self.aggregator.downlink(server, newcomer), cut_to_rank(server.state, profile.rank)
            )
        return {name: state[name] for name in uplink}

    def _client_of(self, message: Message) -> int:
        return self._clients[message.metadata.src_node_id]


def _metrics(reply: Message) -> dict[str, Any]:
    return cast(dict[str, Any], dict(reply.content.metric_records[METRICS]))

"""The one Flower strategy of this project: seeded cohorts, encoded payloads, any aggregator.

Flower's ``Strategy.start`` is the round loop; it calls, in this order, ``configure_train`` (sample the
cohort, encode the downlink), the grid, ``aggregate_train`` (decode in client order, refuse what cannot be
used, apply the aggregator), ``configure_evaluate``, the grid, ``aggregate_evaluate``. The strategy keeps the
global state as named fp32 tensors; what Flower passes along between these calls is a copy packed for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from federated.communication.byte_counts import payload_bytes
from federated.communication.codec import Codec, codec_from_name
from federated.communication.messages import RANK, SERVER_ROUND, SINCE, read_broadcast, write_state
from federated.communication.payload import ARRAYS, CONFIG
from federated.config.seeding import generator
from federated.methods import (
    DEFAULT_LIMITS,
    NEVER,
    Aggregator,
    ClientProfile,
    EncodingLoss,
    Known,
    Limits,
    ServerState,
    Update,
    aggregation_error,
    cut_to_rank,
    pack_downlink,
    receive,
    run_round,
    unpack_downlink,
)
from federated.results.round_record import Failure, RoundRecord
from federated.rounds.cohort import sample_cohort
from federated.rounds.held_states import HeldStates
from federated.rounds.replies import (
    ShardSizes,
    Start,
    TrainingReply,
    UnreadableReplyError,
    check_origin,
    read_evaluation,
    read_training_reply,
)
from models.errors import ROUND_FAILURE
from models.state import flat, layout_of

log = logging.getLogger(__name__)

PLAIN = codec_from_name("fp32")
"""Sends values as they are."""


@dataclass(frozen=True)
class Ranks:
    """The adapter ranks of clients that differ.

    Attributes:
        of: Rank of a client before round 1; None: the server's.
        scaling: Module -> s at a rank.
    """

    of: Callable[[int], int | None] = lambda client_id: None
    scaling: Callable[[int | None], Mapping[str, float] | None] = lambda rank: None


class LoRAStrategy(Strategy):
    """Flower's round protocol with adapters, codecs and aggregators.

    Args:
        aggregator: How updates are combined.
        server_state: The aggregator's state before round 1.
        clients: Node id of each client id.
        seed: Seed of the run.
        cohort_size: Clients sampled a round.
        uplink: The codec of the clients' updates.
        downlink: The codec of what the server sends.
        ranks: The clients' ranks where they differ.
        limits: How far one client may be from its cohort.
        shard_sizes: The most examples that a client can have used.
        error_every: Rounds between measurements of the aggregation error; 0: never.
        fault_of: The fault on purpose that strikes a client's training in a round, if any.
        reachable: Whether a client can be reached in a round; nothing is sent to one that cannot.
        evaluates: Which clients evaluate after a round; none by default.
        on_broadcast: Told ``(server_round, number of clients, message type)`` before messages go out.

    Attributes:
        rounds_before: Rounds that were done before ``start``, whose loop counts from 1.
        held: What clients hold, where that is neither what the server has nor none of its concern.
    """

    def __init__(  # noqa: PLR0913 - keyword-only
        self,
        *,
        aggregator: Aggregator,
        server_state: ServerState,
        clients: Mapping[int, int],
        seed: int,
        cohort_size: int,
        uplink: Codec = PLAIN,
        downlink: Codec = PLAIN,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        limits: Limits = DEFAULT_LIMITS,
        shard_sizes: ShardSizes = ShardSizes(),  # noqa: B008 - frozen
        error_every: int = 1,
        fault_of: Callable[[int, int], str | None] = lambda server_round, client_id: None,
        reachable: Callable[[int, int], bool] = lambda server_round, client_id: True,
        evaluates: Callable[[int], list[int]] = lambda server_round: [],
        on_broadcast: Callable[[int, int, str], None] = lambda server_round, num_clients, phase: None,
    ) -> None:
        self.aggregator = aggregator
        self.server_state = server_state
        self.record = RoundRecord(server_round=0)
        self.versions: dict[int, int] = {}
        self.current_ranks: dict[int, int] = {}
        self.rounds_before = 0
        self._nodes = dict(clients)
        self._clients = {node_id: client_id for client_id, node_id in clients.items()}
        self._seed = seed
        self._cohort_size = cohort_size
        self._uplink = uplink
        self._downlink = downlink
        self._full_layout = layout_of(server_state.state)
        self._ranks = ranks
        self._limits = limits
        self._shard_sizes = shard_sizes
        self._error_every = error_every if aggregator.has_global_model else 0
        follows = bool(self._error_every) and not self._downlink.lossless
        self.held = HeldStates(remembers=aggregator.clients_remember) if follows else None
        self._fault_of = fault_of
        self._reachable = reachable
        self._evaluates = evaluates
        self._on_broadcast = on_broadcast
        self._sent: dict[int, Metadata] = {}
        self._sent_version = NEVER
        self._starts: dict[int | None, Start] = {}

    # ---- training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort and encode what each of its clients receives."""
        server_round += self.rounds_before
        cohort = sample_cohort(self._seed, server_round, len(self._nodes), self._cohort_size)
        self.record = RoundRecord(server_round=server_round, cohort=cohort)
        return self._broadcast(server_round, cohort, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Decode the updates in client order, refuse what cannot be used, apply the aggregator."""
        decoded = [self._decode(reply) for reply in self._sort_out(replies)]
        read = [reply for reply in decoded if reply is not None]
        before, updates = self.server_state, [reply.update for reply in read]
        after, accepted, refused = run_round(self.aggregator, before, updates, self._limits)
        self.server_state = after
        failed = self.record.failed + [Failure(client_id, reason) for client_id, reason in refused]
        failed.sort(key=lambda failure: failure.client_id)
        struck = partial(self._fault_of, self.record.server_round)  # none strikes who was sent nothing
        self.record.failed = [
            replace(f, fault=struck(f.client_id)) if f.client_id in self._sent else f for f in failed
        ]
        if not accepted:
            self.record.skipped = True
            return None, None
        of_client = {reply.update.client_id: reply for reply in read}
        self._close(before, accepted, [of_client[update.client_id] for update in accepted])
        return self.packed_state(), MetricRecord(dict(self.record.metrics))

    def _close(
        self, before: ServerState, accepted: Sequence[Update], replies: Sequence[TrainingReply]
    ) -> None:
        """Take over what else came with the accepted updates, and write down the round's figures."""
        for reply in replies:
            update = reply.update
            self.record.clients[update.client_id] = {
                "train_loss": reply.train_loss,
                "num_examples": update.num_examples,
            }
            if reply.next_rank is not None:
                self.current_ranks[update.client_id] = reply.next_rank
        weights = [update.num_examples for update in accepted]
        losses = [reply.train_loss for reply in replies]
        self.record.metrics["train_loss"] = float(np.average(losses, weights=weights))
        if self._error_every and self.record.server_round % self._error_every == 0:
            error = self._aggregation_error(before, accepted, replies)
            if error is not None and math.isfinite(error):
                self.record.metrics["aggregation_error"] = error

    def _aggregation_error(
        self, before: ServerState, accepted: Sequence[Update], replies: Sequence[TrainingReply]
    ) -> float | None:
        """Return the round's aggregation error; None where a client's loss is not known."""
        known = {}
        for reply in replies:
            loss = EncodingLoss() if self._uplink.lossless else reply.encoding_loss
            if loss is None:
                return None
            client_id = reply.update.client_id
            held = None if self.held is None else self.held.started_from(client_id)
            known[client_id] = Known(held, loss)
        return aggregation_error(self.aggregator, before, self.server_state, accepted, known)

    # ---- evaluation by clients

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the new global state to the clients that evaluate after this round."""
        server_round += self.rounds_before
        return self._broadcast(server_round, self._evaluates(server_round), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect each client's own metrics; they are reported one by one, not averaged away."""
        for reply in self._sort_out(replies):
            client_id = self._client_of(reply)
            try:
                metrics = read_evaluation(reply.content)
                self._shard_sizes.check_test(client_id, metrics["eval_examples"])
            except UnreadableReplyError as error:
                self._refuse(client_id, str(error))
                continue
            entry = self.record.clients.setdefault(client_id, {})
            if "eval_examples" in entry:
                self._refuse(client_id, "sent its evaluation again; the first counts")
            else:
                entry.update(metrics)
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
        content = write_state(self.server_state.state, PLAIN, None, {})
        return content.array_records[ARRAYS]

    def num_values(self, reply: Message) -> int:
        """Return how many values a reply carries: what the agreed codec sends of what was asked for.

        0 where what arrived is of another length; what the client says of it counts for nothing.
        """
        num_bytes, client_id = payload_bytes(reply), self._client_of(reply)
        if not num_bytes:
            return 0
        layout = self._start_of(client_id).reply_layout
        return self._uplink.num_sent(layout) if num_bytes == self._uplink.num_bytes(layout) else 0

    # ---- both directions

    def _broadcast(self, server_round: int, client_ids: list[int], message_type: str) -> list[Message]:
        """Encode each distinct downlink once and address it to its clients."""
        self._sent_version = self.server_state.server_round
        self._sent.clear()
        self._starts.clear()
        reached = [client_id for client_id in client_ids if self._reachable(server_round, client_id)]
        self.record.name_unreached(sorted(set(client_ids) - set(reached)))
        client_ids = reached
        if client_ids:
            self._on_broadcast(server_round, len(client_ids), message_type)
        if self.held is not None:
            self.held.begin_broadcast()
        contents: dict[tuple[int, int | None], RecordDict] = {}
        messages = []
        for client_id in client_ids:
            profile = self._profile(client_id)
            key = (profile.version, profile.rank)
            if key not in contents:
                contents[key] = self._downlink_content(server_round, profile, message_type)
            group = str(server_round)
            messages.append(Message(contents[key], self._nodes[client_id], message_type, group_id=group))
            self._sent[client_id] = messages[-1].metadata
            if self.held is not None:
                values = read_broadcast(contents[key], self._downlink, self._full_layout)
                config = cast(Mapping[str, int], contents[key][CONFIG])
                self.held.sent(client_id, unpack_downlink(values, config))
        return messages

    def _downlink_content(self, server_round: int, profile: ClientProfile, message_type: str) -> RecordDict:
        downlink = self.aggregator.downlink(self.server_state, profile)
        if message_type == MessageType.TRAIN:
            downlink = replace(downlink, auxiliary=self.aggregator.auxiliary(self.server_state))
        state, meta = pack_downlink(downlink)
        if profile.version != NEVER:  # it leaves out what the client should still hold
            meta[SINCE] = profile.version
        rng = generator(self._seed, "downlink", server_round) if self._downlink.draws else None
        return write_state(
            state,
            self._downlink,
            rng,
            {SERVER_ROUND: server_round, RANK: profile.rank or 0, **meta},
            send_layout=layout_of(state) != self._full_layout,
        )

    def _profile(self, client_id: int) -> ClientProfile:
        rank = self.current_ranks.get(client_id, self._ranks.of(client_id))
        remembers = self.aggregator.clients_remember
        version = self.versions.get(client_id, NEVER) if remembers else NEVER
        return ClientProfile(rank=rank, scaling=self._ranks.scaling(rank), version=version)

    def _sort_out(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies to what was sent, with content, in client order; name the other clients."""
        asked = []
        for reply in replies:
            client_id = self._clients.get(reply.metadata.src_node_id)
            if client_id in self._sent:
                asked.append(reply)
            else:
                log.warning("a reply from node %s was not asked for: ignored", reply.metadata.src_node_id)
        asked.sort(key=self._client_of)
        for client_id in sorted(self._sent.keys() - {self._client_of(reply) for reply in asked}):
            self.record.failed.append(Failure(client_id, "no reply within federation.timeout_seconds"))
        answered = []
        for reply in asked:
            client_id = self._client_of(reply)
            try:
                check_origin(reply, self._sent[client_id], self.record.server_round)
            except UnreadableReplyError as error:
                self._refuse(client_id, str(error))
                continue
            if not reply.has_content():
                reason = reply.error.reason if reply.has_error() else "its reply is empty"
                self.record.failed.append(Failure(client_id, reason or "no reason given"))
                self.versions.pop(client_id, None)  # whatever it has lost, it will receive everything
                if self.held is not None:
                    self.held.failed(client_id)
            else:
                answered.append(reply)
                self.versions[client_id] = self._sent_version
                if self.held is not None:
                    self.held.answered(client_id)
        return answered

    def _decode(self, reply: Message) -> TrainingReply | None:
        """Return a client's reply, read; None (and a named failure) when it cannot be read."""
        client_id = self._client_of(reply)
        try:
            read = read_training_reply(client_id, reply.content, self._uplink, self._start_of(client_id))
            self._shard_sizes.check_train(client_id, read.update.num_examples)
        except UnreadableReplyError as error:
            self._refuse(client_id, str(error))
            return None
        return read

    def _refuse(self, client_id: int, reason: str) -> None:
        failure, values = Failure(client_id, reason), {ROUND_FAILURE: client_id}
        where = self.record.server_round, client_id
        log.warning("round %d: reply of client %d refused: %s", *where, failure.reason, extra=values)
        self.record.failed.append(failure)

    def _start_of(self, client_id: int) -> Start:
        """Return, in full precision, what a client started from of the names that travel up."""
        profile = self._profile(client_id)
        if profile.rank not in self._starts:
            self._starts[profile.rank] = self._start_at(profile)
        return self._starts[profile.rank]

    def _start_at(self, profile: ClientProfile) -> Start:
        server = self.server_state
        uplink = self.aggregator.uplink(server.state, server.server_round + 1)
        state = server.state
        if profile.rank is not None:
            newcomer = ClientProfile(profile.rank, profile.scaling, NEVER)
            downlink = self.aggregator.downlink(server, newcomer)
            state = receive(downlink, cut_to_rank(server.state, profile.rank))
        return Start(
            profile=profile,
            state=flat({name: state[name] for name in uplink}),
            scaling=profile.scaling or server.scaling,
            auxiliary=self.aggregator.auxiliary(server),
        )

    def _client_of(self, message: Message) -> int:
        return self._clients[message.metadata.src_node_id]

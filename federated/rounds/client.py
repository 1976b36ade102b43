"""The ClientApp: receive, train, send what changed. One client's part of a round, on any engine.

A message carries what this client lacks of the global state; the client receives it, trains from it
(``federated.rounds.local_training``) and replies with the change. Nothing of one client stays behind in the
shared model for the next: what it is to remember goes into its ``Context.state``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.communication.messages import (
    CLIENT_ID,
    ENCODING_LOSS,
    NUM_EXAMPLES,
    RANK,
    SERVER_ROUND,
    SINCE,
    TRAIN_LOSS,
    read_broadcast,
    read_state,
    write_state,
)
from federated.communication.payload import CONFIG, METRICS, MetaValue
from federated.config.seeding import generator
from federated.methods import (
    NEVER,
    BaseDelta,
    Downlink,
    encoding_loss,
    join_auxiliary,
    receive,
    split_auxiliary,
    unpack_downlink,
)
from federated.rounds.batches import evaluate_client
from federated.rounds.client_ranks import scaling_at
from federated.rounds.client_state import (
    CODEC_MEMORY,
    HELD,
    MERGED,
    MERGED_VERSION,
    METHOD_MEMORY,
    VERSION,
    check_version,
    client_id_of,
    held_version,
    keep,
    keep_version,
    recall,
)
from federated.rounds.faults import fault_mod, fault_plan
from federated.rounds.local_training import Assignment, LocalResult, load_into_model, train_locally
from federated.rounds.run import Run
from models.state import State, layout_of, subtract_

LocalTraining = Callable[[Run, Assignment, State], LocalResult]
"""(run, who trains, the wire state it holds) -> what local training gives."""


def client_app(run: Run, train: LocalTraining = train_locally) -> ClientApp:
    """Return the app of a run's clients.

    Args:
        run: Model, data and settings.
        train: Takes the local steps; an engine may have taken them already.
    """
    app, faults = ClientApp(), fault_plan(run.config)

    @app.train(mods=[fault_mod(faults)] if faults else [])
    def answer_training(message: Message, context: Context) -> Message:
        return train_client(run, message, context, train)

    @app.evaluate()
    def answer_evaluation(message: Message, context: Context) -> Message:
        return evaluate(run, message, context)

    @app.query()
    def answer_query(message: Message, context: Context) -> Message:
        return identify(message, context)

    return app


def train_client(run: Run, message: Message, context: Context, train: LocalTraining) -> Message:
    """Reply to a training message: receive the global state, train from it, send what changed."""
    assignment, held = receive_message(run, message, context)
    result = train(run, assignment, held)
    change = subtract_(result.state, held, run.aggregator.uplink(held, assignment.server_round))
    update = join_auxiliary(change, result.auxiliary)
    reply = encode(run, update, context, assignment)
    decoded, sent = split_auxiliary(as_decoded(run, reply, update))
    remember(run, context, held, result, sent)
    told: dict[str, int | float | list[int] | list[float]] = {
        CLIENT_ID: assignment.client_id,
        NUM_EXAMPLES: result.num_examples,
        TRAIN_LOSS: result.train_loss,
        RANK: result.next_rank or 0,
    }
    if _reports_loss(run, assignment.server_round):
        told[ENCODING_LOSS] = lost_in_encoding(run, assignment, held, change, decoded)
    reply[METRICS] = MetricRecord(told)
    return Message(reply, reply_to=message)


def evaluate(run: Run, message: Message, context: Context) -> Message:
    """Reply to an evaluation message with the metrics on this client's own test samples."""
    assignment, held = receive_message(run, message, context)
    load_into_model(run, held, assignment.rank)
    metrics = evaluate_client(run, assignment.client_id)
    reply = {CLIENT_ID: assignment.client_id, NUM_EXAMPLES: int(metrics.pop("num_examples"))}
    return Message(RecordDict({METRICS: MetricRecord({**reply, **metrics})}), reply_to=message)


def identify(message: Message, context: Context) -> Message:
    """Tell the server which client this node is (Flower's own engines give nodes random ids)."""
    reply = MetricRecord({CLIENT_ID: client_id_of(context)})
    return Message(RecordDict({METRICS: reply}), reply_to=message)


# ---- receiving


def receive_message(run: Run, message: Message, context: Context) -> tuple[Assignment, State]:
    """Return what a client is to do, and the wire state that it holds once it has received a message.

    Raises:
        UserError: The message leaves out what this client should hold and does not.
    """
    config = cast(Mapping[str, int], message.content[CONFIG])
    received = read_broadcast(message.content, run.clients.downlink, run.downlink_layout)
    downlink = unpack_downlink(received, config)
    assignment = Assignment(
        client_id=client_id_of(context),
        server_round=int(config[SERVER_ROUND]),
        rank=int(config.get(RANK, 0)) or None,
        auxiliary=downlink.auxiliary,
        memory=recall(context, METHOD_MEMORY),
    )
    return assignment, _take_over(run, downlink, int(config.get(SINCE, NEVER)), context, assignment.rank)


def _take_over(run: Run, downlink: Downlink, since: int, context: Context, rank: int | None) -> State:
    """Return the wire state after a downlink, and keep what is to be kept of it.

    What the downlink left out is what the client held before; what it brings for the base model is merged.
    Private values are taken once: a server that never saw this client's reply may send them again.
    """
    check_version(context, VERSION, since)
    before = recall(context, HELD)
    held = receive(downlink, before or run.wire_state(rank))
    if private := run.aggregator.private(before):
        held = {**held, **{name: before[name] for name in private}}
    if run.aggregator.merges_into_base and not run.base.follow_server:
        _merge(run, context, downlink, since)
    if run.aggregator.clients_remember:
        keep(context, HELD, held)
        keep_version(context, VERSION, downlink.version)
    return held


def _merge(run: Run, context: Context, downlink: Downlink, since: int) -> None:
    """Make the base weights what they are on the server, which is in another process, and keep the sum.

    The process may be new to this message or have run other clients meanwhile, at other versions: all that
    the base becomes is made of what this client keeps. Where the server is in this process, its base serves.
    """
    check_version(context, MERGED_VERSION, since)
    version = held_version(context, MERGED_VERSION)
    run.base.check(downlink.base_updates)
    merged = {module: BaseDelta(dense=total) for module, total in recall(context, MERGED).items()}
    for module, update in downlink.base_updates.items():
        merged[module] = merged.get(module, BaseDelta()).received(update, version)
    run.base.hold(merged)
    keep(context, MERGED, {module: delta.total() for module, delta in merged.items()})
    keep_version(context, MERGED_VERSION, downlink.version)


# ---- sending


def encode(run: Run, update: State, context: Context, assignment: Assignment) -> RecordDict:
    """Encode an update; with error feedback, what the codec loses now is added to the next update.

    Auxiliary arrays are left out of that: what was lost of them, a method finds in its next ones.
    """
    codec = run.clients.uplink
    key = assignment.server_round, assignment.client_id
    rng = generator(run.clients.seed, "codec", *key) if codec.draws else None
    meta: dict[str, MetaValue] = {SERVER_ROUND: assignment.server_round}
    if not codec.error_feedback:
        return write_state(update, codec, rng, meta)
    memory = recall(context, CODEC_MEMORY)
    owed = {name: value + memory.get(name, 0.0) for name, value in update.items()}
    content = write_state(owed, codec, rng, meta)
    sent = as_decoded(run, content, owed)
    change, _ = split_auxiliary(owed)
    lost = {name: value - sent[name] for name, value in change.items()}
    keep(context, CODEC_MEMORY, {**memory, **lost})
    return content


def as_decoded(run: Run, content: RecordDict, state: State) -> State:
    """Return a state as the server will decode it."""
    codec = run.clients.uplink
    return state if codec.lossless else read_state(content, codec, layout_of(state))


def remember(run: Run, context: Context, held: State, result: LocalResult, sent: State) -> None:
    """Keep what stays with the client: its private values, and what the method remembers.

    Args:
        run: Says which.
        context: The client's.
        held: The wire state that it started from.
        result: Of its local training.
        sent: Its auxiliary arrays, as the server decodes them.
    """
    if private := run.aggregator.private(held):
        keep(context, HELD, {**held, **{name: result.state[name] for name in private}})
    if result.auxiliary:
        memory = recall(context, METHOD_MEMORY)
        keep(context, METHOD_MEMORY, run.aggregator.client.remember(memory, sent))


def _reports_loss(run: Run, server_round: int) -> bool:
    """Whether the server measures the aggregation error of a round and cannot know what the codec lost."""
    every = run.clients.error_every
    measured = run.aggregator.has_global_model and every and server_round % every == 0
    return bool(measured) and not run.clients.uplink.lossless


def lost_in_encoding(
    run: Run, assignment: Assignment, held: State, change: State, decoded: State
) -> list[float]:
    """Return the two numbers of ``EncodingLoss`` for a change that the server decodes to another one."""
    trained, known = (
        {**held, **{name: held[name] + delta[name] for name in change}} for delta in (change, decoded)
    )
    loss = encoding_loss(run.aggregator, trained, known, scaling_at(run, assignment.rank))
    return [loss.squared_distance, loss.squared_size_change]

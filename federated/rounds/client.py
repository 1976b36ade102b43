"""The ClientApp: decode, local steps, encode. One client's part of a round, on any engine.

A message carries what this client lacks of the global state; the client takes it in, trains from it
(``federated.rounds.local_training``) and answers with the difference. Nothing of one client stays behind in
the shared model for the next: what a method wants a client to remember goes into its ``Context.state``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.communication.codec import codec_from_name
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
from federated.methods import NEVER, BaseDelta, Downlink, encoding_loss, receive, unpack_downlink
from federated.methods.client_terms import ControlVariates, control_names, split_control, zero_variates
from federated.rounds.batches import evaluate_client
from federated.rounds.client_ranks import scaling_at
from federated.rounds.local_training import Assignment, LocalResult, load_into_model, train_locally
from federated.rounds.run import Run
from models.errors import UserError
from models.state import State, layout_of, subtract_

HELD, VERSION, CODEC_MEMORY, VARIATE = "held", "version", "codec-memory", "variate"
MERGED, MERGED_VERSION = "merged", "merged-version"
"""Keys in ``Context.state``: the wire state a client holds, its version, what its codec still owes and its
control variate; what has been merged into each base weight, as one sum, and the version of that."""

LocalTraining = Callable[[Run, Assignment, State], LocalResult]
"""(run, who trains, the wire state it holds) -> what local training gives."""


def client_app(run: Run, train: LocalTraining = train_locally) -> ClientApp:
    """Return the app of a run's clients.

    Args:
        run: Model, data and settings.
        train: Takes the local steps; an engine may have taken them already.
    """
    app = ClientApp()

    @app.train()
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
    """Answer a training message with this client's update."""
    assignment = _assignment(message, context)
    held, server_variate = take_in(run, message, context, assignment.rank)
    variates = None
    if run.config.client.scaffold:
        own = recall(context, VARIATE) or zero_variates(server_variate)
        variates = ControlVariates(server_variate, own)
        assignment = replace(assignment, variates=variates)
    result = train(run, assignment, held)
    uplink = run.aggregator.uplink(held, assignment.server_round)
    delta = subtract_(result.state, held, uplink)
    if variates is not None and result.own_variate is not None:
        change = control_names({n: new - variates.own[n] for n, new in result.own_variate.items()})
        delta = {**delta, **change}
    private = run.aggregator.private(held)
    if private:
        keep(context, HELD, {**held, **{name: result.state[name] for name in private}})
    metrics: dict[str, int | float | list[int] | list[float]] = {
        CLIENT_ID: assignment.client_id,
        NUM_EXAMPLES: result.num_examples,
        TRAIN_LOSS: result.train_loss,
        RANK: result.next_rank or 0,
    }
    content = encode(run, delta, context, assignment)
    reports_loss = _reports_loss(run, assignment.server_round)
    if variates is not None or reports_loss:
        decoded, change = split_control(_as_decoded(run, content, delta))
        if variates is not None:  # what the server decodes, so that c stays the mean of all c_k
            keep(context, VARIATE, {name: variates.own[name] + value for name, value in change.items()})
        if reports_loss:
            trained, known = ({**held, **{n: held[n] + d[n] for n in uplink}} for d in (delta, decoded))
            scaling = scaling_at(run, assignment.rank)
            loss = encoding_loss(run.aggregator, trained, known, scaling)
            metrics[ENCODING_LOSS] = [loss.squared_distance, loss.squared_size_change]
    content[METRICS] = MetricRecord(metrics)
    return Message(content, reply_to=message)


def evaluate(run: Run, message: Message, context: Context) -> Message:
    """Answer an evaluation message with the metrics on this client's own test samples."""
    assignment = _assignment(message, context)
    held, _ = take_in(run, message, context, assignment.rank)
    load_into_model(run, held, assignment.rank)
    metrics = evaluate_client(run, assignment.client_id)
    reply = {CLIENT_ID: assignment.client_id, NUM_EXAMPLES: int(metrics.pop("num_examples"))}
    return Message(RecordDict({METRICS: MetricRecord({**reply, **metrics})}), reply_to=message)


def identify(message: Message, context: Context) -> Message:
    """Tell the server which client this node is (Flower's own engines give nodes random ids)."""
    reply = MetricRecord({CLIENT_ID: _client_id(context)})
    return Message(RecordDict({METRICS: reply}), reply_to=message)


def take_in(run: Run, message: Message, context: Context, rank: int | None) -> tuple[State, State]:
    """Return the wire state that this client holds once it has received a downlink, and SCAFFOLD's c.

    What the downlink left out is what the client held before; what it brings for the base model is merged.
    Private values are taken once: a server that never saw this client's answer may send them again.

    Raises:
        UserError: The downlink leaves out what this client should hold and does not.
    """
    config = cast(Mapping[str, int], message.content[CONFIG])
    codec = codec_from_name(run.config.communication.downlink)
    received = read_broadcast(message.content, codec, run.downlink_layout)
    values, server_variate = split_control(received)
    downlink = unpack_downlink(values, config)
    since = int(config.get(SINCE, NEVER))
    _check_version(context, VERSION, since)
    before = recall(context, HELD)
    held = receive(downlink, before or run.wire_state(rank))
    if private := run.aggregator.private(before):
        held = {**held, **{name: before[name] for name in private}}
    if run.aggregator.merges_into_base and not run.base.follow_server:
        _merge(run, context, downlink, since)
    if run.aggregator.clients_remember:
        keep(context, HELD, held)
        _keep_version(context, VERSION, downlink.version)
    return held, server_variate


def _merge(run: Run, context: Context, downlink: Downlink, since: int) -> None:
    """Make the base weights what they are on the server, which is in another process, and keep the sum.

    The process may be new to this message or have run other clients meanwhile, at other versions: all that
    the base becomes is made of what this client keeps. Where the server is in this process, its base serves.

    Raises:
        UserError: The downlink leaves out what this client should keep and does not.
    """
    _check_version(context, MERGED_VERSION, since)
    held_version = _version(context, MERGED_VERSION)
    run.base.check(downlink.base_updates)
    merged = {module: BaseDelta(dense=total) for module, total in recall(context, MERGED).items()}
    for module, update in downlink.base_updates.items():
        merged[module] = merged.get(module, BaseDelta()).received(update, held_version)
    run.base.hold(merged)
    keep(context, MERGED, {module: delta.total() for module, delta in merged.items()})
    _keep_version(context, MERGED_VERSION, downlink.version)


def encode(run: Run, delta: State, context: Context, assignment: Assignment) -> RecordDict:
    """Encode an update; with error feedback, what the codec loses now is added to the next update.

    Changes of control variates are left out of that: each is the way from what the server has decoded so far
    to where the variate should be, so that what was lost is in the next change already.
    """
    codec = codec_from_name(run.config.communication.uplink)
    key = assignment.server_round, assignment.client_id
    rng = generator(run.config.seed, "codec", *key) if codec.draws else None
    meta: dict[str, MetaValue] = {SERVER_ROUND: assignment.server_round}
    if not codec.error_feedback:
        return write_state(delta, codec, rng, meta)
    memory = recall(context, CODEC_MEMORY)
    owed = {name: value + memory.get(name, 0.0) for name, value in delta.items()}
    content = write_state(owed, codec, rng, meta)
    sent = _as_decoded(run, content, owed)
    update, _ = split_control(owed)
    lost = {name: value - sent[name] for name, value in update.items()}
    keep(context, CODEC_MEMORY, {**memory, **lost})
    return content


def _reports_loss(run: Run, server_round: int) -> bool:
    """Whether the server measures the aggregation error of a round and cannot know what the codec lost."""
    every = run.config.evaluation.aggregation_error_every
    measured = run.aggregator.has_global_model and every and server_round % every == 0
    return bool(measured) and not codec_from_name(run.config.communication.uplink).lossless


def _as_decoded(run: Run, content: RecordDict, state: State) -> State:
    """Return a state as the server will decode it."""
    codec = codec_from_name(run.config.communication.uplink)
    return read_state(content, codec, layout_of(state))


def keep(context: Context, key: str, state: State) -> None:
    """Store named arrays in the client's own state; they reach it again with its next message."""
    context.state[key] = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in state.items()})


def recall(context: Context, key: str) -> State:
    """Return what ``keep`` stored under ``key``; empty when this client has stored nothing yet."""
    if key not in context.state:
        return {}
    record = cast(Mapping[str, Array], context.state[key])
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def _check_version(context: Context, key: str, since: int) -> None:
    """Raise UserError if a downlink holds only what changed since a version that this client never had."""
    if since > (version := _version(context, key)):
        raise UserError(
            f"client {_client_id(context)} has lost its state: it was sent what changed since round {since}, "
            f"and holds round {version}; the server's next message to it will bring everything"
        )


def _version(context: Context, key: str) -> int:
    if key not in context.state:
        return NEVER
    return int(cast(Mapping[str, int], context.state[key])[key])


def _keep_version(context: Context, key: str, version: int) -> None:
    context.state[key] = ConfigRecord({key: version})


def _assignment(message: Message, context: Context) -> Assignment:
    config = cast(Mapping[str, int], message.content[CONFIG])
    return Assignment(_client_id(context), int(config[SERVER_ROUND]), int(config.get(RANK, 0)) or None)


def _client_id(context: Context) -> int:
    return int(cast(int, context.node_config["partition-id"]))

"""Reading what clients send: a reply becomes an update, or a reason why it cannot be one.

Here a reply only has to be readable; whatever a client sends in its place, the round goes on.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, Metadata, MetricRecord, RecordDict

from federated.communication.codec import Codec
from federated.communication.messages import (
    CLIENT_ID,
    ENCODING_LOSS,
    NUM_EXAMPLES,
    RANK,
    SERVER_ROUND,
    TRAIN_LOSS,
    read_state,
)
from federated.communication.payload import CONFIG, METRICS
from federated.methods import ClientProfile, EncodingLoss, Update, join_auxiliary, split_auxiliary
from federated.results.wording import is_share
from models.state import Layout, State, add_, layout_of

MAX_LOSS = 1e6
"""Largest mean training loss that is averaged over a cohort; more would own the figure of the round."""

_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, EOFError, OSError)
"""What decoding nonsense can raise, PayloadError (a ValueError) included."""


TRAINING_ENTRIES = frozenset({"train_loss", "num_examples"})
"""A client's entries of a round's record that come from its training; no evaluation may write them."""

_METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_@.-]{0,63}")
_MAX_METRICS = 64


class UnreadableReplyError(ValueError):
    """A reply that cannot be read; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Start:
    """What a client started its local training from, as the server knows it in full precision.

    Attributes:
        profile: Its rank and scaling.
        state: The values of the names that travel up.
        scaling: Module -> s_k.
        auxiliary: What the method sent beside them; the client sends back arrays of the same names.
    """

    profile: ClientProfile
    state: State
    scaling: Mapping[str, float]
    auxiliary: State

    @functools.cached_property
    def reply_layout(self) -> Layout:
        """Names and shapes of what the client replies with."""
        return layout_of(join_auxiliary(self.state, self.auxiliary))


@dataclass(frozen=True, eq=False)
class TrainingReply:
    """A client's reply to a training message, decoded.

    Attributes:
        update: What goes into the aggregator.
        train_loss: Mean loss of its local steps.
        next_rank: The rank that it goes on with; None where all have the server's.
        encoding_loss: What its codec lost, as it says; None where it does not.
    """

    update: Update
    train_loss: float
    next_rank: int | None
    encoding_loss: EncodingLoss | None = None


def check_origin(reply: Message, sent: Metadata, server_round: int) -> None:
    """Refuse a reply to anything but the message that its client was sent in this round.

    Args:
        reply: The reply.
        sent: What identifies that message; the grid has written its id there.
        server_round: The round, which a training reply repeats.

    Raises:
        UnreadableReplyError: It came late, from an earlier round or phase.
    """
    told = reply.metadata
    answered = told.reply_to_message_id, told.group_id, told.message_type
    config = reply.content.get(CONFIG) if reply.has_content() else None
    trained_in = config.get(SERVER_ROUND, server_round) if isinstance(config, ConfigRecord) else server_round
    if answered != (sent.message_id, sent.group_id, sent.message_type) or trained_in != server_round:
        origin = f"of round {trained_in!r}" if trained_in != server_round else "of an earlier round or phase"
        raise UnreadableReplyError(
            f"the reply is to a message {origin}, not to the one that it was sent in this round"
        )


@dataclass(frozen=True)
class ShardSizes:
    """What the server knows of its clients' data; None: nothing.

    Attributes:
        train: Training rows of a client.
        test: Rows that it keeps for its own evaluation.
    """

    train: Callable[[int], int | None] = lambda client_id: None
    test: Callable[[int], int | None] = lambda client_id: None

    def check_train(self, client_id: int, told: float) -> None:
        """Raise UnreadableReplyError where a client says that it trained on more examples than it has."""
        _check_examples("trained on", told, self.train(client_id))

    def check_test(self, client_id: int, told: float) -> None:
        """Raise UnreadableReplyError where a client says that it evaluated on more examples than it has."""
        _check_examples("evaluated on", told, self.test(client_id))


def _check_examples(verb: str, told: float, known: int | None) -> None:
    if known is not None and told > known:
        raise UnreadableReplyError(
            f"it says that it {verb} {told:g} examples, but its shard has {known}: client and server must "
            "have one configuration and the same data"
        )


def read_training_reply(client_id: int, content: RecordDict, codec: Codec, start: Start) -> TrainingReply:
    """Turn a reply into an update; the client's new values are written over its delta.

    Raises:
        UnreadableReplyError: The payload does not fit what was asked for, or the metrics do not.
    """
    try:
        delta, auxiliary = split_auxiliary(read_state(content, codec, start.reply_layout))
        metrics = _metrics(content)
        num_examples, train_loss = int(metrics[NUM_EXAMPLES]), float(metrics[TRAIN_LOSS])
        next_rank = _checked_rank(start.profile, int(metrics[RANK]))
        loss = _encoding_loss(metrics)
    except _UNREADABLE as error:
        raise UnreadableReplyError(_reason(error)) from error
    if not abs(train_loss) <= MAX_LOSS:
        raise UnreadableReplyError(f"the mean loss of its local steps is {train_loss}")
    update = Update(
        client_id=client_id,
        num_examples=num_examples,
        state=add_(delta, start.state),
        scaling=start.scaling,
        rank=start.profile.rank,
        start=start.state,
        auxiliary=auxiliary,
    )
    return TrainingReply(update, train_loss, next_rank, loss)


def read_evaluation(content: RecordDict) -> dict[str, float]:
    """Return a client's metrics on its own test rows under their names in ``metrics.jsonl``.

    Raises:
        UnreadableReplyError: There are none, they are no finite numbers, a share is outside 0 to 1, or a name
            is no metric's.
    """
    try:
        metrics = _metrics(content)
        num_examples = int(metrics.pop(NUM_EXAMPLES))
        metrics.pop(CLIENT_ID, None)
        _check_names(metrics)
        entry = {"eval_loss" if key == "loss" else key: float(value) for key, value in metrics.items()}
    except _UNREADABLE as error:
        raise UnreadableReplyError(_reason(error)) from error
    if num_examples <= 0:
        raise UnreadableReplyError(f"it evaluated on {num_examples} examples")
    for name, value in entry.items():
        if not math.isfinite(value):
            raise UnreadableReplyError(f"its {name} is {value}")
        if is_share(name) and not 0 <= value <= 1:
            raise UnreadableReplyError(f"its {name} is {value:g}, which is no share of examples")
    return {"eval_examples": num_examples, **entry}


def _check_names(metrics: Mapping[str, Any]) -> None:
    """Raise ValueError where a name is no metric's, or one that the record itself writes."""
    if len(metrics) > _MAX_METRICS:
        raise ValueError(f"it sent {len(metrics)} metrics, where {_MAX_METRICS} are the most")
    for name in metrics:
        if (
            name in TRAINING_ENTRIES
            or name in ("eval_examples", "eval_loss")
            or not _METRIC_NAME.fullmatch(name)
        ):
            raise ValueError(
                f"it sent a metric named {name!r}, which is no name of a metric on its test rows"
            )


def _metrics(content: RecordDict) -> dict[str, Any]:
    record = content[METRICS]
    if not isinstance(record, MetricRecord):
        raise TypeError(f"the record '{METRICS}' is a {type(record).__name__}")
    return dict(record)


def _encoding_loss(metrics: Mapping[str, Any]) -> EncodingLoss | None:
    if ENCODING_LOSS not in metrics:
        return None
    distance, change = (float(value) for value in metrics[ENCODING_LOSS])
    if not (math.isfinite(distance) and math.isfinite(change) and distance >= 0):
        raise ValueError(f"the loss of its encoding is {[distance, change]}")
    return EncodingLoss(distance, change)


def _checked_rank(profile: ClientProfile, asked: int) -> int | None:
    if profile.rank is None or asked == 0:
        return None
    if not 1 <= asked <= profile.rank:
        raise ValueError(f"it asks for rank {asked} after {profile.rank}")
    return asked


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the reply has no {error}"
    return str(error) or type(error).__name__

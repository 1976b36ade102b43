"""Faults on purpose: which client fails how in which round, and the two places where that is brought about.

What a client does wrong happens in its app (``fault_mod``, a Flower mod), so that its own state is what a
real failure leaves behind, on any engine. What becomes of messages on their way happens around the grid
(``faulty_delivery``). A fault strikes training messages; evaluations are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict

from federated.communication.messages import NUM_EXAMPLES, SERVER_ROUND
from federated.communication.metered_grid import Delivery
from federated.communication.payload import ARRAYS, CONFIG, FLAT, METRICS, pack
from federated.config.schema import ExperimentConfig
from federated.config.seeding import generator
from federated.rounds.client_state import client_id_of

_LIE = 1000
"""Times the examples that a client has."""


class PlannedCrashError(RuntimeError):
    """A client's crash that the configuration asked for."""


@dataclass(frozen=True)
class FaultPlan:
    """Who fails how.

    Attributes:
        seed: Of the run.
        shares: Fault -> the share of training messages that it strikes; their sum is at most 1.
    """

    seed: int
    shares: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there are faults at all."""
        return any(self.shares.values())

    def of(self, server_round: int, client_id: int) -> str | None:
        """Return the fault that strikes a client in a round; None where none does."""
        if not self:
            return None
        drawn = generator(self.seed, "faults", server_round, client_id).random()
        for fault, share in self.shares.items():
            drawn -= share
            if drawn < 0:
                return fault
        return None


def fault_plan(config: ExperimentConfig) -> FaultPlan:
    """Return the plan of a run."""
    return FaultPlan(config.seed, config.faults.shares)


def fault_mod(plan: FaultPlan) -> Callable[..., Message]:
    """Return the mod that makes a client's training fail as planned."""

    def mod(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
        fault = plan.of(round_of(message), client_id_of(context))
        if fault == "crash_before_training":
            raise PlannedCrashError("before it trained")
        reply = call_next(message, context)
        if fault == "crash_after_training":
            raise PlannedCrashError("after it trained")
        if fault in SPOILS:
            SPOILS[fault](reply.content)
        return reply

    return mod


def faulty_delivery(deliver: Delivery, plan: FaultPlan, client_of: Callable[[int], int]) -> Delivery:
    """Return a delivery that loses and repeats training messages as planned.

    Args:
        deliver: Delivers all of them, once.
        plan: Who is struck.
        client_of: Client id of a node id.
    """

    def struck(message: Message, node_id: int) -> str | None:
        is_training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
        return plan.of(int(message.metadata.group_id), client_of(node_id)) if is_training else None

    def faulty(messages: Sequence[Message], timeout: float | None) -> Iterable[Message]:
        reached = [m for m in messages if struck(m, m.metadata.dst_node_id) != "dropout"]
        for reply in deliver(reached, timeout) if reached else ():
            yield reply
            if struck(reply, reply.metadata.src_node_id) == "duplicate":
                yield reply

    return faulty if plan else deliver


def round_of(message: Message) -> int:
    """Return the round of a message from the server."""
    return int(cast(Mapping[str, int], message.content[CONFIG])[SERVER_ROUND])


# ---- what spoils a reply


def _not_finite(content: RecordDict) -> None:
    """Make every value NaN: in floats of any width, and in the scales of integers, all bits set are one."""
    values = content.array_records[ARRAYS][FLAT].numpy()
    spoilt = np.full(values.nbytes, 0xFF, dtype=np.uint8).view(values.dtype)
    content[ARRAYS] = ArrayRecord({FLAT: Array(spoilt)})


def _wrong_shape(content: RecordDict) -> None:
    """Send one value more, in a payload that is sound in itself."""
    config = cast(Mapping[str, int], content[CONFIG])
    values = content.array_records[ARRAYS][FLAT].numpy()
    longer = np.append(values, values[:1])
    packed = pack(
        longer,
        (("values", (int(longer.size),)),),
        "fp32",
        meta={SERVER_ROUND: int(config[SERVER_ROUND])},
        send_layout=False,
    )
    content[ARRAYS], content[CONFIG] = packed[ARRAYS], packed[CONFIG]


def _lying_examples(content: RecordDict) -> None:
    told = cast(MetricRecord, content[METRICS])
    told[NUM_EXAMPLES] = _LIE * int(cast(int, told[NUM_EXAMPLES]))


def _torn_payload(content: RecordDict) -> None:
    whole = content.array_records[ARRAYS][FLAT]
    half = whole.data[: len(whole.data) // 2]
    torn = Array(dtype=whole.dtype, shape=whole.shape, stype=whole.stype, data=half)
    content[ARRAYS] = ArrayRecord({FLAT: torn})


SPOILS: dict[str, Callable[[RecordDict], None]] = {
    "not_finite": _not_finite,
    "wrong_shape": _wrong_shape,
    "lying_examples": _lying_examples,
    "torn_payload": _torn_payload,
}
"""Fault -> what it makes of the content of a reply."""

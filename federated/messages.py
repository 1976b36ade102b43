"""What server and clients say to each other: a state, encoded by a codec, in one Flower record.

Where it stands in a round: ``write_state`` fills the content of the downlink and of the uplink,
``read_state`` opens it on the other side. Codecs and payloads meet here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import RecordDict

from federated.codecs import Codec
from federated.payload import (
    CONFIG,
    LAYOUT,
    Layout,
    MetaValue,
    PayloadError,
    layout_of,
    num_values,
    pack,
    unpack,
)
from models.state import State

SERVER_ROUND = "server-round"
NUM_VALUES = "num-values"
NUM_EXAMPLES = "num-examples"
CLIENT_ID = "client-id"
TRAIN_LOSS = "train-loss"
RANK = "rank"
SINCE = "since"
"""Keys in the records ``config`` and ``metrics``."""


def write_state(
    state: State,
    codec: Codec,
    rng: np.random.Generator,
    meta: Mapping[str, MetaValue],
    *,
    send_layout: bool = False,
) -> RecordDict:
    """Encode a state into the content of a message.

    Args:
        state: What to send.
        codec: How to encode it.
        rng: Source of stochastic rounding.
        meta: Further entries of the config record, the server round among them.
        send_layout: Whether names and shapes travel; without them the receiver must know the layout.

    Returns:
        The records; what the receiver will make of them is ``read_state``'s.
    """
    layout = layout_of(state)
    return pack(
        codec.encode(state, rng),
        layout,
        codec.name,
        meta={**meta, NUM_VALUES: num_values(layout)},
        send_layout=send_layout,
    )


def read_state(content: RecordDict, codec: Codec, layout: Layout, *, any_layout: bool = False) -> State:
    """Decode the state of a message.

    Args:
        content: What ``write_state`` returned, on the other side.
        codec: The codec that was agreed on.
        layout: The layout that the receiver expects.
        any_layout: Accept the layout that travelled in place of it. A client trusts the server so far; the
            server never trusts a client.

    Raises:
        PayloadError: The payload is damaged, of another codec or of another layout.
    """
    travelled = any_layout and LAYOUT in content.get(CONFIG, ())
    payload = unpack(content, None if travelled else layout)
    if payload.codec != codec.name:
        raise PayloadError(
            f"the payload is encoded with {payload.codec}, the configuration says {codec.name}: "
            "use one configuration on both sides"
        )
    return codec.decode(payload.buffer, payload.layout)

"""What server and clients say to each other: a state, encoded by a codec, in one Flower record.

``write_state`` fills the content of the downlink and of the uplink, ``read_state`` opens it on the other
side, ``read_broadcast`` once for all clients of a process. Codecs and payloads meet here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from federated.communication.codec import Codec
from federated.communication.payload import (
    ARRAYS,
    CONFIG,
    FLAT,
    LAYOUT,
    MetaValue,
    PayloadError,
    pack,
    unpack,
)
from models.state import Layout, State, layout_of

SERVER_ROUND = "server-round"
NUM_VALUES = "num-values"
NUM_EXAMPLES = "num-examples"
CLIENT_ID = "client-id"
TRAIN_LOSS = "train-loss"
ENCODING_LOSS = "encoding-loss"
RANK = "rank"
SINCE = "since"
"""Keys in the records ``config`` and ``metrics``."""

_Entries = tuple[tuple[str, MetaValue], ...]

_MAX_SHARED_VALUES = 4_000_000
"""Largest state that stays decoded for the next client, 16 MB; the last four do."""


def write_state(
    state: State,
    codec: Codec,
    rng: np.random.Generator | None,
    meta: Mapping[str, MetaValue],
    *,
    send_layout: bool = False,
) -> RecordDict:
    """Encode a state into the content of a message.

    Args:
        state: What to send.
        codec: How to encode it.
        rng: Source of stochastic rounding; None for a codec that does not draw.
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
        meta={**meta, NUM_VALUES: codec.num_sent(layout)},
        send_layout=send_layout,
    )


def read_state(content: RecordDict, codec: Codec, layout: Layout | None) -> State:
    """Decode the state of a message.

    Args:
        content: What ``write_state`` returned, on the other side.
        codec: The codec that was agreed on.
        layout: The layout that the receiver expects; None: the one that travelled. A client trusts the server
            so far; the server never trusts a client.

    Raises:
        PayloadError: The payload is damaged, of another codec or of another layout.
    """
    payload = unpack(content, layout)
    if payload.codec != codec.name:
        raise PayloadError(
            f"the payload is encoded with {payload.codec}, the configuration says {codec.name}: "
            "use one configuration on both sides"
        )
    return codec.decode(payload.buffer, payload.layout)


def read_broadcast(content: RecordDict, codec: Codec, layout: Layout) -> State:
    """Decode the state of a downlink: of this layout, or of the one that travelled with it.

    Clients of one process that receive the same bytes share the tensors, which are to be read only. A round
    has as many different downlinks as its clients have ranks and versions.

    Raises:
        PayloadError: As ``read_state``.
    """
    arrays, config = content.get(ARRAYS), content.get(CONFIG)
    expected = None if isinstance(config, ConfigRecord) and LAYOUT in config else layout
    if isinstance(arrays, ArrayRecord) and isinstance(config, ConfigRecord) and set(arrays) == {FLAT}:
        array, entries = arrays[FLAT], tuple(config.items())
        if _is_small(config) and not any(isinstance(value, list) for _, value in entries):
            kind = array.dtype, tuple(array.shape), array.stype
            return _decoded_once(array.data, kind, cast(_Entries, entries), codec, expected)
    return read_state(content, codec, expected)


def _is_small(config: ConfigRecord) -> bool:
    count = config.get(NUM_VALUES)
    return isinstance(count, int) and count <= _MAX_SHARED_VALUES


@functools.lru_cache(maxsize=4)
def _decoded_once(
    data: bytes,
    kind: tuple[str, tuple[int, ...], str],
    config: _Entries,
    codec: Codec,
    layout: Layout | None,
) -> State:
    """``read_state`` of the content that these parts make; they are all that it depends on."""
    dtype, shape, stype = kind
    array = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    content = RecordDict({ARRAYS: ArrayRecord({FLAT: array}), CONFIG: ConfigRecord(dict(config))})
    return read_state(content, codec, layout)

"""How many bytes a message is: the encoded tensor data alone, and everything that Flower serialises."""

from __future__ import annotations

import copy
import functools

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute

from federated.communication.payload import ARRAYS, MetaValue

_NPY_START = len(b"\x93NUMPY\x01\x00") + 2
"""Bytes of a numpy header before its text, whose length the last two of them say."""


def payload_bytes(content: RecordDict | Message) -> int:
    """Return the bytes of encoded tensor data, scales and indices included (0 without arrays).

    They are counted in what arrived; what its sender says of shapes and types counts for nothing.
    """
    return sum(_data_bytes(array) for array in _arrays_of(content))


def num_items(content: RecordDict | Message) -> int:
    """Return how many numbers the arrays of a message hold, counted as ``payload_bytes`` counts."""
    return sum(_data_bytes(array) // _item_bytes(array) for array in _arrays_of(content))


def _arrays_of(content: RecordDict | Message) -> list[Array]:
    record = _content_of(content)
    arrays = None if record is None else record.get(ARRAYS)
    return list(arrays.values()) if isinstance(arrays, ArrayRecord) else []


def _data_bytes(array: Array) -> int:
    data = array.data
    if not data.startswith(b"\x93NUMPY"):
        return len(data)
    return max(0, len(data) - _NPY_START - int.from_bytes(data[_NPY_START - 2 : _NPY_START], "little"))


def _item_bytes(array: Array) -> int:
    try:
        return np.dtype(array.dtype).itemsize or 1
    except TypeError:  # a client may write nonsense
        return 1


def wire_bytes(content: RecordDict | Message) -> int:
    """Return the bytes that Flower serialises for a message, its Message object included, or for records.

    Everything is really serialised save the arrays' data, whose length is known and which would cost
    4.6 ms a MB to copy and hash; a test holds the sum to Flower's own, byte for byte. What Flower sends once
    because it is equal counts every time: 5 MiB chunks inside one array (a state of zeros is not cheaper),
    and records under two names.
    HTTP headers, TLS and retries come on top (measured: about 1 % for one flat array).
    """
    record = _content_of(content)
    if record is None:
        return _serialised_bytes(content)
    leaves = [item for item in record.values() if not isinstance(item, ArrayRecord)]
    total = _frame_bytes(_frame_of(record)) + sum(_leaf_bytes(item) for item in leaves)
    return total + (message_object_bytes(content) if isinstance(content, Message) else 0)


def message_object_bytes(message: Message) -> int:
    """Return the bytes of the Message object that Flower sends beside a message's records.

    Sender, receiver, type, times and ids; their lengths depend a little on the engine, whose ids they are.
    """
    shell = copy.copy(message)
    if message.has_content():
        shell.content = RecordDict()
    return len(shell.deflate())


def _leaf_bytes(record: ConfigRecord | MetricRecord) -> int:
    """Return the bytes of a record of values; the config of a round's messages is serialised once."""
    if isinstance(record, MetricRecord) or any(isinstance(value, list) for value in record.values()):
        return len(record.deflate())
    return _config_bytes(tuple((key, type(value), value) for key, value in record.items()))


@functools.lru_cache(maxsize=256)
def _config_bytes(entries: tuple[tuple[str, type, MetaValue], ...]) -> int:
    return len(ConfigRecord({key: value for key, _, value in entries}).deflate())


def _serialised_bytes(tree: RecordDict | Message) -> int:
    with no_object_id_recompute():  # else each object's name is hashed again by all that contain it
        return sum(len(item.deflate()) for item in get_all_nested_objects(tree).values())


_ArraySize = tuple[str, str, tuple[int, ...], str, int]
_Frame = tuple[tuple[str, tuple[_ArraySize, ...] | None], ...]
"""Of each record its name, and of its arrays key, dtype, shape, format and bytes (None: it has no arrays)."""


def _frame_of(content: RecordDict) -> _Frame:
    return tuple(
        (name, tuple((key, a.dtype, tuple(a.shape), a.stype, len(a.data)) for key, a in record.items()))
        if isinstance(record, ArrayRecord)
        else (name, None)
        for name, record in content.items()
    )


@functools.lru_cache(maxsize=256)
def _frame_bytes(frame: _Frame) -> int:
    """Return the bytes of a record dict and its arrays, without its other records.

    Arrays are serialised with a few bytes in place of each chunk of data, other records with their name in
    place of their entries. The only use of Flower's internals outside federated/engines; tested with flwr
    1.41-1.42.
    """
    hollow, total = RecordDict(), 0
    for name, arrays in frame:
        if arrays is None:
            stand_in = ConfigRecord({"name": name})
            hollow[name] = stand_in
            total -= len(stand_in.deflate())
            continue
        twins = ArrayRecord()
        for key, dtype, shape, stype, num_data_bytes in arrays:
            starts = range(0, num_data_bytes, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)
            sizes = [min(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, num_data_bytes - start) for start in starts]
            labels = [f"{name} {key} {index}".encode() for index in range(len(sizes))]
            chunks = [ArrayChunk(memoryview(label)) for label in labels]
            twin = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
            twin.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
            twins[key] = twin
            for size, label in zip(sizes, labels, strict=True):  # a chunk's head spells its length in digits
                total += size + len(str(size)) - len(label) - len(str(len(label)))
        hollow[name] = twins
    return total + _serialised_bytes(hollow)


def _content_of(content: RecordDict | Message) -> RecordDict | None:
    if isinstance(content, Message):
        return content.content if content.has_content() else None
    return content

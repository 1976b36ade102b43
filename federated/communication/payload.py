"""Payloads: one flat Flower array plus a small manifest.

The last step before a message leaves (``pack``) and the first after it arrives (``unpack``), on both sides.
``federated.communication.codec`` turns named tensors into the flat buffer and back; this file never looks
inside the buffer.

A LoRA state is about a hundred small tensors. As a hundred Flower arrays it costs 195 objects, each a request
of its own; as one flat array it costs five. So a message carries exactly one ``ArrayRecord`` with one array,
and the names and shapes travel beside it in the ``ConfigRecord``, compressed, together with their digest.

How many bytes a message is, ``federated.communication.byte_counts`` says.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import SType
from pydantic import FailFast, Field, TypeAdapter

from models.errors import UserError, shortened
from models.state import FlatState, Layout, State, num_values, vector_of
from models.untrusted import parse_json, parsing

MetaValue = int | float | str | bytes | bool
"""What may stand in the config record beside the manifest."""

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
"""Keys of the three records of a message, as Flower's own strategies name them."""

FLAT = "state"
"""Key of the one array inside the array record."""

LARGEST_FP32 = float(np.finfo(np.float32).max)

_CODEC, _DIGEST, _LENGTH, LAYOUT = "payload-codec", "payload-digest", "payload-bytes", "payload-layout"
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_LAYOUT_BYTES = 8_000_000  # of JSON; a full CLIP has about 30 kB
MOST_VALUES = 2**33
"""Most values of a state; the largest CLIP has 5e9."""
_LAYOUT = TypeAdapter(
    Annotated[
        tuple[
            tuple[
                Annotated[str, Field(max_length=1000)],
                Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=8)],
            ],
            ...,
        ],
        FailFast(),
    ]
)
_NUM_NAMES_SHOWN = 3


class PayloadError(UserError):
    """A payload that cannot be packed or trusted. The message says what differs, and where."""


@dataclass(frozen=True)
class Payload:
    """What ``unpack`` returns.

    Attributes:
        buffer: The encoded state, one-dimensional, in the dtype that the codec chose; read only.
        layout: Names and shapes of the state.
        codec: Name of the codec that decodes the buffer.
        meta: Every other entry of the config record.
    """

    buffer: np.ndarray
    layout: Layout
    codec: str
    meta: dict[str, Any] = field(default_factory=dict)


# ---- layout and flat vector


def flatten(
    state: Mapping[str, torch.Tensor], layout: Layout, *, largest: float = LARGEST_FP32
) -> np.ndarray:
    """Lay the tensors of a state end to end.

    Args:
        state: Named tensors.
        layout: Theirs, ``layout_of(state)``.
        largest: The largest magnitude that can be sent.

    Returns:
        float32 vector, (num_values(layout),), to be read only: where the tensors already lie end to end in
        memory, it is that memory.

    Raises:
        PayloadError: A value is NaN or beyond ``largest``.
    """
    if not layout:
        return np.zeros(0, dtype=np.float32)
    joined = vector_of(state, tuple(name for name, _ in layout)).detach()
    vector = joined.to(device="cpu", dtype=torch.float32).numpy()
    check_finite(vector, layout, largest=largest)
    return vector


def unflatten(vector: np.ndarray, layout: Layout) -> State:
    """Cut a float32 vector back into named tensors; they share its memory.

    Raises:
        PayloadError: The vector is not as long as the layout says.
    """
    if vector.size != num_values(layout):
        raise PayloadError(f"the payload holds {vector.size} values, its layout {num_values(layout)}")
    return FlatState(torch.from_numpy(vector), layout)


def check_finite(vector: np.ndarray, layout: Layout, *, largest: float = LARGEST_FP32) -> None:
    """Raise PayloadError naming the first tensor of a flat state with a NaN or more than ``largest``."""
    values = torch.from_numpy(vector)
    length = math.sqrt(float(values.dot(values)))  # infinite or NaN where a value is, or is above 2e19
    if length < 0.99 * largest:
        return
    valid = np.abs(vector) <= largest
    if valid.all():
        return
    first = int(np.argmin(valid))
    ends = np.cumsum([math.prod(shape) for _, shape in layout])
    name = layout[int(np.searchsorted(ends, first, side="right"))][0]
    count = vector.size - int(np.count_nonzero(valid))
    wrong, remedy = "which is not a finite number", "lower client.learning_rate or set client.clip_norm"
    if np.isfinite(vector[first]):
        wrong, remedy = f"but at most {largest:.4g} can be sent", f"{remedy}, or take a codec of wider range"
    raise PayloadError(
        f"tensor {name} holds {vector[first]}, {wrong} (values that cannot be sent: {count}): {remedy}"
    )


def layout_to_bytes(layout: Layout) -> bytes:
    """Encode a layout compactly (zlib'd JSON)."""
    return zlib.compress(_layout_json(layout), level=9)


def layout_from_bytes(data: bytes) -> Layout:
    """Decode what ``layout_to_bytes`` made.

    Raises:
        PayloadError: The bytes are no layout. They come from another machine, so nothing is assumed.
    """
    source = "the payload's layout"
    try:
        with parsing(source, "cannot be read", "pack() makes it", zlib.error):
            unzip = zlib.decompressobj()
            text = unzip.decompress(data, _MAX_LAYOUT_BYTES)
            if not unzip.eof or unzip.unused_data:
                raise ValueError(f"it is cut off, or has more than {_MAX_LAYOUT_BYTES} bytes")
        layout: Layout = parse_json(text, source, _LAYOUT)
    except UserError as error:
        raise PayloadError(str(error)) from error
    names = [name for name, _ in layout]
    if names != sorted(set(names)):
        raise PayloadError(f"{source} is not a sorted list of names and shapes")
    num = sum(math.prod(max(size, 1) for size in shape) for _, shape in layout)
    if num > MOST_VALUES:
        raise PayloadError(f"{source} claims {num} values, and at most {MOST_VALUES} are possible")
    return layout


@functools.lru_cache(maxsize=64)
def layout_digest(layout: Layout) -> str:
    """Return 16 hex digits that two layouts share only if they are equal."""
    return hashlib.blake2b(_layout_json(layout), digest_size=8).hexdigest()


def _layout_json(layout: Layout) -> bytes:
    return json.dumps(layout, separators=(",", ":")).encode()


def _check_layout(found: Layout, expected: Layout) -> None:
    """Raise PayloadError saying how ``found`` differs from ``expected``, if it does."""
    if found == expected:
        return
    here, there = dict(found), dict(expected)
    parts = {
        "missing": [name for name in there if name not in here],
        "unexpected": [name for name in here if name not in there],
        "of another shape": [
            f"{name} {list(here[name])} instead of {list(there[name])}"
            for name in there
            if name in here and here[name] != there[name]
        ],
    }
    listed = [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in parts.items() if names]
    remedy = "both sides must adapt the same modules with the same rank"
    raise PayloadError(
        f"the payload received differs from the expected layout ({'; '.join(listed)}); {remedy}"
    )


def _shorten(names: list[str]) -> str:
    more = len(names) - _NUM_NAMES_SHOWN
    return ", ".join(map(shortened, names[:_NUM_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


# ---- records


def pack(
    buffer: np.ndarray,
    layout: Layout,
    codec: str,
    *,
    meta: Mapping[str, MetaValue] | None = None,
    send_layout: bool = True,
) -> RecordDict:
    """Put an encoded state into the records of a Flower message.

    Args:
        buffer: One-dimensional array, any numpy dtype (bfloat16 has none: codecs send its bits as uint16).
        layout: Layout of the state that was encoded.
        codec: Name of the codec that made the buffer.
        meta: Further entries of the config record (server round, learning rate ...).
        send_layout: False leaves names and shapes out; the receiver then needs the layout, and the digest
            still guards it.

    Returns:
        A record dict with ``arrays`` (one flat array) and ``config``; add metrics under ``METRICS``.

    Raises:
        PayloadError: The buffer is not one-dimensional, or ``meta`` uses a key of the manifest.
    """
    if buffer.ndim != 1 or buffer.dtype.kind not in "fiu":
        raise PayloadError(f"a payload is one flat array of numbers, not {buffer.dtype} {buffer.shape}")
    manifest: dict[str, MetaValue] = {
        _CODEC: codec,
        _DIGEST: layout_digest(layout),
        _LENGTH: int(buffer.nbytes),
    }
    if send_layout:
        manifest[LAYOUT] = layout_to_bytes(layout)
    if clash := sorted(set(manifest) & set(meta or {})):
        raise PayloadError(f"the config keys {', '.join(clash)} belong to the payload: rename yours")
    config = ConfigRecord({**(meta or {}), **manifest})
    return RecordDict({ARRAYS: ArrayRecord({FLAT: _flat_array(buffer)}), CONFIG: config})


def unpack(content: RecordDict, layout: Layout | None = None) -> Payload:
    """Take an encoded state out of a message's records.

    Args:
        content: What ``pack`` returned, on the other side.
        layout: The layout the receiver expects; None accepts the one that travelled.

    Raises:
        PayloadError: A record is missing, or length, digest or layout differ; the message names the tensors.
    """
    arrays, manifest = content.get(ARRAYS), content.get(CONFIG)
    if not isinstance(arrays, ArrayRecord) or not isinstance(manifest, ConfigRecord) or set(arrays) != {FLAT}:
        raise PayloadError(f"a payload needs one array '{ARRAYS}.{FLAT}' and a record '{CONFIG}'")
    config: dict[str, Any] = dict(manifest)
    if absent := [key for key in (_CODEC, _DIGEST, _LENGTH) if key not in config]:
        raise PayloadError(f"the record '{CONFIG}' lacks {', '.join(absent)}: was it made by pack()?")
    known = _agreed_layout(config.pop(LAYOUT, None), str(config.pop(_DIGEST)), layout)
    try:
        buffer = _flat_values(arrays[FLAT])
    except (ValueError, TypeError, EOFError) as error:
        raise PayloadError(f"the payload's array cannot be read: {shortened(error)}") from error
    if (length := config.pop(_LENGTH)) != buffer.nbytes:
        raise PayloadError(
            f"the payload has {buffer.nbytes} bytes, its manifest says {shortened(repr(length))}"
        )
    return Payload(buffer=buffer, layout=known, codec=str(config.pop(_CODEC)), meta=config)


def _flat_array(buffer: np.ndarray) -> Array:
    """Return ``Array(buffer)``, (n,), whose header numpy would spell anew for 0.1 ms."""
    header = _npy_header(buffer.dtype, buffer.shape)
    data = b"".join((header, np.ascontiguousarray(buffer).data))
    return Array(dtype=buffer.dtype.name, shape=buffer.shape, stype=SType.NUMPY, data=data)


@functools.lru_cache(maxsize=64)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def _flat_values(array: Array) -> np.ndarray:
    """Return an array's values, (n,), read only; ``array.numpy()`` parses a header for 0.1 ms and copies.

    Raises:
        ValueError: It is no flat array of numbers in numpy's format.
    """
    dtype, data = np.dtype(array.dtype), array.data
    if array.stype != SType.NUMPY or len(array.shape) != 1 or dtype.kind not in "fiu":
        raise ValueError(f"{array.dtype} {tuple(array.shape)} of type {array.stype} is no flat array")
    start = len(_NPY_MAGIC) + 2 + int.from_bytes(data[len(_NPY_MAGIC) : len(_NPY_MAGIC) + 2], "little")
    if not data.startswith(_NPY_MAGIC) or len(data) != start + array.shape[0] * dtype.itemsize:
        raise ValueError("it is not in numpy's format, or its length is not that of its shape")
    return np.frombuffer(data, dtype=dtype, offset=start)


def _agreed_layout(travelled: object, digest: str, expected: Layout | None) -> Layout:
    """Return the one layout that what travelled, its digest and the receiver agree on, or raise."""
    sent = layout_from_bytes(travelled) if isinstance(travelled, bytes) else None
    if expected is not None and sent is not None:
        _check_layout(sent, expected)
    known = expected if expected is not None else sent
    if known is None:
        raise PayloadError("the payload carries no layout: pass the layout of the state to unpack()")
    if digest != layout_digest(known):
        raise PayloadError(
            f"the payload's layout has digest {shortened(digest)}, expected {layout_digest(known)}"
        )
    return known

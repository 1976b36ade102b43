"""Codings: how the values of a flat state are stored, from fp32 down to three levels.

Used by ``federated.communication.codec`` in every encode and decode. A coding sees a float32 vector that is
cut into consecutive groups (the rank components); quantisers keep one fp32 scale for each group, others
ignore them. A new coding is one function and one entry in ``CODINGS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from federated.communication.payload import LARGEST_FP32
from models.registration import registering


@dataclass(frozen=True)
class Coding:
    """A way to store n values in G consecutive groups.

    Attributes:
        encode: ``(values (n,) float32, group_sizes (G,), rng) -> buffer``, one-dimensional.
        decode: ``(bytes as uint8, group_sizes) -> values (n,) float32``, in memory of its own. The length of
            the bytes has been checked.
        num_bytes: ``(n, G) -> bytes``, exact.
        grouped: Whether the groups matter.
        largest: The largest magnitude that can be stored.
        draws: Whether encoding draws from ``rng``; elsewhere it may be None.
    """

    encode: Callable[[np.ndarray, np.ndarray, np.random.Generator | None], np.ndarray]
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    num_bytes: Callable[[int, int], int]
    grouped: bool = False
    largest: float = LARGEST_FP32
    draws: bool = False


def fp32() -> Coding:
    """4 n bytes."""
    return Coding(
        encode=lambda values, group_sizes, rng: values,
        decode=lambda data, group_sizes: data.view(np.float32).copy(),
        num_bytes=lambda n, num_groups: 4 * n,
    )


def half(dtype: torch.dtype) -> Coding:
    """fp16 or bf16: 2 n bytes. The bits of bf16 travel as uint16, for numpy and Flower have no bf16."""
    wire_dtype = np.dtype(np.float16 if dtype == torch.float16 else np.uint16)

    def encode(values: np.ndarray, group_sizes: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return torch.from_numpy(values).to(dtype).view(torch.uint16).numpy().view(wire_dtype)

    def decode(data: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
        return torch.from_numpy(data.view(np.uint16).copy()).view(dtype).to(torch.float32).numpy()

    return Coding(encode, decode, lambda n, num_groups: 2 * n, largest=torch.finfo(dtype).max)


# ---- quantisers


@dataclass(frozen=True)
class Packing:
    """How integer levels in -limit ... limit become bytes.

    Attributes:
        limit: The largest level.
        pack: ``levels (n,) int8 -> bytes``.
        unpack: ``(bytes, n) -> levels (n,) int8``.
        num_bytes: ``n -> bytes``.
    """

    limit: int
    pack: Callable[[np.ndarray], np.ndarray]
    unpack: Callable[[np.ndarray, int], np.ndarray]
    num_bytes: Callable[[int], int]


BYTES = Packing(127, lambda levels: levels.view(np.uint8), lambda data, n: data.view(np.int8), lambda n: n)


def _pack_nibbles(levels: np.ndarray) -> np.ndarray:
    codes = (np.append(levels, np.int8(0)) if levels.size % 2 else levels).view(np.uint8) & 15
    return codes[0::2] | (codes[1::2] << 4)


def _unpack_nibbles(data: np.ndarray, n: int) -> np.ndarray:
    shifted = np.empty((data.size, 2), dtype=np.uint8)
    shifted[:, 0] = data << 4
    shifted[:, 1] = data
    return (shifted.view(np.int8) >> 4).reshape(-1)[:n]  # a signed shift restores the sign


NIBBLES = Packing(7, _pack_nibbles, _unpack_nibbles, lambda n: -(-n // 2))

_TRITS_PER_BYTE = 5  # 3**5 = 243
_POWERS = 3 ** np.arange(_TRITS_PER_BYTE)
_TRITS_OF_BYTE = (np.arange(256)[:, None] // _POWERS % 3 - 1).astype(np.int8)  # (256, 5)


def _pack_trits(levels: np.ndarray) -> np.ndarray:
    codes = np.zeros((-(-levels.size // _TRITS_PER_BYTE), _TRITS_PER_BYTE), dtype=np.uint8)
    codes.reshape(-1)[: levels.size] = levels + 1
    packed = np.zeros(len(codes), dtype=np.uint8)
    for position, power in enumerate(_POWERS.astype(np.uint8)):
        packed += codes[:, position] * power
    return packed


def _unpack_trits(data: np.ndarray, n: int) -> np.ndarray:
    return np.take(_TRITS_OF_BYTE, data, axis=0).reshape(-1)[:n]


TRITS = Packing(1, _pack_trits, _unpack_trits, lambda n: -(-n // _TRITS_PER_BYTE))


def quantised(packing: Packing, *, stochastic: bool) -> Coding:
    """Integer levels times one fp32 scale for each group; the scale is the largest magnitude / limit.

    4 G + n bytes (int8), 4 G + ceil(n / 2) (int4), 4 G + ceil(n / 5) (ternary).
    A group of zeros comes back exactly. Stochastic rounding makes the decoded value unbiased.
    """

    def encode(values: np.ndarray, group_sizes: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        scales = largest_magnitudes(values, group_sizes) / np.float32(packing.limit)
        scales[scales < np.finfo(np.float32).tiny] = 0.0  # the inverse of a subnormal overflows
        inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
        levels = np.repeat(inverse, group_sizes)
        levels *= values
        if stochastic:
            if rng is None:
                raise ValueError("stochastic rounding needs a random generator")
            levels += rng.random(levels.size, dtype=np.float32)
            np.floor(levels, out=levels)
        else:
            np.rint(levels, out=levels)
        np.clip(levels, -packing.limit, packing.limit, out=levels)
        return np.concatenate([scales.view(np.uint8), packing.pack(levels.astype(np.int8))])

    def decode(data: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
        scales = data[: 4 * group_sizes.size].view(np.float32)
        values = np.repeat(scales, group_sizes)
        with np.errstate(over="ignore", invalid="ignore"):  # the codec names the tensor that is not finite
            values *= packing.unpack(data[4 * group_sizes.size :], values.size)
        return values

    def num_bytes(n: int, num_groups: int) -> int:
        return 4 * num_groups + packing.num_bytes(n)

    # scale * limit may round up: a margin to the end of fp32 keeps what is decoded finite
    return Coding(encode, decode, num_bytes, grouped=True, largest=1e38, draws=stochastic)


def largest_magnitudes(values: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Return max |value| of each group, (G,) float32; 0 for an empty group."""
    largest = np.zeros(group_sizes.size, dtype=np.float32)
    filled = group_sizes > 0
    if filled.any():
        starts = (np.cumsum(group_sizes) - group_sizes)[filled]
        largest[filled] = np.maximum.reduceat(np.abs(values), starts)
    return largest


CODINGS: dict[str, Callable[[], Coding]] = {
    "fp32": fp32,
    "fp16": lambda: half(torch.float16),
    "bf16": lambda: half(torch.bfloat16),
    "int8": lambda: quantised(BYTES, stochastic=False),
    "int8:sr": lambda: quantised(BYTES, stochastic=True),
    "int4": lambda: quantised(NIBBLES, stochastic=False),
    "int4:sr": lambda: quantised(NIBBLES, stochastic=True),
    "ternary": lambda: quantised(TRITS, stochastic=True),  # to the nearest, most values would become 0
}

register_coding = registering("coding", CODINGS)
"""``@register_coding("name")`` adds a function () -> Coding."""

"""Selections: which values of a flat state travel, and how their positions are stored.

Used by the sparse codecs of ``federated.communication.codec``. The number of values kept depends on the
layout and the density alone, so the bytes of a payload are known before it is encoded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from federated.communication.payload import PayloadError
from models.registration import registering


def num_kept(n: int, density: float) -> int:
    """Return how many of n values travel: the integer nearest to ``density * n``, and at least 1 if n > 0."""
    return min(n, max(1, round(density * n)))


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Mark exactly the k values of largest magnitude; among equals, those that come first. Bool, (n,)."""
    if k == 0:
        return np.zeros(values.size, dtype=bool)
    magnitudes = np.abs(values)
    threshold = np.partition(magnitudes, values.size - k)[values.size - k]
    mask = magnitudes > threshold
    ties = np.flatnonzero(magnitudes == threshold)
    mask[ties[: k - np.count_nonzero(mask)]] = True
    return mask


SELECTIONS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"topk": top_k}

register_selection = registering("selection", SELECTIONS, ("values", "k"))
"""``@register_selection("name")`` adds a function (values, k) -> mask of exactly k of them."""


# ---- positions


def positions_num_bytes(n: int, k: int) -> int:
    """Return the bytes that say which k of n values travel: the smaller of a bitmap and the Elias-Fano code.

    The bitmap takes ceil(n / 8). The code splits a position into l = floor(log2(n / k)) low bits, stored as
    they are, and the rest, stored in unary: ceil(k l / 8) + ceil((k + (n >> l)) / 8). It wins below a density
    of about 1/4, where it costs 4 to 24 % more than the entropy bound.
    """
    if k in (0, n):
        return 0
    return min(_bitmap_num_bytes(n), sum(_elias_fano_num_bytes(n, k)))


def encode_positions(mask: np.ndarray) -> np.ndarray:
    """Store a mask of n booleans in ``positions_num_bytes(n, k)`` bytes (Elias 1974; Fano 1971)."""
    n, positions = mask.size, np.flatnonzero(mask)
    k = positions.size
    if k in (0, n):
        return np.zeros(0, dtype=np.uint8)
    if positions_num_bytes(n, k) == _bitmap_num_bytes(n):
        return np.packbits(mask)
    low = _num_low_bits(n, k)
    low_bits = (positions[:, None] >> np.arange(low) & 1).astype(np.uint8)  # (k, low)
    high_bits = np.zeros(k + (n >> low), dtype=np.uint8)
    high_bits[(positions >> low) + np.arange(k)] = 1
    return np.concatenate([np.packbits(low_bits), np.packbits(high_bits)])


def decode_positions(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """Return the mask that ``encode_positions`` stored.

    Raises:
        PayloadError: The bytes do not mark k different positions below n.
    """
    if k in (0, n):
        return np.full(n, k > 0)
    if positions_num_bytes(n, k) == _bitmap_num_bytes(n):
        mask = np.unpackbits(data, count=n).astype(bool)
    else:
        mask = np.zeros(n, dtype=bool)
        positions = _elias_fano_positions(data, n, k)
        mask[positions[positions < n]] = True
    if np.count_nonzero(mask) != k:
        raise PayloadError(f"the payload does not mark {k} of {n} positions: it was damaged on its way")
    return mask


def _elias_fano_positions(data: np.ndarray, n: int, k: int) -> np.ndarray:
    low = _num_low_bits(n, k)
    low_bytes, _ = _elias_fano_num_bytes(n, k)
    low_bits = np.unpackbits(data[:low_bytes], count=k * low).reshape(k, low)
    ones = np.flatnonzero(np.unpackbits(data[low_bytes:], count=k + (n >> low)))[:k]
    high = ones - np.arange(ones.size)
    return (high << low) + low_bits[: ones.size] @ (1 << np.arange(low))


def _num_low_bits(n: int, k: int) -> int:
    return (n // k).bit_length() - 1


def _elias_fano_num_bytes(n: int, k: int) -> tuple[int, int]:
    """Return the bytes of the low and of the high part."""
    low = _num_low_bits(n, k)
    return -(-k * low // 8), -(-(k + (n >> low)) // 8)


def _bitmap_num_bytes(n: int) -> int:
    return -(-n // 8)

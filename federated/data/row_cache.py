"""Rows that are computed once: what a frozen part of the model makes of each image or caption.

A row is computed when it is first asked for, always in batches of one shape, so that its bits do not depend
on who asked first. Memory is shared with forked workers (what one computes, all have) and bounded: rows that
do not fit are computed whenever they are asked for.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from federated.data.splits import IntArray
from models.errors import UserError

BYTES_PER_VALUE = 4


class RowCache:
    """Float32 rows by number, kept once computed.

    Args:
        compute: Row numbers (B,) -> their values (B, \\*row_shape), the same for a row whatever its company.
        num_rows: Rows there are.
        row_shape: Shape of one row's values.
        batch_size: Rows computed at a time; fewer are filled up with copies of the last.
        max_bytes: Most memory, or disk, to take.
        folder: Keep the rows in a memory-mapped temporary file there; None: in memory.
    """

    def __init__(
        self,
        compute: Callable[[IntArray], Tensor],
        num_rows: int,
        row_shape: Sequence[int],
        *,
        batch_size: int,
        max_bytes: int,
        folder: str | None = None,
    ) -> None:
        self._compute = compute
        self._batch_size = batch_size
        row_bytes = BYTES_PER_VALUE * math.prod(row_shape)
        self.num_rows = num_rows
        self.capacity = min(num_rows, max_bytes // max(row_bytes, 1))
        self.max_bytes = self.capacity * row_bytes
        self._values = torch.from_numpy(shared_zeros((self.capacity, *row_shape), np.float32, folder))
        self._is_kept = shared_zeros((num_rows,), np.uint8)  # rows from `capacity` on stay 0

    @property
    def num_kept(self) -> int:
        """Rows computed so far."""
        return int(self._is_kept.sum())

    def rows(self, indices: npt.ArrayLike) -> Tensor:
        """Return the values of some rows, (B, \\*row_shape) float32, a copy."""
        wanted = np.asarray(indices, dtype=np.int64)
        missing = np.unique(wanted[self._is_kept[wanted] == 0])
        if len(missing) == 0:
            return self._values[torch.from_numpy(wanted)]
        fresh = self._computed(missing)  # (M, *row_shape)
        fits = missing < self.capacity
        self._values[torch.from_numpy(missing[fits])] = fresh[torch.from_numpy(fits)]
        self._is_kept[missing[fits]] = 1
        if fits.all():
            return self._values[torch.from_numpy(wanted)]
        places = np.searchsorted(missing, wanted).clip(max=len(missing) - 1)
        values = fresh[torch.from_numpy(places)]
        kept = self._is_kept[wanted] == 1
        values[torch.from_numpy(kept)] = self._values[torch.from_numpy(wanted[kept])]
        return values

    def _computed(self, rows: IntArray) -> Tensor:
        parts = []
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            padded = np.concatenate([chosen, np.repeat(chosen[-1:], self._batch_size - len(chosen))])
            parts.append(self._compute(padded)[: len(chosen)].to(device="cpu", dtype=torch.float32))
        return torch.cat(parts)


def shared_zeros(shape: Sequence[int], dtype: npt.DTypeLike, folder: str | None = None) -> np.ndarray:
    """Return zeros in memory that this process shares with those it forks; a page is taken when written.

    Args:
        shape: Shape of the array.
        dtype: Its type.
        folder: Back it with a temporary file there, which is gone with the process; None: with memory alone.

    Raises:
        UserError: The folder cannot be written, or there is no room.
    """
    num_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
    try:
        if folder is None:
            buffer = mmap.mmap(-1, num_bytes)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(num_bytes)
                buffer = mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        where = "memory" if folder is None else f"cache.folder={folder}"
        raise UserError(
            f"{where} has no room for {num_bytes} bytes of cache ({error}): lower cache.max_bytes"
        ) from error
    return np.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).reshape(shape)

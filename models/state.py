"""State: the named arrays that travel between server and clients, and the files that hold them.

Stands at both ends of every transfer of a round. A client's state and a decoded one lie end to end in one
vector, which spares most of the work on an adapter's many small factors; what is not laid out so is copied.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from models.files import written_whole

State = dict[str, torch.Tensor]
"""Wire name -> tensor, in sorted order of the names."""

_LENGTH_BYTES = 8
_ALIGNMENT = 8


def save_state(
    state: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; equal arguments give equal bytes.

    The library itself writes metadata in the order of a hash map, another one at each call.

    Args:
        state: Name -> tensor.
        path: The file; replaced.
        metadata: Texts by key, stored in sorted order.
    """
    content = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, dict(metadata or {})
    )
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    header = json.loads(content[_LENGTH_BYTES:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        file.write(memoryview(content)[end:])


def subtract_(after: State, before: State, names: Iterable[str]) -> State:
    """Return after - before of the named tensors, written over ``after``'s."""
    chosen = list(names)
    changes = [after[name] for name in chosen]
    if chosen:
        torch._foreach_sub_(changes, [before[name] for name in chosen])
    return dict(zip(chosen, changes, strict=True))


def add_(change: State, start: State) -> State:
    """Return start + change, for the names of the change, written over it."""
    if change:
        torch._foreach_add_(list(change.values()), [start[name] for name in change])
    return change


# ---- tensors that lie end to end in one vector, so that one operation serves them all


def cut(vector: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """Return tensors of these shapes that share a vector's memory, one after the other.

    Args:
        vector: (n,), contiguous.
        shapes: Of the tensors.

    Raises:
        ValueError: n is not the number of values of all shapes together, or the vector has gaps.
    """
    places, num_values = _places(shapes)
    if tuple(vector.shape) != (num_values,) or not vector.is_contiguous():
        raise ValueError(f"shapes of {num_values} values cannot be cut from a tensor {tuple(vector.shape)}")
    start = vector.storage_offset()
    return [vector.as_strided(shape, strides, start + first) for shape, strides, first in places]


@functools.lru_cache(maxsize=64)
def _places(
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...], int]:
    """Return shape, strides and first value of each tensor, and how many values there are."""
    places, first = [], 0
    for shape in shapes:
        places.append((shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), first))
        first += math.prod(shape)
    return tuple(places), first


def end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values of at least one tensor as one vector, (n,), to be read only.

    Tensors that ``cut`` made, in its order, are not copied.
    """
    base, first = tensors[0]._base, tensors[0].storage_offset()
    if base is not None and base.dim() == 1 and base.is_contiguous() and base.dtype == tensors[0].dtype:
        end = first
        for tensor in tensors:
            if tensor._base is not base or tensor.storage_offset() != end or not tensor.is_contiguous():
                break
            end += tensor.numel()
        else:
            start = base.storage_offset()
            return base[first - start : end - start]
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

"""State: the named arrays that travel between server and clients, and the files that hold them.

Stands at both ends of every transfer of a round. What a client trained and what was decoded is a
``FlatState``: its tensors lie end to end in one vector, on which a check, a difference or an average is one
operation instead of one for each of an adapter's many small factors. Every function takes ordinary states,
too, and gives the same bits.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from models.files import written_whole

State = Mapping[str, torch.Tensor]
"""Wire name -> tensor, in sorted order of the names."""

Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""The name and shape of every tensor of a state, sorted by name."""

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


def layout_of(state: Mapping[str, torch.Tensor]) -> Layout:
    """Return the names and shapes of a state, sorted by name whatever its insertion order."""
    if isinstance(state, FlatState):
        return state.layout
    return tuple((name, tuple(state[name].shape)) for name in sorted(state))


# ---- states whose tensors lie end to end in one vector


class FlatState(Mapping[str, torch.Tensor]):
    """A state whose tensors are cut from one vector, in sorted order of the names, when they are asked for.

    Its names and tensors stay what they are; the values may be written over.

    Attributes:
        vector: All values, (n,).
        layout: Names and shapes.
        names: The names, sorted.
    """

    __slots__ = ("_shapes", "_tensors", "layout", "names", "vector")

    def __init__(self, vector: torch.Tensor, layout: Layout) -> None:
        """Take a vector, which is not copied.

        Args:
            vector: (n,), contiguous.
            layout: Names, sorted, and shapes.

        Raises:
            ValueError: n is not the number of values of the layout, or the vector has gaps.
        """
        self.vector, self.layout = vector, layout
        self.names, self._shapes, num_values = _parts(layout)
        _check_vector(vector, num_values)
        self._tensors: dict[str, torch.Tensor] | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; they share the vector's memory."""
        if self._tensors is None:
            self._tensors = dict(zip(self.names, cut(self.vector, self._shapes), strict=True))
        return self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made from the vector."""
        return FlatState, (self.vector, self.layout)


def flat(state: Mapping[str, torch.Tensor]) -> FlatState:
    """Return a state's values as a flat state: itself if it is one, else a copy."""
    if isinstance(state, FlatState):
        return state
    layout = layout_of(state)
    values = [state[name].reshape(-1) for name, _ in layout]
    return FlatState(torch.cat(values) if values else torch.zeros(0), layout)


def vector_of(state: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    """Return the named values, at least one, end to end in the order of the names, (n,), to be read only."""
    if isinstance(state, FlatState) and state.names == names:
        return state.vector
    return end_to_end([state[name] for name in names])


def subtract_(after: State, before: State, names: tuple[str, ...]) -> State:
    """Return after - before of the named tensors, written over ``after``'s."""
    if isinstance(after, FlatState) and after.names == names:
        return _changed(after, before, -1)
    changes = [after[name] for name in names]
    if changes:
        torch._foreach_sub_(changes, [before[name] for name in names])
    return dict(zip(names, changes, strict=True))


def add_(change: State, start: State) -> State:
    """Return start + change, for the names of the change, written over it."""
    if isinstance(change, FlatState):
        return _changed(change, start, 1)
    if change:
        torch._foreach_add_(list(change.values()), [start[name] for name in change])
    return change


def _changed(state: FlatState, other: State, sign: int) -> FlatState:
    if state.names:
        state.vector.add_(vector_of(other, state.names), alpha=sign)
    return state


@functools.lru_cache(maxsize=64)
def _parts(layout: Layout) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...], int]:
    """Return the names, the shapes, and how many values there are."""
    shapes = tuple(shape for _, shape in layout)
    return tuple(name for name, _ in layout), shapes, sum(map(math.prod, shapes))


def cut(vector: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    """Return tensors of these shapes that share a vector's memory, one after the other.

    Args:
        vector: (n,), contiguous.
        shapes: Of the tensors.

    Raises:
        ValueError: n is not the number of values of all shapes together, or the vector has gaps.
    """
    places, num_values = _places(shapes)
    _check_vector(vector, num_values)
    start = vector.storage_offset()
    return [vector.as_strided(shape, strides, start + first) for shape, strides, first in places]


def _check_vector(vector: torch.Tensor, num_values: int) -> None:
    if tuple(vector.shape) != (num_values,) or not vector.is_contiguous():
        raise ValueError(f"shapes of {num_values} values cannot be cut from a tensor {tuple(vector.shape)}")


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

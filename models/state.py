"""State: the named arrays that travel between server and clients, and the files that hold them.

What a client trained and what was decoded is a ``FlatState``: its tensors lie end to end in one vector, on
which a check, a difference or an average is one operation instead of one for each of an adapter's many small
factors. Every function takes ordinary states, too, and gives the same bits.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
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


def _apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as a file takes them: of tied weights, which share memory, each has its own."""
    tensors, owned = dict[str, torch.Tensor](), set[int]()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in owned else tensor
        owned.add(place)
    return tensors


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
    content = save(_apart(state), dict(metadata or {}))
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    header = json.loads(content[_LENGTH_BYTES:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    num_bytes = len(text) + len(content) - end + _LENGTH_BYTES
    with written_whole(path, num_bytes) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        file.write(memoryview(content)[end:])


def layout_of(state: Mapping[str, torch.Tensor]) -> Layout:
    """Return the names and shapes of a state, sorted by name whatever its insertion order."""
    if isinstance(state, FlatState):
        return state.layout
    return tuple((name, tuple(state[name].shape)) for name in sorted(state))


def num_values(layout: Layout) -> int:
    """Return how many values a state of this layout has."""
    return _plan_of(layout).firsts[-1]


# ---- states whose tensors lie end to end in one vector


class FlatState(Mapping[str, torch.Tensor]):
    """A state whose tensors are cut from one vector, in sorted order of the names, when they are asked for.

    Its names and tensors stay what they are. The values may be written over by whoever made it or had it made
    (``get_state``, a decoded reply), never by the receivers of one broadcast, who share it.

    Attributes:
        vector: All values, (n,).
        layout: Names and shapes.
        names: The names, sorted.
    """

    __slots__ = ("_plan", "_tensors", "layout", "names", "vector")

    def __init__(self, vector: torch.Tensor, layout: Layout) -> None:
        """Take a vector, which is not copied.

        Args:
            vector: (n,), contiguous.
            layout: Names, sorted, and shapes.

        Raises:
            ValueError: n is not the number of values of the layout, or the vector has gaps.
        """
        plan = _plan_of(layout)
        if tuple(vector.shape) != (plan.firsts[-1],) or not vector.is_contiguous():
            raise ValueError(
                f"a layout of {plan.firsts[-1]} values cannot be cut from a tensor {tuple(vector.shape)}"
            )
        self.vector, self.layout, self.names = vector, layout, plan.names
        self._plan = plan
        self._tensors: dict[str, torch.Tensor] | None = None

    def __repr__(self) -> str:
        """One line, however many tensors there are."""
        return f"FlatState({len(self.names)} tensors, {self.vector.numel():,} values)"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; they share the vector's memory."""
        if self._tensors is None:
            start = self.vector.storage_offset()
            self._tensors = {
                name: self.vector.as_strided(shape, strides, start + first)
                for name, shape, strides, first in self._plan.pieces
            }
        return self._tensors

    def place_of(self, names: tuple[str, ...]) -> slice | None:
        """Return where the values of at least one name stand, if they stand together and in this order."""
        if self.names == names:
            return slice(None)
        if names[0] not in self:
            return None
        start = self.names.index(names[0])
        end = start + len(names)
        firsts = self._plan.firsts
        return slice(firsts[start], firsts[end]) if self.names[start:end] == names else None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._plan.known

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def keys(self) -> KeysView[str]:
        """The names; views of a dict are walked faster than those of any mapping."""
        return self._plan.known.keys()

    def values(self) -> ValuesView[torch.Tensor]:
        """The tensors, in the order of the names."""
        return self.tensors.values()

    def items(self) -> ItemsView[str, torch.Tensor]:
        """The names with the tensors."""
        return self.tensors.items()

    def __reduce__(self) -> tuple[Any, ...]:
        """Deep copies and pickles are made from the vector."""
        return FlatState, (self.vector, self.layout)


def flat(state: Mapping[str, torch.Tensor]) -> FlatState:
    """Return a state as a flat one: itself if it is one, else a copy in the widest of its dtypes."""
    if isinstance(state, FlatState):
        return state
    layout = layout_of(state)
    values = [state[name].reshape(-1) for name, _ in layout]
    return FlatState(torch.cat(values) if values else torch.zeros(0), layout)


def vector_of(state: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    """Return the named values, at least one, end to end in the order of the names, (n,), to be read only."""
    if isinstance(state, FlatState) and (place := state.place_of(names)) is not None:
        return state.vector[place]
    return end_to_end([state[name] for name in names])


def subtract_(after: State, before: State, names: tuple[str, ...]) -> State:
    """Return after - before of the named tensors, of like shapes, written over ``after``'s."""
    if isinstance(after, FlatState) and after.names == names:
        return _changed(after, before, -1)
    changes = [after[name] for name in names]
    if changes:
        torch._foreach_sub_(changes, [before[name] for name in names])
    return dict(zip(names, changes, strict=True))


def add_(change: State, start: State) -> State:
    """Return start + change, of like shapes, for the names of the change, written over it."""
    if isinstance(change, FlatState):
        return _changed(change, start, 1)
    if change:
        torch._foreach_add_(list(change.values()), [start[name] for name in change])
    return change


def _changed(state: FlatState, other: State, sign: int) -> FlatState:
    if isinstance(other, FlatState) and other.names == state.names and other.layout != state.layout:
        raise ValueError("the two states have the same names and other shapes")
    if state.names:
        state.vector.add_(vector_of(other, state.names), alpha=sign)
    return state


@dataclass(frozen=True)
class _Plan:
    """How a vector is cut.

    Attributes:
        names: Of the tensors, in order; ``known`` has them as its keys.
        firsts: Where each tensor begins, and at last the number of values.
        pieces: Name, shape, strides and first value of each tensor.
    """

    names: tuple[str, ...]
    known: Mapping[str, None]
    firsts: tuple[int, ...]
    pieces: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int], ...]


@functools.lru_cache(maxsize=64)
def _plan_of(layout: Layout) -> _Plan:
    firsts = tuple(itertools.accumulate((math.prod(shape) for _, shape in layout), initial=0))
    pieces = tuple(
        (name, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), first)
        for (name, shape), first in zip(layout, firsts, strict=False)
    )
    names = tuple(name for name, _ in layout)
    return _Plan(names, dict.fromkeys(names), firsts, pieces)


def end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values of at least one tensor as one vector, (n,), to be read only.

    Tensors of a flat state that follow each other in it are not copied.
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

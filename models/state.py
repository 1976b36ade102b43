"""State: the named arrays that travel between server and clients, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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


def difference(after: State, before: State, names: Iterable[str]) -> State:
    """Return after - before of the named tensors."""
    chosen = list(names)
    if not chosen:
        return {}
    changes = torch._foreach_sub([after[name] for name in chosen], [before[name] for name in chosen])
    return dict(zip(chosen, changes, strict=True))


def moved(start: State, change: State) -> State:
    """Return start + change, for the names of the change."""
    if not change:
        return {}
    values = torch._foreach_add([start[name] for name in change], list(change.values()))
    return dict(zip(change, values, strict=True))

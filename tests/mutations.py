"""Makes hostile files from valid ones: bytes flipped, lost or added; JSON of other types and depths."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    1.5,
    2**31,
    10**9,
    2**63,
    2**64,
    10**30,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e9",
    "\ud800",
    "\0",
    "a\nb\x1b[2J",
    "(",
    "(a+)+$",
    "a" * 300,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"x": 10**12},
    [10**12],
    [0, 10**12],
    [10**6, 10**6],
    ["x"] * 5,
)
"""Values that stand where others are expected."""

DEPTH = 100_000
_BYTES = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\n",
    b",",
    b'"',
    b"[",
    b"{",
    b"\x7f\xff\xff\xff",
    b"9" * 40,
    b"-",
)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(changed))
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at:at] = rng.choice(_BYTES)
        elif kind == 3:
            del changed[at : at + rng.randint(1, 20)]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 200)]
        else:
            changed[at : at + 8] = rng.randbytes(8)
    return bytes(changed)


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """Return a JSON value with one to three of its parts replaced, removed, added or exchanged."""
    changed = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return rng.choice(HOSTILE)
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("zz", "", "r", "\ud800", "-1", "9" * 30, "a" * 300))] = rng.choice(HOSTILE)
        elif kind == 2:
            other, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return changed


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def mutated_json(rng: random.Random, text: bytes) -> bytes:
    """Return a JSON text with other values, or with other bytes, or nested very deep."""
    kind = rng.randrange(10)
    if kind < 6:
        return json.dumps(mutated_tree(rng, json.loads(text))).encode()
    if kind == 6:
        at = rng.randint(0, len(text))
        return text[:at] + rng.choice((b"[", b'{"a":')) * DEPTH + text[at:]
    return mutated_bytes(rng, text)


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return a safetensors file with another header, other metadata or other bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    key = rng.choice([None, *metadata])
    if key is None:
        text = json.dumps(mutated_tree(rng, header)).encode()
    else:
        metadata[key] = (
            mutated_json(rng, metadata[key].encode()).decode(errors="replace")
            if _is_json(metadata[key])
            else str(rng.choice(HOSTILE))
        )
        text = json.dumps(header).encode()
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**63, len(text) + 5))
    return claimed.to_bytes(8, "little") + text + data[8 + length :]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def mutated_archive(rng: random.Random, data: bytes) -> bytes:
    """Return a zip archive (torch's) with other bytes in a part of it, or as a whole."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(made, "w") as changed:
        names = archive.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * len(names) + names)
        for name in names:
            part = archive.read(name)
            kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
            changed.writestr(name, mutated_bytes(rng, part) if name == chosen else part, compress_type=kind)
    return made.getvalue()


def mutated_zlib(rng: random.Random, data: bytes) -> bytes:
    """Return a compressed JSON text with other values, or with other bytes."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    return zlib.compress(mutated_json(rng, zlib.decompress(data)))

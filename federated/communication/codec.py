"""Codecs: from named tensors to a flat buffer and back, with an exact byte count for each.

A codec is a value with three functions, found by its name: ``int8``, ``int4:sr``, ``topk:0.1:ef+int8``.

Quantisers keep one fp32 scale for each rank component of a LoRA factor, that is for each row of A and each
column of B, because components differ in size by orders of magnitude. Scaling B by its rows would cost 4
bytes for every r values. Other tensors have one scale a row, or one in all if they are vectors.

Sparse codecs choose within what has one unit: all adapters together, every other tensor by itself, and
SCAFFOLD's control variates, which are gradients, apart from the update. Chosen together, the largest kind
would take all places and the others would never arrive.

``:sr`` rounds stochastically. ``:ef`` asks the sender for error feedback: it adds to each state what the
states before it lost (Seide et al. 2014; Stich et al. 2018).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from federated.communication.codings import CODINGS, Coding
from federated.communication.payload import (
    PayloadError,
    check_finite,
    flatten,
    unflatten,
)
from federated.communication.sparsifiers import (
    SELECTIONS,
    decode_positions,
    encode_positions,
    num_kept,
    positions_num_bytes,
)
from lora.adapters import factor_of, is_adapter_part
from models.errors import UserError, shortened
from models.registration import added
from models.state import Layout, State, layout_of, num_values


@dataclass(frozen=True)
class Codec:
    """A way to send a state.

    Attributes:
        name: What ``codec_from_name`` makes it from.
        encode: ``(state, rng) -> buffer``, one-dimensional, of at most 4 bytes an item; ``rng`` may be None
            where the codec does not draw. Raises PayloadError naming a tensor whose values cannot be sent.
        decode: ``(buffer, layout) -> state``, fp32 on the CPU, in memory of its own. Raises PayloadError for
            a buffer of the wrong length or with values that are not finite.
        num_bytes: ``layout -> bytes`` of every buffer of that layout, exactly.
        num_sent: ``layout -> values`` that such a buffer holds; a sparse codec leaves the others out.
        draws: Whether encoding draws from ``rng``: stochastic rounding does.
        error_feedback: Whether the sender adds what earlier payloads lost (``federated.rounds.client``).
        lossless: Whether what is decoded is what was encoded, bit for bit.
    """

    name: str
    encode: Callable[[State, np.random.Generator | None], np.ndarray]
    decode: Callable[[np.ndarray, Layout], State]
    num_bytes: Callable[[Layout], int]
    num_sent: Callable[[Layout], int] = num_values
    draws: bool = False
    error_feedback: bool = False
    lossless: bool = False


# ---- by name

LEAST_DENSITY = 1e-6
"""Smallest density of a sparse codec: it bounds how much larger than its payload a state can be."""


def valid_codec_names() -> str:
    """Return the sentence that lists every codec, for error messages and the documentation."""
    return (
        f"{', '.join(CODINGS)}; {' or '.join(SELECTIONS)}:<density>+<one of these>, as in topk:0.1+int8; "
        "':ef' after the first part adds error feedback, as in topk:0.1:ef+fp16"
    )


def codec_from_name(text: str) -> Codec:
    """Return the codec of that name.

    Raises:
        UserError: No such codec; the message lists those that exist.
    """
    return _codec_from_name(text, (*added("coding").values(), *added("selection").values()))


@functools.lru_cache(maxsize=64)
def _codec_from_name(text: str, plugins: tuple[object, ...]) -> Codec:
    first, plus, stored_as = text.partition("+")
    stem = first.removesuffix(":ef")
    if stem in CODINGS and not plus:
        codec = _dense(stem, CODINGS[stem]())
    else:
        codec = _sparse_from_name(text, stem, stored_as if plus else "fp32")
    return with_error_feedback(codec) if stem != first else codec


def _sparse_from_name(text: str, selection: str, stored_as: str) -> Codec:
    kind, _, number = selection.partition(":")
    if kind not in SELECTIONS or stored_as not in CODINGS:
        raise UserError(f"unknown codec {shortened(repr(text))}: there are {valid_codec_names()}")
    try:
        density = float(number)
    except ValueError:
        density = math.nan
    if not 0 < density <= 1:
        raise UserError(
            f"codec {shortened(repr(text))}: {shortened(repr(number))} is no density above 0 and at most 1, "
            f"as in {kind}:0.1"
        )
    if density < LEAST_DENSITY:
        raise UserError(f"codec {shortened(repr(text))}: a density below {LEAST_DENSITY} is not possible")
    return _sparse(kind, density, stored_as)


# ---- error feedback


def with_error_feedback(codec: Codec) -> Codec:
    """Return the codec marked for error feedback: the same bytes, but senders add what was lost before."""
    if codec.error_feedback:
        return codec
    first, plus, rest = codec.name.partition("+")
    return replace(codec, name=f"{first}:ef{plus}{rest}", error_feedback=True)


# ---- the two kinds of codecs


def _dense(name: str, coding: Coding) -> Codec:
    """Every value travels: ``coding.num_bytes(n, G)`` bytes, with G = 0 for codings without scales."""

    def encode(state: State, rng: np.random.Generator | None) -> np.ndarray:
        order = _wire_order(layout_of(state), by_rank=coding.grouped)
        return coding.encode(order.flatten(state, coding.largest), order.group_sizes, rng)

    def decode(buffer: np.ndarray, layout: Layout) -> State:
        data = _checked_bytes(buffer, num_bytes(layout))  # first: what follows is as large as the layout says
        order = _wire_order(layout, by_rank=coding.grouped)
        return order.unflatten(coding.decode(data, order.group_sizes))

    def num_bytes(layout: Layout) -> int:
        return coding.num_bytes(num_values(layout), _num_groups(layout) if coding.grouped else 0)

    return Codec(name, encode, decode, num_bytes, draws=coding.draws, lossless=name == "fp32")


def _sparse(kind: str, density: float, stored_as: str) -> Codec:
    """Every kind of tensor is encoded by itself (``_kinds``): the bytes are the sum of ``_sparse_kind``'s."""
    one = _sparse_kind(kind, density, stored_as)

    def encode(state: State, rng: np.random.Generator | None) -> np.ndarray:
        kinds = _kinds(layout_of(state))
        if len(kinds) == 1:
            return one.encode(state, rng)
        return np.concatenate([one.encode({n: state[n] for n, _ in part}, rng) for part in kinds])

    def decode(buffer: np.ndarray, layout: Layout) -> State:
        kinds = _kinds(layout)
        if len(kinds) == 1:
            return one.decode(buffer, layout)
        data, end = _checked_bytes(buffer, num_bytes(layout)), 0
        decoded: dict[str, torch.Tensor] = {}
        for part in kinds:
            start, end = end, end + one.num_bytes(part)
            decoded |= one.decode(data[start:end].copy(), part)
        return {name: decoded[name] for name, _ in layout}

    def num_bytes(layout: Layout) -> int:
        return sum(one.num_bytes(part) for part in _kinds(layout))

    def num_sent(layout: Layout) -> int:
        return sum(one.num_sent(part) for part in _kinds(layout))

    return replace(one, encode=encode, decode=decode, num_bytes=num_bytes, num_sent=num_sent)


@functools.lru_cache(maxsize=64)
def _kinds(layout: Layout) -> tuple[Layout, ...]:
    """Split a layout into what has one unit; what travels under a prefix, as variates do, is apart."""
    kinds: dict[tuple[str, str], list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in layout:
        prefix, _, rest = name.rpartition("/")
        kinds.setdefault((prefix, "" if is_adapter_part(rest) else rest), []).append((name, shape))
    return tuple(tuple(part) for part in kinds.values()) or ((),)


def _sparse_kind(kind: str, density: float, stored_as: str) -> Codec:
    """k = num_kept(n, density) values travel: ``coding.num_bytes(k, G) + positions_num_bytes(n, k)`` bytes.

    The selection is over all tensors of the state. The values stand first in the buffer.
    """
    select, coding = SELECTIONS[kind], CODINGS[stored_as]()

    def encode(state: State, rng: np.random.Generator | None) -> np.ndarray:
        order = _wire_order(layout_of(state), by_rank=coding.grouped)
        values = order.flatten(state, coding.largest)
        mask = select(values, num_kept(values.size, density))
        kept = coding.encode(values[mask], _count_by_group(mask, order.group_sizes), rng)
        return np.concatenate([kept.view(np.uint8), encode_positions(mask)])

    def decode(buffer: np.ndarray, layout: Layout) -> State:
        data = _checked_bytes(buffer, num_bytes(layout))
        order = _wire_order(layout, by_rank=coding.grouped)
        n = num_values(layout)
        k = num_kept(n, density)
        values_end = coding.num_bytes(k, order.group_sizes.size)
        mask = decode_positions(data[values_end:], n, k)
        values = np.zeros(n, dtype=np.float32)
        values[mask] = coding.decode(data[:values_end], _count_by_group(mask, order.group_sizes))
        return order.unflatten(values)

    def num_bytes(layout: Layout) -> int:
        n, num_groups = num_values(layout), _num_groups(layout) if coding.grouped else 0
        k = num_kept(n, density)
        return coding.num_bytes(k, num_groups) + positions_num_bytes(n, k)

    def num_sent(layout: Layout) -> int:
        return num_kept(num_values(layout), density)

    name, lossless = f"{kind}:{density}+{stored_as}", density == 1 and stored_as == "fp32"
    return Codec(name, encode, decode, num_bytes, num_sent, draws=coding.draws, lossless=lossless)


def _count_by_group(mask: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """Return how many values of each group are marked, (G,)."""
    marked_before = np.concatenate([[0], np.cumsum(mask)])
    return np.diff(marked_before[np.concatenate([[0], np.cumsum(group_sizes)])])


def _checked_bytes(buffer: np.ndarray, expected_bytes: int) -> np.ndarray:
    if buffer.nbytes != expected_bytes:
        raise PayloadError(
            f"the payload has {buffer.nbytes} bytes where its codec and layout make {expected_bytes}: "
            "do both sides use the same codec?"
        )
    return np.require(buffer, requirements=["C", "A"]).reshape(-1).view(np.uint8)


# ---- the order of the values on the wire


@dataclass(frozen=True, eq=False)
class _WireOrder:
    """The order in which a state's values travel, and the groups that share a scale.

    Attributes:
        transposed: Names of the tensors that travel column by column, so that every group is consecutive.
        layout: Names and shapes after that transposition.
        group_sizes: (G,) int64; empty where no coding asks for groups.
    """

    transposed: frozenset[str]
    layout: Layout
    group_sizes: np.ndarray

    def flatten(self, state: State, largest: float) -> np.ndarray:
        """Return the values, (n,) float32; raise PayloadError for one that is NaN or beyond ``largest``."""
        return flatten(self._transpose(state), self.layout, largest=largest)

    def unflatten(self, values: np.ndarray) -> State:
        """Return the named tensors; raise PayloadError for a value that is not finite."""
        check_finite(values, self.layout)
        state = unflatten(values, self.layout)
        if not self.transposed:
            return state
        return {**state, **{name: state[name].t().contiguous() for name in self.transposed}}

    def _transpose(self, state: State) -> State:
        if not self.transposed:
            return state
        return {name: tensor.t() if name in self.transposed else tensor for name, tensor in state.items()}


@functools.lru_cache(maxsize=128)
def _wire_order(layout: Layout, *, by_rank: bool) -> _WireOrder:
    if not by_rank:
        return _WireOrder(frozenset(), layout, np.zeros(0, dtype=np.int64))
    columns = frozenset(name for name, shape in layout if _by_column(name, shape))
    turned = tuple((name, shape[::-1] if name in columns else shape) for name, shape in layout)
    sizes: list[int] = []
    for (_, shape), num_groups in zip(turned, _groups(layout), strict=True):
        sizes += [math.prod(shape) // max(num_groups, 1)] * num_groups
    return _WireOrder(columns, turned, np.array(sizes, dtype=np.int64))


def _by_column(name: str, shape: tuple[int, ...]) -> bool:
    return factor_of(name) == "lora_B" and len(shape) == 2


def _groups(layout: Layout) -> Iterator[int]:
    """Yield how many groups each tensor has; an empty one has none."""
    for name, shape in layout:
        rows = 1 if len(shape) < 2 else shape[1] if _by_column(name, shape) else shape[0]
        yield rows if math.prod(shape) else 0


@functools.lru_cache(maxsize=128)
def _num_groups(layout: Layout) -> int:
    """Return how many groups a state has, without memory for them: the layout may only claim them."""
    return sum(_groups(layout))

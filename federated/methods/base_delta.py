"""What has been added to a frozen base weight so far, and what a client lacks of it.

FLoRA and FedEx-LoRA merge into the base (``W <- W + term``) at the end of a round; at the start of the next,
each client receives the terms that are newer than what it holds, and adds them to the sum of those before.
Clients that were away for long, or join late, receive the backlog. All add them up from the oldest, (t1 + t2)
+ t3, and the sum to the pre-trained weight, and so have the same bits.

A round's term is kept exactly, as factors, as long as all kept factors together hold no more numbers than the
weight itself; older rounds are then summed into one dense matrix. So both the server's memory and a client's
backlog are the smaller of the two, and never more than d_out * d_in numbers a module on the wire.

The dense sum has the dtype of the factors, float32 in a run: merging into a half-precision base loses
updates (20 merges of 1.4 % / 20 each: 29 % lost in fp16, 85 % in bf16), so a client adds in float32 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from federated.methods.lowrank import LowRank
from models.errors import UserError
from models.state import FlatState, State

Term = tuple[int, LowRank]
"""The round at whose end a product was merged, and the product."""


@dataclass(frozen=True, eq=False)
class BaseUpdate:
    """What a client receives for one base weight: either the terms it lacks, or everything since the start.

    Attributes:
        terms: Added to the sum that the client has, oldest first.
        total: (d_out, d_in), takes the place of that sum; None when ``terms`` are fewer numbers.
    """

    terms: tuple[Term, ...] = ()
    total: Tensor | None = None

    @property
    def num_values(self) -> int:
        """Numbers to send."""
        return sum(term.num_values for _, term in self.terms) if self.total is None else self.total.numel()


@dataclass(frozen=True, eq=False)
class BaseDelta:
    """Everything merged into one base weight since the start: ``dense`` plus ``terms``.

    Attributes:
        terms: The newest rounds, exactly; the newest of all is always among them.
        dense: (d_out, d_in), the sum of all rounds before those; None when there are none.
        dense_version: The last round inside ``dense``.
    """

    terms: tuple[Term, ...] = ()
    dense: Tensor | None = None
    dense_version: int = -1

    def plus(self, server_round: int, term: LowRank) -> BaseDelta:
        """Return the delta with one more round merged."""
        term = LowRank(term.left.contiguous(), term.right.contiguous())  # as others receive it
        terms, dense, dense_version = (*self.terms, (server_round, term)), self.dense, self.dense_version
        while len(terms) > 1 and _num_values(terms) > term.shape[0] * term.shape[1]:
            dense_version, oldest = terms[0]
            dense = oldest.dense() if dense is None else dense + oldest.dense()
            terms = terms[1:]
        return BaseDelta(terms, dense, dense_version)

    def total(self) -> Tensor:
        """Return the sum of everything merged, (d_out, d_in).

        Raises:
            ValueError: Nothing has been merged.
        """
        products = [term.dense() for _, term in self.terms]
        if self.dense is not None:
            products.insert(0, self.dense)
        if not products:
            raise ValueError("nothing has been merged into this base weight")
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    def received(self, update: BaseUpdate, held_version: int) -> BaseDelta:
        """Return the delta, as one dense sum, of a client that has received an update.

        Args:
            update: What arrived for this module.
            held_version: Version of this delta; terms that it already contains are left out.
        """
        if update.total is not None:
            return BaseDelta(dense=update.total)
        delta = self
        for merged_at, term in update.terms:
            if merged_at > held_version:
                delta = BaseDelta(((merged_at, term),), delta.dense)
                delta = BaseDelta(dense=delta.total())
        return delta

    def since(self, version: int) -> BaseUpdate | None:
        """Return what somebody holding ``version`` lacks, in the fewer numbers; None when nothing."""
        if self.dense is not None and version < self.dense_version:
            return BaseUpdate(total=self.total())
        newer = tuple((at, term) for at, term in self.terms if at > version)
        if not newer:
            return None
        d_out, d_in = newer[0][1].shape
        return BaseUpdate(newer) if _num_values(newer) <= d_out * d_in else BaseUpdate(total=self.total())


def _num_values(terms: tuple[Term, ...]) -> int:
    return sum(term.num_values for _, term in terms)


# ---- as named tensors, for payloads and checkpoints

_PREFIX, _LEFT, _RIGHT, _TOTAL = "base_update", "left", "right", "total"


def updates_to_state(updates: Mapping[str, BaseUpdate]) -> State:
    """Name the tensors of base updates: ``base_update/<module>/<round>/left`` and so on."""
    state: dict[str, Tensor] = {}
    for module, update in updates.items():
        if update.total is not None:
            state[f"{_PREFIX}/{module}/{_TOTAL}"] = update.total
        for merged_at, term in update.terms:
            state[f"{_PREFIX}/{module}/{merged_at}/{_LEFT}"] = term.left
            state[f"{_PREFIX}/{module}/{merged_at}/{_RIGHT}"] = term.right
    return {name: state[name] for name in sorted(state)}


def split_updates(state: Mapping[str, Tensor]) -> tuple[State, dict[str, BaseUpdate]]:
    """Undo ``updates_to_state``: return the other tensors of a state, and the base updates among it.

    Raises:
        UserError: A base update is incomplete, or its factors have no product.
    """
    if isinstance(state, FlatState) and not any(name.startswith(f"{_PREFIX}/") for name in state.names):
        return state, {}
    others: dict[str, Tensor] = {}
    terms: dict[str, dict[int, dict[str, Tensor]]] = {}
    updates: dict[str, BaseUpdate] = {}
    for name, tensor in state.items():
        match name.split("/"):
            case [prefix, *_] if prefix != _PREFIX:
                others[name] = tensor
            case [_, module, side] if side == _TOTAL and tensor.ndim == 2:
                updates[module] = BaseUpdate(total=tensor)
            case [_, module, at, side] if at.isdecimal() and side in (_LEFT, _RIGHT) and tensor.ndim == 2:
                terms.setdefault(module, {}).setdefault(int(at), {})[side] = tensor
            case _:
                raise UserError(f"{name} {tuple(tensor.shape)} is no update of a base weight")
    for module, by_round in terms.items():
        updates[module] = BaseUpdate(terms=_checked_terms(module, by_round))
    return others, updates


def _checked_terms(module: str, by_round: Mapping[int, Mapping[str, Tensor]]) -> tuple[Term, ...]:
    """Return the terms of one base weight, oldest first, if all are products of its shape."""
    if any(sides.keys() != {_LEFT, _RIGHT} for sides in by_round.values()):
        raise UserError(f"an update of the base weight {module} has one factor only")
    terms = tuple((at, LowRank(sides[_LEFT], sides[_RIGHT])) for at, sides in sorted(by_round.items()))
    same = len({term.shape for _, term in terms}) == 1
    if not same or any(term.left.shape[1] != term.right.shape[0] for _, term in terms):
        raise UserError(f"the updates of the base weight {module} do not have one shape")
    return terms

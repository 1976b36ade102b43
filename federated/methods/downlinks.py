"""What a client receives: everything that changed since its version, in its rank and scaling, and no more.

``pack_downlink`` and ``receive`` are its two ends on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from federated.methods.base_delta import BaseUpdate, split_updates, updates_to_state
from federated.methods.fresh import fresh_factors
from federated.methods.protocol import (
    NEVER,
    ClientProfile,
    Downlink,
    FreshDraw,
    NameRule,
    Names,
    ServerState,
    Update,
    nothing,
    sorted_state,
)
from lora.adapters import FactorPair, factor_pairs
from models.errors import UserError, shortened
from models.state import FlatState, State


def send_changed(
    changes: NameRule, private: Callable[[Iterable[str]], Names] = nothing
) -> Callable[[ServerState, ClientProfile], Downlink]:
    """Return a downlink rule: everything to a new client, to the others what they lack.

    Args:
        changes: (names, server_round) -> names whose value is another after that round, on the server or, by
            local training, on a client. What is in none of the rounds since a client's version, it still has.
        private: Names that are sent to a new client only, as initial values.
    """

    def downlink(server: ServerState, client: ClientProfile) -> Downlink:
        refuse_other_rank(server, client)
        names = changed_names(server, client, changes, private)
        return Downlink(
            state={name: server.state[name] for name in names},
            version=server.server_round,
            base_updates=base_updates_for(server, client),
        )

    return downlink


def changed_names(
    server: ServerState,
    client: ClientProfile,
    changes: NameRule,
    private: Callable[[Iterable[str]], Names] = nothing,
) -> Names:
    """Return the names that a client of this version lacks, sorted."""
    names = set(server.state)
    if client.version < 0:
        return tuple(sorted(names))
    rounds = range(client.version + 1, server.server_round + 1)
    stale = {name for server_round in rounds for name in changes(names, server_round)}
    return tuple(sorted(stale - set(private(names))))


def base_updates_for(server: ServerState, client: ClientProfile) -> dict[str, BaseUpdate]:
    """Return what a client of this version folds into its base weights."""
    updates = {module: delta.since(client.version) for module, delta in server.base_delta.items()}
    return {module: update for module, update in sorted(updates.items()) if update is not None}


def refuse_other_rank(server: ServerState, client: ClientProfile) -> None:
    """Raise UserError when a client's rank is not the server's, for rules that cannot mix ranks."""
    ranks = {server.state[pair.a].shape[0] for pair in factor_pairs(server.state)}
    if client.rank is not None and ranks and client.rank != max(ranks):
        raise UserError(
            f"a client has rank {client.rank}, the server {max(ranks)}: this aggregator needs one rank for "
            "all; give all clients the same lora.r, or take flora, flexlora or hetlora"
        )


def refuse_rank_above(server: ServerState, client: ClientProfile) -> None:
    """Raise UserError when a client's rank is above the server's, for rules that mix ranks."""
    highest = max(server.state[pair.a].shape[0] for pair in factor_pairs(server.state))
    if client.rank is not None and not 1 <= client.rank <= highest:
        raise UserError(
            f"a client has rank {client.rank}, the server {highest}: lora.r must be the largest client rank"
        )


def profile_of(update: Update) -> ClientProfile:
    """Return the profile under which a client that sent this update had received the server's state."""
    return ClientProfile(rank=update.rank, scaling=update.scaling)


def truncated_factors(server: ServerState, pair: FactorPair, client: ClientProfile) -> tuple[Tensor, Tensor]:
    """Return the first r_k components of one global adapter in a client's scaling, as (A, B).

    s_k B A equals the truncation of the global s B A: the change of scaling goes into B alone.
    """
    a, b = server.state[pair.a], server.state[pair.b]
    rank = a.shape[0] if client.rank is None else min(client.rank, a.shape[0])
    factor = 1.0
    if client.scaling is not None:
        factor = server.scaling[pair.module] / client.scaling[pair.module]
    b = b[:, :rank]
    return a[:rank], b if factor == 1.0 else b * factor


def send_truncated(server: ServerState, client: ClientProfile) -> Downlink:
    """Downlink rule for mixed ranks: the leading components in the client's scaling, and the head.

    Raises:
        UserError: The client's rank is above the server's.
    """
    refuse_rank_above(server, client)
    if client.version == server.server_round:
        return Downlink(state={}, version=server.server_round)
    state = dict(server.state)
    for pair in factor_pairs(server.state):
        state[pair.a], state[pair.b] = truncated_factors(server, pair, client)
    return Downlink(state=state, version=server.server_round)


# ---- the two ends of the wire

_VERSION, _SEED = "version", "fresh-seed"
_AUXILIARY = "control/"
"""Begins the names under which auxiliary arrays travel."""


def join_auxiliary(state: State, auxiliary: State) -> State:
    """Return a state with the arrays that travel beside it, under names of their own."""
    beside = {_AUXILIARY + name: tensor for name, tensor in auxiliary.items()}
    return {**state, **beside} if beside else state


def split_auxiliary(state: State) -> tuple[State, State]:
    """Undo ``join_auxiliary``."""
    if not any(name.startswith(_AUXILIARY) for name in state):
        return state, {}
    others = {name: t for name, t in state.items() if not name.startswith(_AUXILIARY)}
    beside = {name.removeprefix(_AUXILIARY): t for name, t in state.items() if name.startswith(_AUXILIARY)}
    return others, beside


def pack_downlink(downlink: Downlink) -> tuple[State, dict[str, int]]:
    """Return a downlink as one state and a few numbers for the message's config."""
    state = sorted_state({**downlink.state, **updates_to_state(downlink.base_updates)})
    state = join_auxiliary(state, downlink.auxiliary)
    meta = {_VERSION: downlink.version}
    if downlink.fresh is not None:
        meta[_SEED] = downlink.fresh.seed
    return state, meta


def unpack_downlink(state: Mapping[str, Tensor], meta: Mapping[str, object]) -> Downlink:
    """Undo ``pack_downlink``; further entries of ``meta`` are ignored.

    Raises:
        UserError: A number of ``meta`` or a base update is none.
    """
    values, auxiliary = split_auxiliary(state)
    values, updates = split_updates(values)
    version = _whole(meta, _VERSION, at_least=0 if _SEED in meta else NEVER)
    fresh = FreshDraw(_whole(meta, _SEED, at_least=0), version) if _SEED in meta else None
    return Downlink(values, version, updates, fresh, auxiliary)


def _whole(meta: Mapping[str, object], key: str, *, at_least: int) -> int:
    value = meta.get(key)
    if type(value) is not int or not at_least <= value < 2**63:
        raise UserError(
            f"the downlink's {key} is {shortened(repr(value))}, not a whole number of {at_least} or more"
        )
    return value


def receive(downlink: Downlink, held: Mapping[str, Tensor]) -> State:
    """Return the wire state that a client holds after a downlink; base weights are ``base_delta.fold``'s.

    It is to be read only: where the downlink brings everything, it is the downlink's own state, which other
    clients of the process hold, too.

    Args:
        downlink: What arrived.
        held: The wire state of the version before; for a new client its model's own state, of which only
            shapes of freshly drawn factors and private values matter.
    """
    brings_all = downlink.fresh is None and held.keys() <= downlink.state.keys()
    if brings_all and isinstance(downlink.state, FlatState):
        return downlink.state
    fresh = {} if downlink.fresh is None else fresh_factors(held, downlink.fresh)
    return sorted_state({**held, **fresh, **downlink.state})

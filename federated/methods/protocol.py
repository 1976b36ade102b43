"""What every aggregation rule speaks: the values that go in and out of one.

``federated.rounds.strategy`` asks ``downlink`` what a client receives, the client asks ``trains``, ``uplink``
and ``private`` what to do with it, and the strategy hands the decoded updates to ``apply``. An aggregator is
a value made of functions; it knows neither Flower nor a model.

One number tells what somebody holds: the ``server_round`` whose end produced it (its *version*). Adapters,
head and base change at the end of a round and at no other time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from federated.methods.base_delta import BaseDelta, BaseUpdate
from lora.adapters import factor_pairs
from models.state import State

Names = tuple[str, ...]
"""Wire names, sorted."""

NEVER = -1
"""Version of a client that has received nothing yet: it holds the pre-trained base model alone."""


@dataclass(frozen=True, eq=False)
class Update:
    """What one client sent in a round, decoded.

    Attributes:
        client_id: Fixes the order in which updates are summed.
        num_examples: Its weight; w_k = num_examples / their sum.
        state: New values of the names in ``Aggregator.uplink``, in the dtype of the server's state.
        scaling: Module -> s_k, the factor in front of this client's B @ A.
        rank: The client's rank where ranks differ (a module's rank is the smaller of this and the server's);
            None: the server's own ranks.
        start: The values of the same names before local training, as the server knows them.
        auxiliary: What the method sends beside them, by the names of ``Aggregator.auxiliary``.
    """

    client_id: int
    num_examples: int
    state: State
    scaling: Mapping[str, float]
    rank: int | None = None
    start: State = field(default_factory=dict)
    auxiliary: State = field(default_factory=dict)

    @functools.cached_property
    def delta(self) -> State:
        """What the client changed, ``state`` - ``start``, to be read only.

        Raises:
            KeyError: The start is not known.
        """
        return {name: value - self.start[name] for name, value in self.state.items()}

    def with_delta(self, delta: State) -> Update:
        """Return the update of a client that changed this instead: clipped, noised, or as a rule wants it.

        Args:
            delta: Changes of the same names, of the same shapes.
        """
        return replace(self, state={name: self.start[name] + change for name, change in delta.items()})


@dataclass(frozen=True)
class ClientProfile:
    """What the server knows of a client when it makes its downlink.

    Attributes:
        rank: As in ``Update``.
        scaling: Module -> s_k; None: the server's own.
        version: Version of the last downlink that the client received; ``NEVER`` before the first, and for
            clients that keep nothing between rounds.
    """

    rank: int | None = None
    scaling: Mapping[str, float] | None = None
    version: int = NEVER


@dataclass(frozen=True)
class FreshDraw:
    """Factors that are not sent because both sides draw them: ``fresh.fresh_factors(shapes, draw)``."""

    seed: int
    server_round: int


@dataclass(frozen=True, eq=False)
class Downlink:
    """What one client receives: everything that changed since its version, and nothing else.

    Attributes:
        state: Adapter and head values, in the client's rank and scaling.
        version: What the client holds once it has taken this in.
        base_updates: Module -> what it folds into its frozen base weight (``base_delta.fold``).
        fresh: How to draw the factors that are not in ``state``; None when all others stay as they are.
        auxiliary: What the method sends beside the model to clients that train.
    """

    state: State
    version: int
    base_updates: Mapping[str, BaseUpdate] = field(default_factory=dict)
    fresh: FreshDraw | None = None
    auxiliary: State = field(default_factory=dict)

    @property
    def num_values(self) -> int:
        """Numbers to send before any codec."""
        base = sum(update.num_values for update in self.base_updates.values())
        return base + sum(t.numel() for state in (self.state, self.auxiliary) for t in state.values())


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything the server carries from round to round.

    Attributes:
        state: Global adapter and head (for ``fed_sb`` the two bases and the core).
        scaling: Module -> s, the factor in front of the global B @ A.
        server_round: Rounds done, refused ones included; the version of what is held here.
        base_delta: Module -> what has been added to the frozen base weight since the start.
        memory: Private to the aggregator and the server optimizer.
    """

    state: State
    scaling: Mapping[str, float]
    server_round: int = 0
    base_delta: Mapping[str, BaseDelta] = field(default_factory=dict)
    memory: State = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LocalStart:
    """What a method sees of a client whose local training begins.

    Attributes:
        parameters: The live parameters of what travels, by wire name; those that train require a gradient.
        private: The names among them that stay with the client.
        rank: The client's adapter rank; None: the model's own.
        auxiliary: What came beside the model (``Aggregator.auxiliary``).
        memory: What the method has kept of this client (``ClientRules.remember``); empty at first.
    """

    parameters: Mapping[str, Tensor]
    private: frozenset[str] = frozenset()
    rank: int | None = None
    auxiliary: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)


def _no_arrays(*_: object) -> State:
    return {}


@dataclass(frozen=True, eq=False)
class LossTerm:
    """What a method adds to the loss of one client's local steps.

    Attributes:
        value: Gives the term; called at every step when the gradient of the data's loss is complete.
        auxiliary: Gives what the client sends beside its update; called after the last step.
    """

    value: Callable[[], Tensor]
    auxiliary: Callable[[], State] = _no_arrays


def _as_received(held: State) -> State:
    return held


def _as_trained(trained: State, held: State) -> State:
    return trained


def _unconstrained(held: State) -> State:
    return {}


def _same_rank(before: State, trained: State, rank: int) -> int:
    return rank


@dataclass(frozen=True)
class ClientRules:
    """The client's side of a method; the defaults do nothing.

    Attributes:
        to_model: Wire state held -> ordinary values for the model.
        to_wire: (the model's values after training, wire state held) -> wire state; ``uplink`` picks from it.
        bases: Wire state held -> model name -> basis Q; that parameter trains as Q @ core
            (``fed_sb.InBasis``).
        terms: What is added to the loss, each a function of where the local training starts.
        next_rank: (values before training, after it, rank) -> the rank the client goes on with.
        remember: (what was kept, auxiliary arrays sent, as the server decodes them) -> what is kept.
    """

    to_model: Callable[[State], State] = _as_received
    to_wire: Callable[[State, State], State] = _as_trained
    bases: Callable[[State], State] = _unconstrained
    terms: tuple[Callable[[LocalStart], LossTerm], ...] = ()
    next_rank: Callable[[State, State, int], int] = _same_rank
    remember: Callable[[State, State], State] = _no_arrays

    @property
    def changes_ranks(self) -> bool:
        """Whether a client's rank may fall from round to round, so that each client has one of its own."""
        return self.next_rank is not _same_rank


NameRule = Callable[[Iterable[str], int], Names]


@dataclass(frozen=True)
class Aggregator:
    """An aggregation rule.

    Attributes:
        name: As in ``AGGREGATORS``, with its options.
        init: (first global state, scaling) -> the server's state before round 1.
        downlink: (server, client) -> what that client receives now.
        trains: (names, server_round) -> those that get gradients in that round.
        uplink: (names, server_round) -> wire names that travel up after it.
        private: names -> those that stay with their client; sent once, as initial values, to a new client.
        apply: (server, updates of the next round) -> the server after that round. The order of the updates
            does not matter, bit for bit.
        exact: Whether every client then holds W + sum_k w_k s_k B_k A_k up to rounding, with codecs that lose
            nothing.
        allows_mixed_ranks: Whether clients may have ranks below the server's.
        keeps_basis: Whether factors mean the same from round to round, so that momentum makes sense.
        has_global_model: False where only the clients hold complete models.
        clients_remember: Whether clients keep what they receive, so that a downlink may leave out what they
            still hold. Where every value is new in every round there is nothing to remember.
        merges_into_base: Whether part of what is learnt goes into the base weights, so that the adapter alone
            is not the model.
        auxiliary: Server -> arrays that travel beside the model to clients that train. These send arrays of
            the same names and shapes beside their updates: SCAFFOLD's control variates.
        client: The client's side.
    """

    name: str
    init: Callable[[State, Mapping[str, float]], ServerState]
    downlink: Callable[[ServerState, ClientProfile], Downlink]
    trains: NameRule
    uplink: NameRule
    private: Callable[[Iterable[str]], Names]
    apply: Callable[[ServerState, Sequence[Update]], ServerState]
    exact: bool
    allows_mixed_ranks: bool = False
    keeps_basis: bool = False
    has_global_model: bool = True
    clients_remember: bool = False
    merges_into_base: bool = False
    auxiliary: Callable[[ServerState], State] = _no_arrays
    client: ClientRules = ClientRules()


def with_loss_term(method: Aggregator, term: Callable[[LocalStart], LossTerm]) -> Aggregator:
    """Return the method with a further term, before its own, in its clients' loss."""
    return replace(method, client=replace(method.client, terms=(term, *method.client.terms)))


def everything(names: Iterable[str], server_round: int = 0) -> Names:
    """Name rule: all of them."""
    return tuple(sorted(names))


def nothing(names: Iterable[str]) -> Names:
    """Name rule: none of them."""
    return ()


def head_names(names: Iterable[str]) -> Names:
    """Return the names that are no factors: head, biases and temperature, averaged by every rule."""
    names = set(names)
    factors = {name for pair in factor_pairs(names) for name in (pair.a, pair.b)}
    return tuple(sorted(names - factors))


def second_factor_and_head(names: Iterable[str], server_round: int = 0) -> Names:
    """Name rule: all but each adapter's A."""
    names = set(names)
    return tuple(sorted(names - {pair.a for pair in factor_pairs(names)}))


def sorted_state(state: Mapping[str, torch.Tensor]) -> State:
    """Return a state in the order of its names."""
    return {name: state[name] for name in sorted(state)}


def skip_round(server: ServerState) -> ServerState:
    """Return the server after a round without a usable update: unchanged but for the round counter."""
    return replace(server, server_round=server.server_round + 1)

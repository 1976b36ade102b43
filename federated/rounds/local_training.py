"""One client's local training: wire state in, wire state out.

It loads the state into the shared model, lets train what the aggregator says trains, takes the local steps on
the client's own random streams, and reads the state back.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from federated.config.seeding import generator, scoped_torch_rng
from federated.methods import InBasis, LocalStart, cut_to_rank
from federated.rounds.batches import local_batches
from federated.rounds.client_ranks import mixed_ranks, scaling_at
from federated.rounds.run import Run
from lora.adapters import factor_pairs, owner_of, set_scaling
from models.progress import counted
from models.state import State


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who trains, when, and how that differs from other clients.

    Attributes:
        client_id: The client.
        server_round: The round.
        rank: Its adapter rank; None: the model's own.
        auxiliary: What the method sent beside the model.
        memory: What the method has kept of this client.
    """

    client_id: int
    server_round: int
    rank: int | None = None
    auxiliary: State = field(default_factory=dict)
    memory: State = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What local training gives.

    Attributes:
        state: The client's wire state after training; what travels up may be overwritten by the taker.
        train_loss: Mean loss over the local steps.
        num_examples: Rows of its shard that it trains on.
        next_rank: The rank it goes on with.
        auxiliary: What the method sends beside the update.
    """

    state: State
    train_loss: float
    num_examples: int
    next_rank: int | None
    auxiliary: State = field(default_factory=dict)


def train_locally(run: Run, assignment: Assignment, held: State) -> LocalResult:
    """Take a client's local steps from the wire state it holds."""
    model, rules = run.model, run.aggregator.client
    num_steps = run.clients.local_steps
    rng = generator(run.clients.seed, "client", assignment.server_round, assignment.client_id)
    load_into_model(run, held, assignment.rank)
    trains = run.aggregator.trains(held, assignment.server_round)
    start = LocalStart(
        run.model.exchanged_parameters,
        frozenset(run.aggregator.private(held)),
        assignment.rank,
        assignment.auxiliary,
        assignment.memory,
    )
    with _only_these_train(run, trains), _in_bases(run, rules.bases(held)):
        terms = [term(start) for term in rules.terms]
        extra_loss = sum_of_terms([term.value for term in terms])
        model.start_training(run.training_settings, num_steps, extra_loss=extra_loss)
        batches = local_batches(
            run, assignment.client_id, num_steps, rng, server_round=assignment.server_round
        )
        with scoped_torch_rng(rng):
            losses = [model.train_step(batch) for batch in counted("steps", batches, num_steps)]
    before = rules.to_model(held)
    trained = model.get_state()
    rank = assignment.rank
    if rank is not None:
        trained = cut_to_rank(trained, rank)
    return LocalResult(
        state=rules.to_wire(trained, held),
        train_loss=statistics.fmean(losses),
        num_examples=run.num_examples(assignment.client_id),
        next_rank=None if rank is None else rules.next_rank(before, trained, rank),
        auxiliary={name: value for term in terms for name, value in term.auxiliary().items()},
    )


def load_into_model(run: Run, held: State, rank: int | None = None) -> None:
    """Put a wire state into the model; adapters below the model's rank are padded with zeros.

    Padded components stay zero in training: with A and B both zero, each one's gradient is zero.
    """
    values = run.aggregator.client.to_model(held)
    if rank is not None:
        values = pad_to_layout(values, dict(run.layout))
    if mixed_ranks(run):
        set_scaling(run.model, scaling_at(run, rank))
    run.model.set_state(values)


def pad_to_layout(state: State, shapes: Mapping[str, Sequence[int]]) -> State:
    """Return a state whose factors are filled up with zeros to the model's shapes."""
    padded = dict(state)
    for pair in factor_pairs(state):
        for name in (pair.a, pair.b):
            full = state[name].new_zeros(tuple(shapes[name]))
            rows, columns = state[name].shape
            full[:rows, :columns] = state[name]
            padded[name] = full
    return padded


@contextlib.contextmanager
def _only_these_train(run: Run, names: Sequence[str]) -> Iterator[None]:
    """Freeze what travels but does not train in this round; put everything back after."""
    wanted = set(names)
    parameters = run.model.exchanged_parameters
    frozen = [p for name, p in parameters.items() if p.requires_grad and name not in wanted]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _in_bases(run: Run, bases: Mapping[str, Tensor]) -> Iterator[None]:
    """Confine parameters to the span of a basis while they train (``fed_sb.InBasis``)."""
    owners = {name: owner_of(run.model, name) for name in bases}
    for name, basis in bases.items():
        parametrize.register_parametrization(owners[name], "weight", InBasis(basis))
    if bases:
        run.model.refresh()
    try:
        yield
    finally:
        for owner in owners.values():
            parametrize.remove_parametrizations(owner, "weight", leave_parametrized=True)
        if bases:
            run.model.set_exchanged(run.model.exchanged_names)


def sum_of_terms(terms: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor] | None:
    """Return the sum of loss terms as one function; None when there are none."""
    if len(terms) < 2:
        return terms[0] if terms else None
    return lambda: torch.stack([term() for term in terms]).sum()

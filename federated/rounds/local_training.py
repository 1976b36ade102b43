"""One client's local training: wire state in, wire state out.

It loads the state into the shared model, lets train what the aggregator says trains, takes the local steps on
the client's own random streams, and reads the state back.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from federated.config.seeding import generator, scoped_torch_rng
from federated.methods import InBasis, cut_to_rank
from federated.methods.client_terms import ControlVariates, DriftCorrection, proximal_term, sum_of_terms
from federated.rounds.batches import local_batches
from federated.rounds.client_ranks import mixed_ranks, scaling_at
from federated.rounds.run import Run
from lora.adapters import factor_pairs, owner_of, set_scaling, unwrap
from models.state import State


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who trains, when, and how that differs from other clients.

    Attributes:
        client_id: The client.
        server_round: The round.
        rank: Its adapter rank; None: the model's own.
        variates: SCAFFOLD's control variates; None where ``client.scaffold`` is off.
    """

    client_id: int
    server_round: int
    rank: int | None = None
    variates: ControlVariates | None = None


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What local training gives.

    Attributes:
        state: The client's wire state after training; what travels up may be overwritten by the taker.
        train_loss: Mean loss over the local steps.
        num_examples: Rows of its shard that it trains on.
        next_rank: The rank it goes on with.
        own_variate: The client's next control variate; None without SCAFFOLD.
    """

    state: State
    train_loss: float
    num_examples: int
    next_rank: int | None
    own_variate: State | None = None


def train_locally(run: Run, assignment: Assignment, held: State) -> LocalResult:
    """Take a client's local steps from the wire state it holds."""
    model, rules = run.model, run.aggregator.client
    num_steps = run.config.client.local_steps
    rng = generator(run.config.seed, "client", assignment.server_round, assignment.client_id)
    load_into_model(run, held, assignment.rank)
    trains = run.aggregator.trains(held, assignment.server_round)
    shared = _shared_parameters(run, held)
    drift = _drift_correction(run, assignment.variates)
    with _only_these_train(run, trains), _in_bases(run, rules.bases(held)):
        terms = _extra_loss(run, assignment.rank, shared, drift)
        model.start_training(run.training_settings, num_steps, extra_loss=terms)
        batches = local_batches(
            run, assignment.client_id, num_steps, rng, server_round=assignment.server_round
        )
        with scoped_torch_rng(rng):
            losses = [model.train_step(batch) for batch in batches]
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
        own_variate=None if drift is None else drift.mean_gradient(),
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


# ---- what is added to the loss


def _shared_parameters(run: Run, held: State) -> list[nn.Parameter]:
    """Return the live parameters that are not private to the client."""
    private = set(run.aggregator.private(held))
    return [p for name, p in run.model.exchanged_parameters.items() if name not in private]


def _drift_correction(run: Run, variates: ControlVariates | None) -> DriftCorrection | None:
    if variates is None:
        return None
    parameters = run.model.exchanged_parameters
    return DriftCorrection({name: parameters[name] for name in variates.server}, variates)


def _extra_loss(
    run: Run, rank: int | None, shared: Sequence[nn.Parameter], drift: DriftCorrection | None
) -> Callable[[], Tensor] | None:
    """Return what aggregator and configuration add to a client's loss; call it when training is set up."""
    terms: list[Callable[[], Tensor]] = [] if drift is None else [drift]
    if mu := run.config.client.proximal_mu:
        trained = {id(p) for p in unwrap(run.model).parameters() if p.requires_grad}
        terms.append(proximal_term([p for p in shared if id(p) in trained], mu))
    penalty = run.aggregator.client.penalty
    if penalty is not None:
        factors: dict[str, Tensor] = dict(run.model.exchanged_parameters)
        terms.append(lambda: penalty(factors if rank is None else cut_to_rank(factors, rank)))
    return sum_of_terms(terms)

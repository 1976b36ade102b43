"""Fed-SB: one r x r core per module trains and travels between two frozen orthonormal bases.

W = W0 + s Q R P with Q (d_out, r) and P (r, d_in) sent once; a round moves R.

A model only knows A and B. It holds A = P and B = Q R (``ClientRules.to_model``), so that evaluation, merging
and adapter files need nothing new. B must move inside the span of Q: while it trains, the client puts
``InBasis(Q)`` on it with ``torch.nn.utils.parametrize.register_parametrization``, which makes R the parameter
and B = Q R its image. Gradients, moments and weight decay are then those of R, exactly and for any optimizer;
projecting B after each step would be exact for SGD alone. R comes back as the coordinates of B in Q
(``ClientRules.to_wire``), or from the parametrisation itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from federated.methods.averaging import advance, average, begin_with_adapters, of_one_rank
from federated.methods.downlinks import send_changed
from federated.methods.fresh import torch_generator
from federated.methods.protocol import (
    Aggregator,
    ClientRules,
    Names,
    ServerState,
    Update,
    head_names,
    nothing,
    second_factor_and_head,
    sorted_state,
)
from lora.adapters import FactorPair, factor_pairs
from models.errors import UserError
from models.state import State


def fed_sb(*, seed: int = 0) -> Aggregator:
    """R <- sum_k w_k R_k, with the bases Q and P frozen and the same for all: Q R P is then exact.

    In the wire state, ``lora_A`` is P, ``lora_B`` is Q and ``lora_R`` is R. The bases come from
    ``spectral_start`` (the paper's: SVD of the first update of full fine-tuning), or, without that extra
    round, from the given adapter: s Q R P = s B A, with a random Q and R = 0 where B = 0.

    Source: Fed-SB, Singhal et al., TMLR 2026, arXiv:2502.15436.
    Bytes: up b r^2, down b r^2; once to each new client b r (d_i + d_o); ``spectral_start`` costs b d_i d_o
    up from each client that takes part in it, once.
    Preserves: the product, the basis; noise added for privacy is not squared.

    Args:
        seed: Of the random bases; give the run's.
    """

    def init(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> ServerState:
        server = begin_with_adapters(state, scaling)
        missing = [p for p in factor_pairs(state) if core_name(p) not in state]
        values = dict(server.state)
        for index, pair in enumerate(missing):
            generator = torch_generator(seed, index)
            values |= _orthonormal_start(pair, server.state[pair.a], server.state[pair.b], generator)
        return ServerState(state=sorted_state(values), scaling=server.scaling)

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        return advance(server, average(of_one_rank(server, updates, "fed_sb")))

    return Aggregator(
        name="fed_sb",
        init=init,
        downlink=send_changed(_cores_and_head),
        trains=_left_factor_and_head,
        uplink=_cores_and_head,
        private=nothing,
        apply=apply,
        exact=True,
        keeps_basis=True,
        clients_remember=True,
        client=ClientRules(to_model=compose, to_wire=decompose, bases=bases_of),
    )


def core_name(pair: FactorPair) -> str:
    """Return the wire name of a module's core R, (r, r)."""
    return f"{pair.module}.lora_R.weight"


def spectral_start(
    state: Mapping[str, Tensor], estimate: Mapping[str, Tensor], scale: Mapping[str, float]
) -> State:
    """Return a wire state whose adapters are the best rank-r part of an estimated first update.

    Args:
        state: The model's first state; it gives the ranks and the head.
        estimate: Module -> (d_out, d_in), the change that one step of full fine-tuning would make, averaged
            over clients (minus learning rate times gradient, or times its sign for Adam).
        scale: Module -> s.

    Raises:
        UserError: A module has no estimate, or a rank above its width.
    """
    values = dict(state)
    for pair in factor_pairs(state):
        if pair.module not in estimate:
            raise UserError(f"fed_sb: there is no estimate for {pair.module}")
        rank = _checked_rank(pair, state[pair.a], state[pair.b])
        u, singular_values, vt = torch.linalg.svd(estimate[pair.module].double(), full_matrices=False)
        core = torch.diag(singular_values[:rank] / scale[pair.module])
        dtype = state[pair.a].dtype
        values[pair.a], values[pair.b] = vt[:rank].to(dtype), u[:, :rank].to(dtype)
        values[core_name(pair)] = core.to(dtype)
    return sorted_state(values)


# ---- the client's side


class InBasis(nn.Module):
    """Parametrisation of a weight that is confined to the span of an orthonormal basis: weight = Q @ core."""

    def __init__(self, basis: Tensor) -> None:
        """Take Q, (d_out, r)."""
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, core: Tensor) -> Tensor:
        """Return Q @ core, (d_out, r)."""
        return self.get_buffer("basis") @ core

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the core of a weight inside the span, (r, r)."""
        return coordinates(self.get_buffer("basis"), weight)


def compose(held: State) -> State:
    """Return the model's values, A = P and B = Q R, of a wire state."""
    model = dict(held)
    for pair in factor_pairs(held):
        core = model.pop(core_name(pair))
        model[pair.b] = held[pair.b] @ core
    return model


def decompose(trained: State, held: State) -> State:
    """Return the wire state of trained values: R with Q R = B, the bases as they are held."""
    wire = {**held, **{name: trained[name] for name in head_names(trained)}}
    for pair in factor_pairs(held):
        wire[core_name(pair)] = coordinates(held[pair.b], trained[pair.b])
    return wire


def coordinates(basis: Tensor, weight: Tensor) -> Tensor:
    """Return the R that brings Q R nearest to a weight, (r, r): (Q^T Q)^-1 Q^T B.

    Q^T B alone is that for orthonormal columns, which a lossy downlink codec has rounded: the core would then
    move in each round without any training.
    """
    q = basis.double()
    return torch.linalg.solve(q.T @ q, q.T @ weight.double()).to(weight.dtype)


def bases_of(held: State) -> State:
    """Return, for each parameter that trains inside a basis, that basis Q."""
    return {pair.b: held[pair.b] for pair in factor_pairs(held)}


# ---- names and bases


def _cores_and_head(names: Iterable[str], server_round: int = 0) -> Names:
    names = set(names)
    return tuple(sorted({*head_names(names), *(core_name(pair) for pair in factor_pairs(names))}))


def _left_factor_and_head(names: Iterable[str], server_round: int = 0) -> Names:
    names = set(names)
    cores = {core_name(pair) for pair in factor_pairs(names)}
    return second_factor_and_head(names - cores)


def _orthonormal_start(pair: FactorPair, a: Tensor, b: Tensor, generator: torch.Generator) -> State:
    """Return P, Q and R with Q R P = B A; Q is random where B is zero."""
    rank = _checked_rank(pair, a, b)
    left = b.double() if b.any() else torch.randn(b.shape, generator=generator, dtype=torch.float64)
    q, left_core = torch.linalg.qr(left)
    p, right_core = torch.linalg.qr(a.double().T)
    core = left_core @ right_core.T if b.any() else torch.zeros(rank, rank, dtype=torch.float64)
    return {pair.a: p.T.to(a.dtype), pair.b: q.to(b.dtype), core_name(pair): core.to(a.dtype)}


def _checked_rank(pair: FactorPair, a: Tensor, b: Tensor) -> int:
    rank = a.shape[0]
    if rank > min(a.shape[1], b.shape[0]):
        raise UserError(
            f"fed_sb: rank {rank} on {pair.module} is above its width {min(a.shape[1], b.shape[0])}; "
            "lower lora.r, or leave the classifier out of lora.target_components"
        )
    return rank

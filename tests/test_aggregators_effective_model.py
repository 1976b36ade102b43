"""The weights that server and clients compute with, after every rule, against dense float64 algebra: 1e-12.

The oracle sees what the clients sent and the dense weights of the round before, and of the package the names
alone. Cohorts have unequal weights, clients that miss rounds and clients that come late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from aggregator_simulation import (
    MIXED_RANKS,
    RANK,
    SHAPES,
    Federation,
    a_name,
    b_name,
    federation,
    normal,
    play_round,
    relative_distance,
    send,
    weights,
)
from torch import Tensor

from federated.methods import AGGREGATORS, Update
from models.state import State

COHORTS = ((0, 1, 3), (1, 3), (0, 2, 4), (3,), (0, 1, 2, 3, 4))
ONE_RANK = (RANK,) * 5


def product(state: State, module: str) -> Tensor:
    return state[b_name(module)] @ state[a_name(module)]


def mean(updates: Sequence[Update], values: Callable[[Update], Tensor]) -> Tensor:
    return sum(w * values(u) for w, u in zip(weights(updates), updates, strict=True))


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


class Oracle:
    """What one module's dense change should be: of the server, and of a client of a rank."""

    def __init__(self, module: str, scaling: float, start: State) -> None:
        self.module, self.scaling = module, scaling
        self.a, self.b = start[a_name(module)], start[b_name(module)]
        self.merged = torch.zeros(SHAPES[module], dtype=torch.float64)

    def server(self) -> Tensor:
        return self.merged + self.scaling * self.b @ self.a

    def client(self, rank: int) -> Tensor:
        return self.merged + self.scaling * self.b[:, :rank] @ self.a[:rank]

    def factors(self, updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
        """The two averages; a factor that did not travel is the old one."""
        a, b = a_name(self.module), b_name(self.module)
        travelled = updates[0].state
        return (
            mean(updates, lambda u: u.state[a]) if a in travelled else self.a,
            mean(updates, lambda u: u.state[b]) if b in travelled else self.b,
        )

    def ideal(self, updates: Sequence[Update]) -> Tensor:
        return mean(updates, lambda u: u.scaling[self.module] * product(u.state, self.module))


def averaged(oracle: Oracle, updates: Sequence[Update]) -> None:
    oracle.a, oracle.b = oracle.factors(updates)


def fedex(oracle: Oracle, updates: Sequence[Update]) -> None:
    averaged(oracle, updates)
    oracle.merged = oracle.merged + oracle.ideal(updates) - oracle.scaling * oracle.b @ oracle.a


def flora(oracle: Oracle, updates: Sequence[Update]) -> None:
    oracle.merged = oracle.server() + oracle.ideal(updates)
    oracle.b = torch.zeros_like(oracle.b)


def lora_fair(oracle: Oracle, updates: Sequence[Update]) -> None:
    ideal = oracle.ideal(updates)
    averaged(oracle, updates)
    a = oracle.a
    residual = ideal / oracle.scaling - oracle.b @ a
    ridge = 0.01 * (a @ a.T).diagonal().mean() * torch.eye(RANK, dtype=torch.float64)
    oracle.b = oracle.b + residual @ a.T @ torch.linalg.inv(a @ a.T + ridge)


def flexlora(oracle: Oracle, updates: Sequence[Update]) -> None:
    """In delta form; the factors are those of the dense SVD."""
    old = oracle.server()
    kept = mean(updates, lambda u: truncated(old, u.state[a_name(oracle.module)].shape[0]))
    u, s, vt = torch.linalg.svd(old + oracle.ideal(updates) - kept, full_matrices=False)
    oracle.b, oracle.a = u[:, :RANK] * s[:RANK] / oracle.scaling, vt[:RANK]


def hetlora(oracle: Oracle, updates: Sequence[Update]) -> None:
    a_total, b_total, total = torch.zeros_like(oracle.a), torch.zeros_like(oracle.b), 0.0
    for update in updates:
        a, b = update.state[a_name(oracle.module)], update.state[b_name(oracle.module)]
        scale = update.scaling[oracle.module]
        size = float((scale * b @ a).norm())
        padded_a, padded_b = oracle.a.clone(), oracle.b.clone()
        padded_a[: len(a)], padded_b[:, : len(a)] = a, b * scale / oracle.scaling
        a_total, b_total = a_total + size * padded_a, b_total + size * padded_b
        total += size
    oracle.a, oracle.b = a_total / total, b_total / total


RULES: dict[str, Callable[[Oracle, Sequence[Update]], None]] = {
    "fedavg": averaged,
    "ffa": averaged,
    "rolora": averaged,
    "dual": averaged,
    "fedex": fedex,
    "flora": flora,
    "lora_fair": lora_fair,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "fedsvd": averaged,
}
CASES = [(name, ONE_RANK) for name in RULES] + [(n, MIXED_RANKS) for n in ("flora", "flexlora", "hetlora")]


def start_of(fed: Federation, module: str) -> Oracle:
    oracle = Oracle(module, fed.server.scaling[module], fed.server.state)
    if module in fed.server.base_delta:  # flora merges a trained start
        oracle.merged = fed.server.base_delta[module].total()
    return oracle


@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B != 0"])
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize(
    ("name", "ranks"), CASES, ids=[f"{n}-{'one rank' if r is ONE_RANK else 'mixed'}" for n, r in CASES]
)
def test_server_and_every_client_hold_the_dense_equation(name, ranks, rank_stabilised, trained):
    fed = federation(AGGREGATORS[name](), ranks=ranks, rank_stabilised=rank_stabilised, trained=trained)
    oracles = {module: start_of(fed, module) for module in SHAPES}
    for cohort in COHORTS:
        updates = play_round(fed, cohort)
        for oracle in oracles.values():
            RULES[name](oracle, updates)
        wanted = {module: fed.pretrained[module] + o.server() for module, o in oracles.items()}
        assert relative_distance(fed.global_weights(), wanted, fed.pretrained) < 1e-12
        for client in fed.clients:
            kept = (dict(client.base), dict(client.held), client.version)
            send(fed, client)
            own = {m: fed.pretrained[m] + o.client(client.rank) for m, o in oracles.items()}
            assert relative_distance(client.start, own, fed.pretrained) < 1e-12
            client.base, client.held, client.version = kept
        if name == "fedsvd":  # clients go on from the server's new factors of the same product
            for module, oracle in oracles.items():
                oracle.a, oracle.b = fed.server.state[a_name(module)], fed.server.state[b_name(module)]


@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B != 0"])
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
def test_fed_sb_is_the_mean_core_between_the_first_bases(rank_stabilised, trained):
    fed = federation(AGGREGATORS["fed_sb"](), rank_stabilised=rank_stabilised, trained=trained)
    first = dict(fed.server.state)
    for cohort in COHORTS:
        updates = play_round(fed, cohort)
        wanted = {}
        for module in SHAPES:
            core = mean(updates, lambda u, m=module: u.state[f"{m}.lora_R.weight"])
            dense = first[b_name(module)] @ core @ first[a_name(module)]
            wanted[module] = fed.pretrained[module] + fed.server.scaling[module] * dense
        assert relative_distance(fed.global_weights(), wanted, fed.pretrained) < 1e-12
        for client in fed.clients:
            kept = (dict(client.base), dict(client.held), client.version)
            send(fed, client)
            assert relative_distance(client.start, wanted, fed.pretrained) < 1e-12
            client.base, client.held, client.version = kept


@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B != 0"])
def test_personal_models_are_the_shared_average_and_the_clients_own_part(trained):
    """fedsa: s B_k mean(A); dual: s mean(B) mean(A) + s B_k' A_k'. Also after rounds that a client missed."""
    extra = {}
    for index, (module, (d_out, d_in)) in enumerate(SHAPES.items()):
        extra[f"{module}.lora_A.private.weight"] = normal(70 + index, 2, d_in)
        extra[f"{module}.lora_B.private.weight"] = torch.zeros(d_out, 2, dtype=torch.float64)
    for name in ("fedsa", "dual"):
        fed = federation(AGGREGATORS[name](), trained=trained, extra=extra if name == "dual" else None)
        own: dict[int, State] = {}
        for cohort in COHORTS:
            updates = play_round(fed, cohort)
            own |= {i: dict(fed.clients[i].held) for i in cohort}
            for module in SHAPES:
                a = mean(updates, lambda u, m=module: u.state[a_name(m)])
                torch.testing.assert_close(fed.server.state[a_name(module)], a, rtol=0, atol=1e-12)
                for client_id, held in own.items():
                    client = fed.clients[client_id]
                    kept = (dict(client.base), dict(client.held), client.version)
                    send(fed, client)
                    if name == "fedsa":
                        wanted = held[b_name(module)] @ a
                        found = client.held[b_name(module)] @ client.held[a_name(module)]
                    else:
                        wanted = mean(updates, lambda u, m=module: u.state[b_name(m)]) @ a
                        found = client.held[b_name(module)] @ client.held[a_name(module)]
                        for private in (f"{module}.lora_{f}.private.weight" for f in "AB"):
                            assert torch.equal(client.held[private], held[private])
                    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
                    client.base, client.held, client.version = kept

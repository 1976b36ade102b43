"""Each rule against its own equation, written densely and naively in the test."""

from __future__ import annotations

import math

import pytest
import torch
from aggregator_simulation import (
    MIXED_RANKS,
    RANK,
    SHAPES,
    Federation,
    a_name,
    adapter,
    b_name,
    federation,
    normal,
    play_round,
    scaling_of,
    send,
    weights,
)
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from federated.methods import (
    Update,
    averaging,
    dual,
    fed_sb,
    fedavg,
    fedex,
    fedsa,
    fedsvd,
    ffa,
    flexlora,
    flora,
    hetlora,
    lora_fair,
    rolora,
)
from federated.methods.fedex import averaging_residual
from federated.methods.flora import stacked
from federated.methods.lowrank import truncate
from lora.adapters import FactorPair

COHORT = [0, 1, 3]
PAIRS = [FactorPair(module, a_name(module), b_name(module)) for module in SHAPES]


def product(state: dict[str, Tensor], module: str) -> Tensor:
    return state[b_name(module)] @ state[a_name(module)]


def mean(updates: list[Update], name: str) -> Tensor:
    return sum(w * u.state[name] for w, u in zip(weights(updates), updates, strict=True))


def ideal(updates: list[Update], module: str) -> Tensor:
    """sum_k w_k s_k B_k A_k"""
    return sum(
        w * u.scaling[module] * product(u.state, module)
        for w, u in zip(weights(updates), updates, strict=True)
    )


def dense_truncation(matrix: Tensor, rank: int) -> Tensor:
    u, singular_values, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * singular_values[:rank]) @ vt[:rank]


def global_product(fed: Federation, module: str) -> Tensor:
    return fed.server.scaling[module] * product(fed.server.state, module)


# ---- the ideal itself


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_stack_and_its_truncation_are_pefts_cat_and_svd_of_adapters(rank_stabilised):
    """peft's add_weighted_adapter, "cat" and "svd", with other ranks and scalings for each client.

    With rsLoRA peft 0.21.2 leaves the result a scaling of sqrt(its rank) instead of 1 (it sets alpha to the
    rank and keeps `use_rslora`); the test takes that factor out again.
    """
    module, (d_out, d_in) = "layer", SHAPES["tower.first"]
    network = nn.ModuleDict({module: nn.Linear(d_in, d_out, bias=False)}).double()
    ranks, shares = (4, 1, 2, 7), (0.1, 0.4, 0.2, 0.3)
    configs = [
        LoraConfig(r=r, lora_alpha=6, use_rslora=rank_stabilised, target_modules=["layer"], lora_dropout=0.0)
        for r in ranks
    ]
    tuner = LoraModel(network, {"client0": configs[0]}, "client0")
    for index, config in enumerate(configs[1:], start=1):
        tuner.peft_config[f"client{index}"] = config
        tuner.inject_adapter(tuner.model, f"client{index}")
    layer = network[module]
    updates = []
    for index, (rank, share) in enumerate(zip(ranks, shares, strict=True)):
        name = f"client{index}"
        a, b = normal(index, rank, d_in), normal(10 + index, d_out, rank)
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b
        state = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        updates.append(Update(index, round(100 * share), state, {module: layer.scaling[name]}))
    names = [f"client{index}" for index in range(len(ranks))]
    tuner.add_weighted_adapter(names, list(shares), "all", combination_type="cat")
    pair = FactorPair(module, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    assert layer.scaling["all"] == pytest.approx(math.sqrt(sum(ranks)) if rank_stabilised else 1.0)
    concatenated = layer.get_delta_weight("all").double() / layer.scaling["all"]
    torch.testing.assert_close(stacked(updates, pair).dense(), concatenated, rtol=1e-6, atol=1e-6)
    tuner.add_weighted_adapter(names, list(shares), "best", combination_type="svd", svd_rank=3)
    best = layer.get_delta_weight("best").double() / layer.scaling["best"]
    torch.testing.assert_close(truncate(stacked(updates, pair), 3).dense(), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [(RANK,) * 5, MIXED_RANKS])
def test_flora_merges_the_ideal_and_nothing_rescales_the_stack(ranks):
    """A scaling of alpha / (K r), taken anew on the stack, would be 87.5 % wrong with 8 clients."""
    fed = federation(flora(seed=3), ranks=ranks)
    updates = play_round(fed, COHORT)
    for module in SHAPES:
        torch.testing.assert_close(fed.server.base_delta[module].total(), ideal(updates, module))
        assert not fed.server.state[b_name(module)].any()


def test_flora_draws_a_new_kaiming_a_each_round_from_its_seed():
    draws = []
    for seed in (3, 3, 4):
        fed = federation(flora(seed=seed))
        for _ in range(2):
            play_round(fed, COHORT)
            draws.append(fed.server.state[a_name("tower.first")])
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[4])
    assert float(draws[0].abs().max()) <= 1 / math.sqrt(12)
    assert float(draws[0].std()) == pytest.approx(1 / math.sqrt(3 * 12), rel=0.2)


# ---- averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_is_that_of_each_tensor_alone_bit_for_bit(dtype, monkeypatch):
    """In client order, in float64, rounded once; however the tensors are laid end to end for it."""
    shapes = {"a": (3, 5), "b": (0,), "c": (), "d": (7, 2), "e": (4,), "f": (2, 3)}
    states = [
        {n: normal(9 * k + i, *shape, dtype=dtype) for i, (n, shape) in enumerate(shapes.items())}
        for k in range(4)
    ]
    for state in states:
        state["d"] = state["d"].T.contiguous().T  # values in another order in memory
    updates = [Update(k, n, state, {}) for k, (n, state) in enumerate(zip((3, 1, 7, 2), states, strict=True))]
    for most in (1_000_000, 20, 1):
        monkeypatch.setattr(averaging, "_MAX_GROUP_VALUES", most)
        found = averaging.average(updates)
        assert found.keys() == shapes.keys()
        for name in shapes:
            total = states[0][name].double() * (3 / 13)
            for n, state in zip((1, 7, 2), states[1:], strict=True):
                total = total + state[name].double() * (n / 13)
            assert torch.equal(found[name], total.to(dtype))
            assert found[name].is_contiguous()
            assert found[name].untyped_storage().nbytes() == found[name].nbytes
        assert averaging.average(updates, []) == {}


def test_fedavg_averages_both_factors_apart():
    fed = federation(fedavg())
    play_round(fed, COHORT)
    updates = play_round(fed, COHORT)
    for name in updates[0].state:
        torch.testing.assert_close(fed.server.state[name], mean(updates, name))


def test_the_residual_is_the_cross_covariance_of_the_factors():
    fed = federation(fedavg())
    play_round(fed, COHORT)
    updates = play_round(fed, COHORT)
    for pair in PAIRS:
        naive = sum(
            w * (u.state[pair.b] - mean(updates, pair.b)) @ (u.state[pair.a] - mean(updates, pair.a))
            for w, u in zip(weights(updates), updates, strict=True)
        )
        residual = averaging_residual(updates, fed.server.state, pair)
        assert residual.num_columns == (len(COHORT) - 1) * RANK
        torch.testing.assert_close(residual.dense(), naive)


def test_ffa_never_moves_a():
    fed = federation(ffa())
    first = {module: fed.server.state[a_name(module)] for module in SHAPES}
    for _ in range(3):
        updates = play_round(fed, COHORT)
        for module in SHAPES:
            assert torch.equal(fed.server.state[a_name(module)], first[module])
            torch.testing.assert_close(fed.server.state[b_name(module)], mean(updates, b_name(module)))


def test_rolora_trains_b_first_then_alternates():
    """In round 1 B is zero, so that an A round could not move anything."""
    fed = federation(rolora())
    for moving, resting in ((b_name, a_name), (a_name, b_name), (b_name, a_name)):
        before = dict(fed.server.state)
        play_round(fed, COHORT)
        for module in SHAPES:
            assert torch.equal(fed.server.state[resting(module)], before[resting(module)])
            assert not torch.equal(fed.server.state[moving(module)], before[moving(module)])


def test_fedsa_shares_a_and_leaves_every_b_where_it_was_trained():
    fed = federation(fedsa())
    updates = play_round(fed, COHORT)
    for module in SHAPES:
        torch.testing.assert_close(fed.server.state[a_name(module)], mean(updates, a_name(module)))
        assert not fed.server.state[b_name(module)].any()
    trained = {i: fed.clients[i].held[b_name("tower.first")].clone() for i in COHORT}
    assert not torch.equal(trained[0], trained[1])
    for client_id in COHORT:
        client = fed.clients[client_id]
        send(fed, client)
        assert torch.equal(client.held[b_name("tower.first")], trained[client_id])
        assert torch.equal(client.held[a_name("tower.first")], fed.server.state[a_name("tower.first")])


def test_dual_averages_the_shared_adapter_and_keeps_private_ones_apart():
    extra = {
        "tower.first.lora_A.private.weight": normal(1, 2, 12),
        "tower.first.lora_B.private.weight": torch.zeros(7, 2, dtype=torch.float64),
    }
    fed = federation(dual(), extra=extra)
    updates = play_round(fed, COHORT)
    for name in updates[0].state:
        torch.testing.assert_close(fed.server.state[name], mean(updates, name))
    private = [fed.clients[i].held["tower.first.lora_B.private.weight"] for i in COHORT]
    assert all(factor.any() for factor in private)
    assert not torch.equal(private[0], private[1])


# ---- corrected averages


@pytest.mark.parametrize("rank_cap", [0, 1, 3, 8, 100, None])
def test_fedex_merges_the_best_part_of_the_residual(rank_cap):
    fed = federation(fedex(rank_cap=rank_cap))
    for _ in range(2):
        before = {m: d.total() for m, d in fed.server.base_delta.items()}
        updates = play_round(fed, COHORT)
        for module in SHAPES:
            dense = ideal(updates, module) - global_product(fed, module)
            merged = dense if rank_cap is None else dense_truncation(dense, rank_cap)
            if rank_cap == 0:
                assert module not in fed.server.base_delta
                continue
            found = fed.server.base_delta[module].total() - before.get(module, 0)
            torch.testing.assert_close(found, merged, rtol=0, atol=1e-12)
            for name in (a_name(module), b_name(module)):
                torch.testing.assert_close(fed.server.state[name], mean(updates, name))


@pytest.mark.parametrize("regularisation", [0.0, 0.01, 1.0])
def test_lora_fair_solves_its_least_squares_problem(regularisation):
    """min over dB of ||R - dB A||^2 + lambda mean(diag(A A^T)) ||dB||^2, as one stacked dense lstsq."""
    fed = federation(lora_fair(regularisation=regularisation))
    play_round(fed, COHORT)
    updates = play_round(fed, COHORT)
    for module in SHAPES:
        a, b = mean(updates, a_name(module)), mean(updates, b_name(module))
        residual = ideal(updates, module) / fed.server.scaling[module] - b @ a
        ridge = math.sqrt(regularisation * float((a @ a.T).diagonal().mean()))
        left = torch.cat([a.T, ridge * torch.eye(RANK).double()])
        right = torch.cat([residual.T, torch.zeros(RANK, len(b)).double()])
        correction = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(fed.server.state[b_name(module)], b + correction)
        torch.testing.assert_close(fed.server.state[a_name(module)], a)


# ---- redistribution


def test_flexlora_with_one_rank_is_the_papers_truncated_svd():
    fed = federation(flexlora())
    for _ in range(3):
        updates = play_round(fed, COHORT)
        for module in SHAPES:
            torch.testing.assert_close(
                global_product(fed, module), dense_truncation(ideal(updates, module), RANK)
            )
            a = fed.server.state[a_name(module)]
            torch.testing.assert_close(a @ a.T, torch.eye(RANK).double())


@pytest.mark.parametrize("trained", [False, True], ids=["B = 0", "B != 0"])
@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
def test_flexlora_with_mixed_ranks_is_the_dense_delta_form(rank_stabilised, trained):
    """From any start: a trained adapter is in no particular basis."""
    fed = federation(flexlora(), ranks=MIXED_RANKS, rank_stabilised=rank_stabilised, trained=trained)
    for _ in range(3):
        before = {module: global_product(fed, module) for module in SHAPES}
        updates = play_round(fed, [0, 1, 2, 4])
        for module in SHAPES:
            dense = before[module] + ideal(updates, module)
            for w, update in zip(weights(updates), updates, strict=True):
                dense = dense - w * dense_truncation(before[module], MIXED_RANKS[update.client_id])
            torch.testing.assert_close(global_product(fed, module), dense_truncation(dense, RANK))


@pytest.mark.parametrize("client_id", range(5))
def test_flexlora_sends_the_best_adapter_of_a_clients_rank_from_a_trained_start(client_id):
    fed = federation(flexlora(), ranks=MIXED_RANKS, trained=True)
    client = fed.clients[client_id]
    send(fed, client)
    for module in SHAPES:
        wanted = fed.pretrained[module] + dense_truncation(global_product(fed, module), client.rank)
        torch.testing.assert_close(client.start[module], wanted)


def test_flexlora_keeps_an_untrained_start_bit_for_bit_and_a_trained_one_as_a_product():
    state = {**adapter(trained=True), b_name("tower.second"): torch.zeros(13, RANK).double()}
    server = flexlora().init(state, scaling_of(RANK))
    for module in SHAPES:
        torch.testing.assert_close(product(server.state, module), product(state, module))
    assert torch.equal(server.state[a_name("tower.second")], state[a_name("tower.second")])


def test_flexlora_is_exact_when_the_rank_holds_the_whole_sum():
    """Two clients of rank 2 under a server of rank 4."""
    fed = federation(flexlora(), ranks=(2, 2, 2, 2, 1))
    updates = play_round(fed, [0, 1])
    for module in SHAPES:
        torch.testing.assert_close(global_product(fed, module), ideal(updates, module))


def test_redistribution_survives_a_rank_above_the_width():
    """An adapter on a head of 3 classes with r = 5 has 3 components; the rest must stay trainable."""
    names = FactorPair("head", "head.lora_A.weight", "head.lora_B.weight")
    state = {names.a: normal(1, 5, 8), names.b: normal(2, 3, 5)}
    for rule in (flexlora(), fedsvd()):
        server = rule.init(state, {"head": 0.5})
        travelled = rule.uplink(state, 1)
        update = Update(0, 3, {n: state[n] for n in travelled}, {"head": 0.5})
        after = rule.apply(server, [update]).state
        assert after[names.a].shape == (5, 8)
        torch.testing.assert_close(after[names.b] @ after[names.a], state[names.b] @ state[names.a])
        assert (after[names.a].norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("period", [1, 2])
def test_fedsvd_averages_b_and_refactorises_every_period(period):
    fed = federation(fedsvd(period=period))
    for server_round in (1, 2, 3, 4):
        before = dict(fed.server.state)
        updates = play_round(fed, COHORT)
        for module in SHAPES:
            wanted = mean(updates, b_name(module)) @ before[a_name(module)]
            torch.testing.assert_close(product(fed.server.state, module), wanted)
            a = fed.server.state[a_name(module)]
            if server_round % period == 0:
                torch.testing.assert_close(a @ a.T, torch.eye(RANK).double())
            else:
                assert torch.equal(a, before[a_name(module)])


# ---- padding


@pytest.mark.parametrize("rank_stabilised", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("ranks", [(RANK,) * 5, MIXED_RANKS])
def test_hetlora_weighs_by_norm_and_pads_with_the_servers_components(ranks, rank_stabilised):
    fed = federation(hetlora(), ranks=ranks, rank_stabilised=rank_stabilised)
    play_round(fed, COHORT)
    before = fed.server.state
    updates = play_round(fed, [0, 1, 2, 4])
    for module in SHAPES:
        norms = [float((u.scaling[module] * product(u.state, module)).norm()) for u in updates]
        a = torch.zeros_like(before[a_name(module)])
        b = torch.zeros_like(before[b_name(module)])
        for norm, update in zip(norms, updates, strict=True):
            rank = ranks[update.client_id]
            ratio = update.scaling[module] / fed.server.scaling[module]
            padded_a, padded_b = before[a_name(module)].clone(), before[b_name(module)].clone()
            padded_a[:rank], padded_b[:, :rank] = (
                update.state[a_name(module)],
                update.state[b_name(module)] * ratio,
            )
            a, b = a + norm / sum(norms) * padded_a, b + norm / sum(norms) * padded_b
        torch.testing.assert_close(fed.server.state[a_name(module)], a)
        torch.testing.assert_close(fed.server.state[b_name(module)], b)


def test_hetlora_weighs_by_examples_while_nothing_is_learnt():
    fed = federation(hetlora())
    updates = play_round(fed, COHORT, steps=0)
    assert all(not u.state[b_name("tower.first")].any() for u in updates)
    assert all(tensor.isfinite().all() for tensor in fed.server.state.values())


# ---- cores


def test_fed_sb_averages_cores_between_frozen_bases():
    fed = federation(fed_sb(seed=1))
    first = dict(fed.server.state)
    for _ in range(3):
        updates = play_round(fed, COHORT)
        for module in SHAPES:
            core = f"{module}.lora_R.weight"
            assert {n for n in updates[0].state if n.startswith(module)} == {core}
            assert updates[0].state[core].shape == (RANK, RANK)
            torch.testing.assert_close(fed.server.state[core], mean(updates, core))
            for basis in (a_name(module), b_name(module)):
                assert torch.equal(fed.server.state[basis], first[basis])
            q, p = first[b_name(module)], first[a_name(module)]
            torch.testing.assert_close(q.T @ q, torch.eye(RANK).double())
            torch.testing.assert_close(p @ p.T, torch.eye(RANK).double())

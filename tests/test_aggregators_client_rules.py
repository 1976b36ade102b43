"""The client's side of a method: HetLoRA's penalty and pruning, Fed-SB's bases, freshly drawn factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aggregator_simulation import SHAPES, a_name, adapter, b_name, federation, normal, play_round, scaling_of
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from federated.communication.codec import codec_from_name
from federated.methods import (
    Downlink,
    FreshDraw,
    InBasis,
    LocalStart,
    cut_to_rank,
    fed_sb,
    fedavg,
    fresh_factors,
    hetlora,
    receive,
    spectral_start,
)
from federated.methods.fed_sb import core_name
from federated.methods.hetlora import tail_penalty
from lora.adapters import factor_pairs
from models.errors import UserError
from models.state import layout_of


def test_other_rules_ask_nothing_of_the_client():
    client = fedavg().client
    state = adapter()
    assert client.to_model(state) is state
    assert client.to_wire(state, {}) is state
    assert client.bases(state) == {}
    assert client.terms == ()
    assert client.next_rank(state, state, 4) == 4


# ---- HetLoRA


def test_the_tail_penalty_is_the_product_of_the_tails_norms():
    state = adapter(rank=4, trained=True)
    naive = sum(
        state[b_name(m)][:, 2:].square().sum().sqrt() * state[a_name(m)][2:].square().sum().sqrt()
        for m in SHAPES
    )
    torch.testing.assert_close(tail_penalty(state, gamma=0.5), naive)
    (term,) = hetlora(gamma=0.5, penalty_weight=0.1).client.terms
    torch.testing.assert_close(term(LocalStart(state)).value(), 0.1 * naive)


@pytest.mark.parametrize("trained", [False, True])
def test_the_tail_penalty_has_a_finite_gradient_also_at_zero(trained):
    live = {name: tensor.requires_grad_() for name, tensor in adapter(trained=trained).items()}
    tail_penalty(live, gamma=0.5).backward()
    for module in SHAPES:
        for name in (a_name(module), b_name(module)):
            assert live[name].grad is not None
            assert live[name].grad.isfinite().all()
        assert not live[a_name(module)].grad[:2].any()


def test_descending_the_penalty_shrinks_the_tail_until_the_rank_is_pruned():
    rule = hetlora(gamma=0.75, penalty_weight=0.1, min_rank=2)
    (term,) = rule.client.terms
    before = adapter(rank=4, trained=True)
    live = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    optimizer = torch.optim.SGD(live.values(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        term(LocalStart(live)).value().backward()
        optimizer.step()
    trained = {name: tensor.detach() for name, tensor in live.items()}
    assert rule.client.next_rank(before, trained, 4) == 3
    assert rule.client.next_rank(trained, before, 4) == 4
    assert rule.client.next_rank(before, before, 4) == 4
    assert rule.client.next_rank(before, trained, 2) == 2


def test_a_pruned_client_sends_fewer_components_and_the_servers_stay():
    fed = federation(hetlora(), ranks=(4, 3, 4, 4, 4), trained=True)
    before = fed.server.state
    state = cut_to_rank(before, 3)
    assert {state[a_name(m)].shape[0] for m in SHAPES} == {3}
    assert {state[b_name(m)].shape[1] for m in SHAPES} == {3}
    play_round(fed, [1], steps=3)
    for module in SHAPES:
        torch.testing.assert_close(fed.server.state[a_name(module)][3], before[a_name(module)][3])


# ---- Fed-SB


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_parametrised_b_trains_exactly_as_its_core(optimizer):
    """Adam's moments are then those of R; projecting B after each step would not give this."""
    basis = torch.linalg.qr(normal(1, 9, 3)).Q
    start, inputs, target = normal(2, 3, 3), normal(3, 20, 3), normal(4, 20, 9)
    layer = nn.Linear(3, 9, bias=False).double()
    layer.weight.data = basis @ start
    register_parametrization(layer, "weight", InBasis(basis))
    core = start.clone().requires_grad_()
    (parameter,) = layer.parameters()
    assert parameter.shape == (3, 3)
    one, other = optimizer([parameter], lr=0.05), optimizer([core], lr=0.05)
    for _ in range(10):
        for step, loss in (
            (one, (layer(inputs) - target).square().mean()),
            (other, (inputs @ (basis @ core).T - target).square().mean()),
        ):
            step.zero_grad()
            loss.backward()
            step.step()
    torch.testing.assert_close(parameter.detach(), core.detach())
    remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight.detach(), basis @ core.detach())
    torch.testing.assert_close(basis.T @ layer.weight.detach(), core.detach())


@pytest.mark.parametrize("trained", [False, True])
def test_fed_sb_starts_from_the_given_adapter(trained):
    state = adapter(trained=trained)
    rule = fed_sb(seed=5)
    model = rule.client.to_model(rule.init(state, scaling_of(4)).state)
    assert model.keys() == state.keys()
    for module in SHAPES:
        torch.testing.assert_close(
            model[b_name(module)] @ model[a_name(module)], state[b_name(module)] @ state[a_name(module)]
        )


def test_fed_sb_goes_from_wire_to_model_and_back():
    rule = fed_sb()
    held = rule.init(adapter(trained=True), scaling_of(4)).state
    back = rule.client.to_wire(rule.client.to_model(held), held)
    assert back.keys() == held.keys()
    for name in held:
        torch.testing.assert_close(back[name], held[name])
    assert rule.client.bases(held).keys() == {b_name(module) for module in SHAPES}


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_bases_that_a_lossy_downlink_has_rounded_move_no_core_without_training(codec):
    """Q^T Q is then not quite I, and a core read back as Q^T B would shrink or grow in each round."""
    rule, downlink = fed_sb(seed=2), codec_from_name(codec)
    held = rule.init(adapter(trained=True, dtype=torch.float32), scaling_of(4)).state
    held = downlink.decode(downlink.encode(held, np.random.default_rng(0)), layout_of(held))
    model = rule.client.to_model(held)
    back = rule.client.to_wire(model, held)
    for name in held:
        torch.testing.assert_close(back[name], held[name])
    for name, basis in rule.client.bases(held).items():
        layer = nn.Linear(*reversed(model[name].shape), bias=False)
        layer.weight.data = model[name].clone()
        register_parametrization(layer, "weight", InBasis(basis))
        torch.testing.assert_close(layer.weight.detach(), model[name])


def test_a_spectral_start_is_the_best_low_rank_part_of_the_estimate():
    estimate = {module: normal(i, *shape) for i, (module, shape) in enumerate(SHAPES.items())}
    scaling = scaling_of(4)
    rule = fed_sb()
    model = rule.client.to_model(rule.init(spectral_start(adapter(), estimate, scaling), scaling).state)
    for module, matrix in estimate.items():
        u, singular_values, vt = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :4] * singular_values[:4]) @ vt[:4]
        torch.testing.assert_close(scaling[module] * model[b_name(module)] @ model[a_name(module)], best)
    with pytest.raises(UserError, match=r"no estimate for tower\.second"):
        spectral_start(adapter(), {"tower.first": estimate["tower.first"]}, scaling)


def test_fed_sb_refuses_a_rank_above_the_width():
    with pytest.raises(UserError, match=r"rank 7 on tower\.second is above its width 6"):
        fed_sb().init(adapter(rank=7), scaling_of(7))
    estimate = {module: normal(1, *shape) for module, shape in SHAPES.items()}
    with pytest.raises(UserError, match="above its width"):
        spectral_start(adapter(rank=7), estimate, scaling_of(7))


def test_core_names_stand_beside_their_factors():
    (first, _) = factor_pairs(adapter())
    assert core_name(first) == "tower.first.lora_R.weight"


# ---- drawn on both sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_client_of_low_rank_draws_the_first_rows_of_what_the_server_draws(dtype):
    whole = fresh_factors(adapter(rank=4, dtype=dtype), FreshDraw(7, 3))
    for rank in (1, 2, 3):
        part = fresh_factors(adapter(rank=rank, dtype=dtype), FreshDraw(7, 3))
        for module in SHAPES:
            assert torch.equal(part[a_name(module)], whole[a_name(module)][:rank])
            assert part[b_name(module)].shape[1] == rank
            assert not part[b_name(module)].any()


def test_draws_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    fresh_factors(adapter(), FreshDraw(0, 0))
    fed_sb(seed=1).init(adapter(), scaling_of(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_factors_replace_only_factors():
    held = adapter(trained=True)
    received = receive(Downlink({}, 2, {}, FreshDraw(0, 2)), held)
    assert received.keys() == held.keys()
    assert torch.equal(received["head.bias"], held["head.bias"])
    assert not any(torch.equal(received[name], held[name]) for name in held if name != "head.bias")

"""Server optimizers against Flower's own strategies, and where they may not be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aggregator_simulation import SHAPES, Federation, a_name, b_name, federation, play_round, send, train
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from federated.methods import (
    AGGREGATORS,
    Update,
    aggregator_from_name,
    fedavg,
    load_server,
    rolora,
    save_server,
)
from federated.methods.server_optimizers import (
    SERVER_OPTIMIZERS,
    fedadagrad,
    fedadam,
    fedavgm,
    fedyogi,
    server_optimizer_from_name,
    with_server_optimizer,
)
from models.errors import UserError

FLOWERS = {
    "fedavgm": (
        fedavgm(learning_rate=0.7, momentum=0.9),
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    ),
    "fedadam": (
        fedadam(eta=3e-3, beta_1=0.9, beta_2=0.99, tau=1e-4),
        lambda: flower.FedAdam(eta=3e-3, beta_1=0.9, beta_2=0.99, tau=1e-4),
    ),
    "fedyogi": (
        fedyogi(eta=2e-3, beta_1=0.8, beta_2=0.95, tau=1e-5),
        lambda: flower.FedYogi(eta=2e-3, beta_1=0.8, beta_2=0.95, tau=1e-5),
    ),
    "fedadagrad": (fedadagrad(eta=1e-3, tau=1e-6), lambda: flower.FedAdagrad(eta=1e-3, tau=1e-6)),
}


def flower_reply(update: Update) -> Message:
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in update.state.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": update.num_examples})})
    return Message(content, dst_node_id=1, message_type="train")


@pytest.fixture
def _flower_task(monkeypatch):
    """Flower's messages want to know which run they belong to."""
    for attribute in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, attribute, 1, raising=False)


@pytest.mark.usefixtures("_flower_task")
@pytest.mark.parametrize("name", FLOWERS)
def test_the_steps_are_flowers_own(name):
    optimizer, make = FLOWERS[name]
    fed = federation(with_server_optimizer(fedavg(), optimizer))
    oracle = make()
    for server_round in (1, 2, 3, 4):
        state = fed.server.state
        if name == "fedavgm":
            oracle.current_arrays = ArrayRecord({n: Array(t.numpy()) for n, t in state.items()})
        else:
            oracle.current_arrays = {n: t.numpy() for n, t in state.items()}
        updates = play_round(fed, [0, 1, 3])
        arrays, _ = oracle.aggregate_train(server_round, [flower_reply(update) for update in updates])
        assert arrays is not None
        for key, tensor in fed.server.state.items():
            np.testing.assert_allclose(tensor.numpy(), arrays[key].numpy(), rtol=1e-9, atol=1e-12)
            assert not torch.equal(tensor, state[key])


def test_fedavgm_without_momentum_is_fedavg():
    plain, stepped = federation(fedavg()), federation(with_server_optimizer(fedavg(), fedavgm(momentum=0.0)))
    for fed in (plain, stepped):
        play_round(fed, [0, 1])
        play_round(fed, [1, 2])
    for name, tensor in plain.server.state.items():
        torch.testing.assert_close(stepped.server.state[name], tensor)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_float32_stays_float32_and_no_training_means_no_step(name):
    rule = with_server_optimizer(fedavg(), server_optimizer_from_name(name, {}))
    fed = federation(rule, dtype=torch.float32, trained=True)
    before = dict(fed.server.state)
    play_round(fed, [0, 1, 2], steps=0)
    for key, tensor in fed.server.state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_the_default_step_suits_adapters(name):
    """Flower's defaults turn a change of 1e-3 into one of about 7e-3 in round 1."""
    optimizer = server_optimizer_from_name(name, {})
    rule = with_server_optimizer(fedavg(), optimizer)
    server = rule.init({"x": torch.zeros(3)}, {})
    stepped = rule.apply(server, [Update(0, 1, {"x": torch.full((3,), 1e-3)}, {})])
    assert 1e-4 < float(stepped.state["x"][0]) < 2e-3


def test_a_factor_that_rests_keeps_its_moments():
    fed = federation(with_server_optimizer(rolora(), fedadam()))
    play_round(fed, [0, 1])
    assert fed.server.memory.keys() == {
        f"{kind}/{name}"
        for kind in ("first", "second", "steps")
        for name in ("head.bias", *(b_name(module) for module in SHAPES))
    }
    resting = {n: t.clone() for n, t in fed.server.memory.items() if "lora_B" in n}
    play_round(fed, [0, 1])
    assert all(torch.equal(fed.server.memory[name], tensor) for name, tensor in resting.items())
    assert int(fed.server.memory[f"steps/{a_name('tower.first')}"]) == 1
    assert int(fed.server.memory["steps/head.bias"]) == 2


def rounds(fed: Federation) -> list[Update]:
    for client in fed.clients:
        send(fed, client)
    return [train(fed, client, 2) for client in fed.clients]


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "fedsa", "fed_sb", "dual"])
def test_rules_with_a_fixed_basis_take_an_optimizer_bit_for_bit_resumable(name):
    fed = federation(with_server_optimizer(aggregator_from_name(name, {}), fedadam()))
    assert fed.aggregator.name == f"{name}+fedadam"
    assert not fed.aggregator.exact
    play_round(fed, [0, 1, 2])
    updates = rounds(fed)
    one = fed.aggregator.apply(fed.server, updates)
    other = fed.aggregator.apply(load_server(*save_server(fed.server)), updates[::-1])
    first, second = save_server(one)[0], save_server(other)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [n for n in AGGREGATORS if not aggregator_from_name(n, {}).keeps_basis])
def test_rules_that_change_their_basis_refuse_an_optimizer(name):
    assert name in {"flora", "fedex", "flexlora", "hetlora", "lora_fair", "fedsvd"}
    with pytest.raises(UserError, match=f"{name} changes the basis"):
        with_server_optimizer(aggregator_from_name(name, {}), fedadam())


def test_bad_options_are_named():
    with pytest.raises(UserError, match="did you mean 'fedadam'"):
        server_optimizer_from_name("fedadamm", {})
    with pytest.raises(UserError, match="has no option 'lr'"):
        server_optimizer_from_name("fedadam", {"lr": 1})
    for name, option, value in (
        ("fedadam", "eta", 0),
        ("fedyogi", "tau", -1e-3),
        ("fedadam", "beta_1", 1),
        ("fedavgm", "momentum", 1.5),
    ):
        with pytest.raises(UserError, match=f"{name}: {option}"):
            server_optimizer_from_name(name, {option: value})

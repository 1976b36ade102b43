"""models.training: schedule, micro-batches, and the optimizer that is reset instead of rebuilt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError
from models.training import LocalTrainer, TrainingSettings, learning_rate_at, micro_batches, num_examples


def _net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _data(size: int = 10, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 5, generator=generator), "labels": torch.arange(size) % 3}


def _loss(net: nn.Module):
    return lambda batch: F.cross_entropy(net(batch["x"]), batch["labels"])


def _run(trainer: LocalTrainer, net: nn.Module, steps: int, seed: int = 1) -> list[float]:
    return [trainer.step(_loss(net), _data(seed=seed + i)) for i in range(steps)]


def _values(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_reset_optimizer_equals_a_fresh_one_bitwise(optimizer: str, weight_decay: float) -> None:
    settings = TrainingSettings(
        optimizer=optimizer, weight_decay=weight_decay, warmup_steps=2, schedule="cosine"
    )
    used_net, fresh_net = _net(), _net()
    used = LocalTrainer(list(used_net.parameters()), settings)
    used.reset(settings, 4)
    _run(used, used_net, 4)
    used_net.load_state_dict(fresh_net.state_dict())
    used.reset(settings, 4)
    fresh = LocalTrainer(list(fresh_net.parameters()), settings)
    fresh.reset(settings, 4)
    assert _run(used, used_net, 4) == _run(fresh, fresh_net, 4)
    assert torch.equal(_values(used_net), _values(fresh_net))


def test_a_reset_forgets_even_moments_that_became_infinite() -> None:
    net = _net()
    settings = TrainingSettings()
    trainer = LocalTrainer(list(net.parameters()), settings)
    trainer.reset(settings, 1)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    trainer.step(lambda batch: _loss(net)(batch) * math.inf, _data())
    net.load_state_dict(start)
    trainer.reset(settings, 1)
    trainer.step(_loss(net), _data())
    assert torch.isfinite(_values(net)).all()


def test_a_reset_keeps_the_optimizer_object_and_its_memory() -> None:
    net = _net()
    settings = TrainingSettings()
    trainer = LocalTrainer(list(net.parameters()), settings)
    trainer.reset(settings, 1)
    _run(trainer, net, 1)
    before = [v.data_ptr() for s in trainer.optimizer.state.values() for v in s.values()]
    trainer.reset(settings, 1)
    assert [v.data_ptr() for s in trainer.optimizer.state.values() for v in s.values()] == before


def test_adamw_equals_torchs_own_step_by_step() -> None:
    ours, theirs = _net(), _net()
    settings = TrainingSettings(learning_rate=0.01, weight_decay=0.1)
    trainer = LocalTrainer(list(ours.parameters()), settings)
    trainer.reset(settings, 3)
    oracle = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        foreach=False,
    )
    for step in range(3):
        trainer.step(_loss(ours), _data(seed=step))
        oracle.zero_grad()
        _loss(theirs)(_data(seed=step)).backward()
        oracle.step()
    torch.testing.assert_close(_values(ours), _values(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 10, 64])
def test_micro_batches_take_the_same_step_as_the_whole_batch(size: int) -> None:
    whole_net, cut_net = _net().double(), _net().double()
    losses = []
    for net, micro in ((whole_net, None), (cut_net, size)):
        settings = TrainingSettings(optimizer="sgd", learning_rate=0.1, micro_batch_size=micro, clip_norm=0.2)
        trainer = LocalTrainer(list(net.parameters()), settings)
        trainer.reset(settings, 2)
        data = _data()
        data["x"] = data["x"].double()
        losses.append([trainer.step(_loss(net), data) for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    torch.testing.assert_close(_values(cut_net), _values(whole_net), rtol=1e-10, atol=1e-12)


def test_shares_of_micro_batches_sum_to_one_and_cover_each_example_once() -> None:
    parts = list(micro_batches(_data(10), 4))
    assert [num_examples(part) for part, _ in parts] == [4, 4, 2]
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), _data(10)["x"])


def test_gradients_are_clipped_to_the_norm() -> None:
    net = _net()
    start = _values(net).clone()
    settings = TrainingSettings(optimizer="sgd", learning_rate=1.0, clip_norm=0.01)
    trainer = LocalTrainer(list(net.parameters()), settings)
    trainer.reset(settings, 1)
    trainer.step(_loss(net), _data())
    assert float((_values(net) - start).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_an_extra_loss_adds_its_gradient_once_a_step_and_is_not_reported(
    micro_batch_size: int | None,
) -> None:
    pulled, oracle = _net().double(), _net().double()
    anchor = torch.ones(1, dtype=torch.float64)
    settings = TrainingSettings(optimizer="sgd", learning_rate=0.1, micro_batch_size=micro_batch_size)
    trainer = LocalTrainer(list(pulled.parameters()), settings)
    trainer.reset(
        settings, 1, extra_loss=lambda: sum((p - anchor).square().sum() for p in pulled.parameters())
    )
    data = {**_data(), "x": _data()["x"].double()}
    plain = _loss(oracle)(data)
    (plain + sum((p - anchor).square().sum() for p in oracle.parameters())).backward()
    assert trainer.step(_loss(pulled), data) == pytest.approx(plain.item())
    for ours, theirs in zip(pulled.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach() - 0.1 * theirs.grad)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 12])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rates_are_those_of_the_stated_formula(schedule: str, warmup_steps: int, num_steps: int) -> None:
    """Warm-up up to the peak, then from the peak to the schedule's end in the last step of all."""
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=warmup_steps, schedule=schedule)
    rates = [learning_rate_at(settings, step, num_steps) for step in range(num_steps)]
    rising = [2.0 * (step + 1) / warmup_steps for step in range(warmup_steps)]
    left = max(0, num_steps - warmup_steps)
    falling = [2.0] * left
    if schedule == "cosine" and left > 1:
        falling = [1.0 + math.cos(angle) for angle in torch.linspace(0, math.pi, left).double().tolist()]
    assert rates == pytest.approx((rising + falling)[:num_steps], abs=1e-6)


def test_the_cosine_is_zero_in_the_last_step_and_stays_there() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate_at(settings, step, 13) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way through the cosine
    assert rates[11] > rates[12] == rates[13] == rates[14] == 0.0


def test_a_constant_schedule_stays_after_warm_up() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=2)
    assert [learning_rate_at(settings, step, 3) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_bf16_trains_and_keeps_float32_weights() -> None:
    net = _net()
    settings = TrainingSettings(precision="bf16", learning_rate=0.01)
    trainer = LocalTrainer(list(net.parameters()), settings)
    trainer.reset(settings, 30)
    data = _data()
    losses = [trainer.step(_loss(net), data) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fp16_trains_with_loss_scaling_and_starts_each_client_afresh() -> None:
    settings = TrainingSettings(precision="fp16", learning_rate=0.01, clip_norm=1.0)
    net = _net().cuda()
    data = {key: value.cuda() for key, value in _data().items()}
    trainer = LocalTrainer(list(net.parameters()), settings)
    runs = []
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(2):
        net.load_state_dict(start)
        trainer.reset(settings, 30)
        runs.append([trainer.step(_loss(net), data) for _ in range(30)])
    assert runs[0][-1] < runs[0][0]
    assert runs[0] == runs[1]


def test_fp16_on_the_cpu_is_refused_with_the_remedy() -> None:
    settings = TrainingSettings(precision="fp16")
    with pytest.raises(UserError, match="bf16"):
        LocalTrainer(list(_net().parameters()), settings).reset(settings, 1)


def test_an_optimizer_serves_other_rates_but_not_other_parameters_or_kinds() -> None:
    net = _net()
    parameters = list(net.parameters())
    trainer = LocalTrainer(parameters, TrainingSettings())
    assert trainer.fits(parameters, TrainingSettings(learning_rate=0.5, schedule="cosine"))
    assert not trainer.fits(parameters[:-1], TrainingSettings())
    assert not trainer.fits(parameters, TrainingSettings(optimizer="sgd"))
    assert not trainer.fits(parameters, TrainingSettings(weight_decay=0.1))
    assert not trainer.fits(parameters, TrainingSettings(momentum=0.0))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_is_its_textbook_recursion(momentum: float, weight_decay: float) -> None:
    """v <- m v + g + decay p (matrices alone), p <- p - rate v; with m = 0 plain SGD."""
    settings = TrainingSettings(
        optimizer="sgd", learning_rate=0.1, momentum=momentum, weight_decay=weight_decay
    )
    net, oracle = _net(), _net()
    trainer = LocalTrainer(list(net.parameters()), settings)
    velocity = {name: torch.zeros_like(p) for name, p in oracle.named_parameters()}
    for client in range(2):  # the second starts afresh
        trainer.reset(settings, 3)
        velocity = {name: torch.zeros_like(v) for name, v in velocity.items()}
        _run(trainer, net, 3, seed=client)
        for step in range(3):
            oracle.zero_grad()
            _loss(oracle)(_data(seed=client + step)).backward()
            for name, p in oracle.named_parameters():
                decay = weight_decay * p.detach() if p.ndim > 1 else 0.0
                velocity[name] = momentum * velocity[name] + p.grad + decay
                p.data -= 0.1 * velocity[name]
        torch.testing.assert_close(_values(net), _values(oracle))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("clip_norm", 0.0),
        ("micro_batch_size", 0),
        ("optimizer", "adam"),
        ("schedule", "linear"),
        ("precision", "int8"),
    ],
)
def test_a_bad_setting_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        TrainingSettings(**{key: value})


def test_a_batch_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(UserError, match="'labels': 2"):
        num_examples({"x": torch.zeros(3), "labels": torch.zeros(2)})


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UserError, match="one or more examples"):
        num_examples({"x": torch.zeros(0, 5)})

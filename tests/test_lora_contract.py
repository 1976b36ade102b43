"""What holds for every choice of backend, towers, bias and rank, and for models that answer questions."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from lora.adapter_saving import save_lora_adapters
from lora.adapters import (
    get_lora_state_dict,
    is_adapter_parameter,
    set_lora_state_dict,
)
from lora.biases import is_bias
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_lora_adapters
from lora.switching import (
    disable_lora,
    enable_lora,
    merge_and_unload,
    merge_lora,
    unmerge_lora,
)
from lora.verify import check_lora_injection, verify_gradients
from tests.lora_models import INSTALLED_BACKENDS, VQA, disturb, features, outputs, small_clip

TOLERANCE = 1e-5


@dataclass
class Case:
    """A model with fresh adapters, and what it gave before it had any."""

    backend: str
    config: LoRAConfig
    model: nn.Module
    base: torch.Tensor
    start: dict[str, torch.Tensor]

    @property
    def other_model(self) -> nn.Module:
        return small_clip(self.backend)


@functools.cache
def fresh(backend: str, component: str, bias: str, rank: int) -> Case:
    config = LoRAConfig(r=rank, lora_alpha=3, lora_dropout=0.3, bias=bias, target_components=[component])
    model = small_clip(backend)
    base = outputs(model)
    inject_lora(model, config)
    return Case(backend, config, model, base, copy.deepcopy(model.state_dict()))


@pytest.fixture
def case(backend: str, component: str, bias: str, rank: int) -> Case:
    """A case as it was right after injection; building one anew for every test would take minutes."""
    case = fresh(backend, component, bias, rank)
    unmerge_lora(case.model)
    enable_lora(case.model)
    case.model.load_state_dict(case.start)
    case.model.eval().zero_grad(set_to_none=True)
    return case


CASES = [
    pytest.param(backend, component, bias, rank, id=f"{backend}-{component}-{bias}-r{rank}")
    for backend in (*INSTALLED_BACKENDS, VQA)
    for component in ("encoder", "vision", "text")
    for bias, rank in (("none", 1), ("none", 5), ("lora_only", 5), ("all", 5))
]
pytestmark = pytest.mark.parametrize(("backend", "component", "bias", "rank"), CASES)


def test_fresh_adapters_change_nothing(case: Case) -> None:
    assert torch.equal(outputs(case.model), case.base)
    merge_lora(case.model)
    assert torch.equal(outputs(case.model), case.base)


def test_disabled_is_the_base_model_bit_for_bit_and_enabled_the_adapted_one(case: Case) -> None:
    disturb(case.model)
    adapted = outputs(case.model)
    assert not torch.allclose(adapted, case.base, atol=1e-3)
    trains = [p.requires_grad for p in case.model.parameters()]
    disable_lora(case.model)
    assert torch.equal(outputs(case.model), case.base)
    enable_lora(case.model)
    assert torch.equal(outputs(case.model), adapted)
    assert [p.requires_grad for p in case.model.parameters()] == trains


def test_merging_keeps_the_outputs_and_unmerging_restores_the_weights(case: Case) -> None:
    disturb(case.model)
    adapted = outputs(case.model)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    merge_lora(case.model)
    torch.testing.assert_close(outputs(case.model), adapted, rtol=0, atol=TOLERANCE)
    unmerge_lora(case.model)
    torch.testing.assert_close(outputs(case.model), adapted, rtol=0, atol=TOLERANCE)
    for name, p in case.model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=0, atol=TOLERANCE)


def test_unloading_leaves_a_plain_model_with_the_same_outputs(case: Case) -> None:
    disturb(case.model)
    adapted = outputs(case.model)
    merged = merge_and_unload(copy.deepcopy(case.model))
    plain = case.other_model
    assert [(n, type(m)) for n, m in merged.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert list(merged.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(outputs(plain), adapted, rtol=0, atol=TOLERANCE)


def test_only_adapters_and_chosen_biases_get_gradients(case: Case) -> None:
    disturb(case.model)
    features(case.model).square().sum().backward()
    report = verify_gradients(case.model)
    assert report, str(report)
    assert not report.all_zero
    allowed = [n for n, p in case.model.named_parameters() if p.grad is not None]
    assert all(is_adapter_parameter(n) or (case.config.bias != "none" and is_bias(n)) for n in allowed)


def test_training_moves_adapters_and_leaves_the_base_bitwise_alone(case: Case) -> None:
    frozen = {n: p.detach().clone() for n, p in case.model.named_parameters() if not p.requires_grad}
    start = get_lora_state_dict(case.model)
    optimizer = torch.optim.AdamW([p for p in case.model.parameters() if p.requires_grad], lr=1e-2)
    case.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        features(case.model).square().sum().backward()
        optimizer.step()
    case.model.eval()
    assert all(torch.equal(frozen[n], p) for n, p in case.model.named_parameters() if n in frozen)
    assert all(not torch.equal(start[n], t) for n, t in get_lora_state_dict(case.model).items())
    disable_lora(case.model)
    assert torch.equal(outputs(case.model), case.base)


def test_state_goes_into_another_model(case: Case) -> None:
    disturb(case.model)
    other = case.other_model
    inject_lora(other, case.config.model_copy(update={"bias": "none"}), seed=5)
    state = get_lora_state_dict(case.model)
    set_lora_state_dict(other, state)
    assert list(state) == sorted(state)
    assert all(torch.equal(state[n], t) for n, t in get_lora_state_dict(other).items())
    if case.config.bias == "none":
        assert torch.equal(outputs(other), outputs(case.model))


def test_saved_files_give_the_same_model_again(case: Case, tmp_path: Path) -> None:
    disturb(case.model)
    save_lora_adapters(case.model, tmp_path / "adapter")
    other = case.other_model
    load_lora_adapters(other, tmp_path / "adapter")
    assert torch.equal(outputs(other), outputs(case.model))
    disable_lora(other)
    assert torch.equal(outputs(other), case.base)


def test_every_asked_for_block_is_reported_as_adapted(case: Case) -> None:
    report = check_lora_injection(case.model)
    assert report
    assert {b.tower for b in report.blocks if b.ranks} == set(case.config.tower_names)
    assert all(rank == case.config.r for b in report.blocks for rank in b.ranks.values())

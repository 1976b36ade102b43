"""Injection and the functions of lora.adapters beyond the contract."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import CLIPModel

from lora import adapters, switching
from lora.config import LoRAConfig, TowerOverride
from lora.gradient_checkpointing import (
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    is_gradient_checkpointing,
)
from lora.injection import apply_lora_to_text_encoder, inject_lora
from lora.verify import check_lora_injection, verify_gradients
from models.errors import UserError
from tests.lora_models import BACKENDS, NUM_BLOCKS, disturb, features, outputs, small_clip, small_config


def test_wire_names_pair_up_and_carry_no_adapter_name() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    names = [adapters.wire_name(n) for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(names) == list(adapters.get_lora_state_dict(model))
    pairs = adapters.factor_pairs([*names, "head.weight", "logit_scale"])
    assert "vision_model.encoder.layers.0.self_attn.q_proj" in [pair.module for pair in pairs]
    assert len(pairs) * 2 == len(names)
    assert {pair.module for pair in pairs} == set(adapters.scalings(model))
    with pytest.raises(UserError, match="one factor only"):
        adapters.factor_pairs(names[1:])


def test_towers_can_differ_in_rank_alpha_dropout_and_layers() -> None:
    model = small_clip()
    config = LoRAConfig(
        r=2,
        lora_alpha=6,
        lora_dropout=0.0,
        vision=TowerOverride(r=4, lora_alpha=2, lora_dropout=0.5, layers=[1]),
        text=TowerOverride(layers=[0]),
    )
    inject_lora(model, config)
    layers = dict(adapters.adapter_layers(model))
    assert {n.rsplit(".", 2)[0] for n in layers} == {
        "vision_model.encoder.layers.1",
        "text_model.encoder.layers.0",
    }
    for name, layer in layers.items():
        rank, scaling, dropout = (4, 0.5, 0.5) if name.startswith("vision") else (2, 3.0, 0.0)
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == scaling
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == dropout


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    model = small_clip()
    config = LoRAConfig(r=4, lora_alpha=6, use_rslora=True)
    inject_lora(model, config)
    assert set(adapters.scalings(model).values()) == {6 / math.sqrt(4)} == {config.scaling}


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_seeds_give_equal_factors_and_the_global_generator_is_not_used(backend: str) -> None:
    states = []
    for seed in (3, 3, 4):
        model = small_clip(backend)
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        inject_lora(model, LoRAConfig(r=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(adapters.get_lora_state_dict(model))
    first, second, third = states
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(not torch.equal(first[n], third[n]) for n in first if adapters.factor_of(n) == "lora_A")
    for name, tensor in first.items():
        if adapters.factor_of(name) == "lora_B":
            assert not tensor.any()
        else:  # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(d_in)
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.8 * bound < tensor.abs().max() <= bound


def test_unknown_targets_are_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"query.*vision tower.*'fc1'.*'q_proj'"):
        inject_lora(small_clip(), LoRAConfig(target_modules=["query"]))
    with pytest.raises(UserError, match="query"):
        inject_lora(small_clip(), LoRAConfig(target_modules=["q_proj", "query"]))
    for layers in ([NUM_BLOCKS], [0, NUM_BLOCKS]):  # one wrong index among right ones is an error too
        with pytest.raises(UserError, match=rf"layers \[{NUM_BLOCKS}\].*{NUM_BLOCKS} layers"):
            inject_lora(small_clip(), LoRAConfig(layers=layers))
    model = small_clip()
    inject_lora(model, LoRAConfig())
    with pytest.raises(UserError, match="already"):
        inject_lora(model, LoRAConfig())
    with pytest.raises(UserError, match="head"):
        inject_lora(small_clip(), LoRAConfig(target_components=["classifier"]))


def test_projections_can_be_targets_and_suffixes_do_not_leak_into_the_other_tower() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(target_modules=["visual_projection"], target_components=["vision"], r=2))
    assert list(adapters.scalings(model)) == ["visual_projection"]
    fused = small_clip("fused")
    inject_lora(fused, LoRAConfig(target_modules=["c_fc"], target_components=["text"], r=2))
    assert all(name.startswith("transformer.resblocks.") for name in adapters.scalings(fused))


def test_a_frozen_factor_stays_frozen_through_every_switch() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    adapters.set_trainable_factors(model, {"lora_B"})

    def trains() -> set[str | None]:
        return {adapters.factor_of(n) for n, p in model.named_parameters() if p.requires_grad}

    assert trains() == {"lora_B"}
    switching.disable_lora(model)
    switching.enable_lora(model)
    switching.merge_lora(model)
    switching.unmerge_lora(model)
    with switching.lora_disabled(model):
        pass
    assert trains() == {"lora_B"}
    with pytest.raises(UserError, match="lora_C"):
        adapters.set_trainable_factors(model, {"lora_C"})


def test_scaling_acts_on_the_outputs_and_unknown_layers_are_refused() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, lora_alpha=4))
    disturb(model)
    base = small_clip()
    adapters.set_scaling(model, dict.fromkeys(adapters.scalings(model), 0.0))
    torch.testing.assert_close(outputs(model), outputs(base), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="no adapted layer named 'nowhere'"):
        adapters.set_scaling(model, {"nowhere": 1.0})


def test_a_zero_padded_small_adapter_with_its_own_scaling_is_the_small_adapter() -> None:
    small, large = small_clip(), small_clip()
    inject_lora(small, LoRAConfig(r=2, lora_alpha=6))
    inject_lora(large, LoRAConfig(r=5, lora_alpha=6))
    disturb(small)
    padded = {n: torch.zeros_like(t) for n, t in adapters.get_lora_state_dict(large).items()}
    for name, tensor in adapters.get_lora_state_dict(small).items():
        padded[name][: tensor.shape[0], : tensor.shape[1]] = tensor
    adapters.set_lora_state_dict(large, padded)
    adapters.set_scaling(large, adapters.scalings(small))
    torch.testing.assert_close(outputs(large), outputs(small), rtol=0, atol=1e-6)


def test_states_of_another_rank_or_other_layers_are_refused() -> None:
    model, other = small_clip(), small_clip()
    inject_lora(model, LoRAConfig(r=2))
    inject_lora(other, LoRAConfig(r=3))
    with pytest.raises(UserError, match="rank r"):
        adapters.set_lora_state_dict(model, adapters.get_lora_state_dict(other))
    with pytest.raises(UserError, match="missing"):
        adapters.set_lora_state_dict(model, {})


def test_a_poisoned_adapter_is_not_merged() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    before = copy.deepcopy(model.state_dict())
    next(iter(adapters.adapter_parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        switching.merge_lora(model)
    base_names = [n for n in before if not adapters.is_adapter_parameter(n)]
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in base_names)
    switching.disable_lora(model)
    with pytest.raises(UserError, match="enable_lora"):
        switching.merge_lora(model)


def test_dropout_is_active_in_training_only() -> None:
    for backend in BACKENDS:
        model = small_clip(backend)
        inject_lora(model, LoRAConfig(r=2, lora_dropout=0.5))
        disturb(model)
        assert torch.equal(outputs(model), outputs(model))
        model.train()
        assert not torch.equal(outputs(model), outputs(model))


def test_half_precision_bases_get_fp32_adapters() -> None:
    model = small_clip().to(torch.bfloat16)
    inject_lora(model, LoRAConfig(r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_keeps_gradients_and_saves_activations(backend: str) -> None:
    model = small_clip(backend)
    inject_lora(model, LoRAConfig(r=2, lora_dropout=0.0))
    disturb(model)

    def backward() -> tuple[dict[str, torch.Tensor], int]:
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = features(model).square().sum()
        forward_kept = kept
        loss.backward()
        assert verify_gradients(model)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, forward_kept

    plain, plain_kept = backward()
    enable_gradient_checkpointing(model)
    enable_gradient_checkpointing(model)  # twice is once
    assert is_gradient_checkpointing(model)
    checkpointed, checkpointed_kept = backward()
    assert checkpointed_kept < plain_kept / 2
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    disable_gradient_checkpointing(model)
    assert not is_gradient_checkpointing(model)
    assert backward()[1] == plain_kept


def test_checkpointing_repeats_the_dropout_of_the_forward_pass() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_clip()
        inject_lora(model, LoRAConfig(r=2, lora_dropout=0.5))
        disturb(model)
        if checkpointing:
            enable_gradient_checkpointing(model)
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            features(model).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_the_report_names_what_has_no_gradient_and_what_should_have_none() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    features(model, "vision").sum().backward()
    report = verify_gradients(model)
    assert not report
    assert all(name.startswith("text_model.") for name in report.missing)
    assert "without" in str(report)
    model.logit_scale.grad = torch.zeros(())
    assert verify_gradients(model).unexpected == ("logit_scale",)


def test_the_injection_report_names_a_block_that_lost_its_adapter() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    attention = model.text_model.encoder.layers[1].self_attn
    attention.v_proj = attention.v_proj.base_layer
    report = check_lora_injection(model)
    assert not report
    assert [(b.tower, b.block, b.missing) for b in report.blocks if b.missing] == [
        ("text", 1, ("self_attn.v_proj",))
    ]
    assert "MISSING self_attn.v_proj" in str(report)


def test_blocks_without_adapters_are_listed_too() -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_components=["vision"], layers=[1]))
    report = check_lora_injection(model)
    assert report
    assert [(b.tower, b.block, bool(b.ranks)) for b in report.blocks] == [
        ("text", 0, False),
        ("text", 1, False),
        ("vision", 0, False),
        ("vision", 1, True),
    ]


def test_text_encoder_gets_all_four_projections_by_default() -> None:
    model = CLIPModel(small_config())
    assert apply_lora_to_text_encoder(model) == NUM_BLOCKS
    assert len(adapters.scalings(model)) == 4 * NUM_BLOCKS
    assert all(name.startswith("text_model.") for name in adapters.scalings(model))
    fused = small_clip("fused")
    assert apply_lora_to_text_encoder(fused) == NUM_BLOCKS
    assert len(adapters.factor_pairs(adapters.get_lora_state_dict(fused))) == 4 * NUM_BLOCKS


def test_models_without_towers_are_refused() -> None:
    with pytest.raises(UserError, match="no towers"):
        inject_lora(torch.nn.Linear(2, 2), LoRAConfig())

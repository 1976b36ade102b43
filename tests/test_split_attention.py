"""LoRALayer, and adapters of q, k, v and out apart on a fused attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora import LoRALayer, adapters, add_lora_to_attention_block, switching
from lora.adapter_saving import save_lora_adapters
from lora.base_delta_file import fitting_base_delta, save_base_delta, set_base_delta
from lora.base_identity import base_digests
from lora.config import LoRAConfig, TowerOverride
from lora.injection import inject_lora
from lora.loading import load_lora_adapters
from lora.named import load_named_adapter
from lora.verify import check_lora_injection, count_parameters, verify_gradients
from models.clip import FederatedCLIPModel
from models.errors import UserError
from tests.lora_models import INSTALLED_BACKENDS, NUM_BLOCKS, disturb, features, outputs, small_clip

OPEN_CLIP = [backend for backend in INSTALLED_BACKENDS if backend != "huggingface"]
TARGETS = ["in_proj", "out_proj"]


def adapted(backend: str = "fused", **settings: Any) -> nn.Module:
    model = small_clip(backend)
    defaults = {"r": 2, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": TARGETS}
    inject_lora(model, LoRAConfig(**{**defaults, **settings}))
    return model


def by_hand(backend: str, model: nn.Module, scaling: float = 5 / 2) -> nn.Module:
    """A naive oracle: the base model with every product written into its slice of the weight."""
    plain = small_clip(backend)
    for name, factor in adapters.get_lora_state_dict(model).items():
        if not name.endswith("lora_A"):
            continue
        block, part = name.removesuffix(".lora_A").rsplit(".lora_", 1)
        product = scaling * adapters.get_lora_state_dict(model)[name.replace("lora_A", "lora_B")] @ factor
        attention = plain.get_submodule(block).attn
        if part == "out":
            attention.out_proj.weight.data += product
        else:
            attention.in_proj_weight.data.chunk(3)["qkv".index(part)].add_(product)
    return plain


def test_a_layer_is_the_product_of_its_factors_and_starts_at_zero() -> None:
    layer = LoRALayer(6, 4, r=2, lora_alpha=8, lora_dropout=0.0)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.scaling) == ((2, 6), (4, 2), 4.0)
    assert (layer.enabled, layer.merged) == (True, False)
    assert not layer(x).any()
    assert layer.lora_A.abs().max() <= 6**-0.5  # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(fan in)
    torch.nn.init.ones_(layer.lora_B)
    torch.testing.assert_close(layer(x), 4.0 * x @ layer.lora_A.T @ layer.lora_B.T)
    for switch in ("enabled", "merged"):
        setattr(layer, switch, not getattr(layer, switch))
        assert layer(x).shape == (3, 5, 4)
        assert not layer(x).any()
        setattr(layer, switch, not getattr(layer, switch))
    layer.reset_parameters()
    assert not layer.lora_B.any()


@pytest.mark.parametrize("backend", OPEN_CLIP)
@pytest.mark.parametrize("targets", [TARGETS, ["in_proj"], ["out_proj"]], ids="-".join)
def test_outputs_are_those_of_the_products_in_the_weights(backend: str, targets: list[str]) -> None:
    model = adapted(backend, target_modules=targets)
    torch.testing.assert_close(outputs(model), outputs(small_clip(backend)), rtol=0, atol=1e-5)
    disturb(model)
    torch.testing.assert_close(outputs(model), outputs(by_hand(backend, model)), rtol=0, atol=1e-5)


def test_gradients_are_those_of_plain_autograd_through_the_products() -> None:
    model = adapted(target_components=["vision"])
    disturb(model)
    block: Any = model.visual.transformer.resblocks[0]
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    block.attn(x, x, x, need_weights=False)[0].square().sum().backward()
    layers = {part: getattr(block, f"lora_{part}") for part in ("q", "k", "v", "out")}
    copies = {
        part: [factor.detach().clone().requires_grad_() for factor in (layer.lora_A, layer.lora_B)]
        for part, layer in layers.items()
    }
    products = {part: 5 / 2 * b @ a for part, (a, b) in copies.items()}
    plain: Any = small_clip("fused").visual.transformer.resblocks[0].attn
    weights = {
        "in_proj_weight": plain.in_proj_weight + torch.cat([products[part] for part in "qkv"]),
        "out_proj.weight": plain.out_proj.weight + products["out"],
    }
    functional_call(plain, weights, (x, x, x), {"need_weights": False})[0].square().sum().backward()
    for part, layer in layers.items():
        for mine, theirs in zip((layer.lora_A, layer.lora_B), copies[part], strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    features(model).sum().backward()
    assert verify_gradients(model)


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "bool mask"])
def test_every_layout_of_attention_is_that_of_torch(layout: str) -> None:
    block: Any = nn.Module()
    block.attn = nn.MultiheadAttention(8, 2, batch_first=layout != "sequence first").eval()
    plain = copy.deepcopy(block.attn)
    assert add_lora_to_attention_block(block, r=2, lora_dropout=0.0)
    block.lora_v.lora_B.data.fill_(1e-12)  # on, and yet nothing
    x = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 3).triu(1).bool()
    mask = mask if layout == "bool mask" else torch.zeros(3, 3).masked_fill(mask, float("-inf"))
    expected = plain(x, x, x, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(block.attn(x, x, x, need_weights=False, attn_mask=mask)[0], expected)


@pytest.mark.parametrize("backend", OPEN_CLIP)
def test_adapters_switch_off_exactly_merge_and_leave_without_a_trace(backend: str) -> None:
    model, base = adapted(backend, bias="lora_only"), outputs(small_clip(backend))
    names, digests = set(small_clip(backend).state_dict()), base_digests(small_clip(backend))
    disturb(model)
    assert base_digests(model) == digests
    on = outputs(model)
    with switching.lora_disabled(model):
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), on)
    switching.merge_lora(model)
    torch.testing.assert_close(outputs(model), on, rtol=0, atol=1e-5)
    switching.unmerge_lora(model)
    torch.testing.assert_close(outputs(model), on, rtol=0, atol=1e-5)
    switching.merge_and_unload(model)
    torch.testing.assert_close(outputs(model), on, rtol=0, atol=1e-5)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("backend", OPEN_CLIP)
def test_a_block_gets_the_documented_attributes(backend: str) -> None:
    block: Any = small_clip(backend).transformer.resblocks[0]
    assert add_lora_to_attention_block(block, 2, 4, 0.0, ["in_proj"])
    assert all(isinstance(getattr(block, f"lora_{part}"), LoRALayer) for part in "qkv")
    assert block.lora_out is None
    assert (block.lora_enabled_in_proj, block.lora_enabled_out_proj) == (True, False)
    assert not add_lora_to_attention_block(block, 2, 4, 0.0)  # once
    assert not add_lora_to_attention_block(nn.Linear(2, 2))
    assert not add_lora_to_attention_block(
        small_clip(backend).transformer.resblocks[0], target_modules=["c_fc"]
    )


def test_open_clips_text_tower_has_65536_parameters_a_block_and_786432_in_all() -> None:
    pytest.importorskip("open_clip")
    model: Any = FederatedCLIPModel("open_clip:ViT-B-32", task="retrieval", pretrained=False, device="meta")
    assert model.apply_lora_to_text_encoder(r=16, target_modules=["in_proj", "out_proj"]) == 12
    counts = count_parameters(model)
    assert counts["adapter"] == counts["by_tower"]["text"] == 786_432
    block = model.clip.transformer.resblocks[0]
    parts = (block.lora_q, block.lora_k, block.lora_v, block.lora_out)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 65_536


def test_what_travels_is_named_as_in_the_documented_files() -> None:
    model = adapted(text=TowerOverride(r=3, layers=[1]))
    state = adapters.get_lora_state_dict(model)
    assert state["transformer.resblocks.1.lora_q.lora_A"].shape == (3, 20)
    assert not any(name.startswith("transformer.resblocks.0") for name in state)
    assert len(adapters.factor_pairs(state)) == 4 * (NUM_BLOCKS + 1) == len(adapters.scalings(model))
    assert adapters.scalings(model)["transformer.resblocks.1.lora_q"] == pytest.approx(5 / 3)
    assert count_parameters(model)["by_tower"] == {"vision": 2 * 4 * 2 * 32, "text": 4 * 3 * 40, "head": 0}
    report = check_lora_injection(model)
    assert report
    assert report.blocks[1].ranks == {f"lora_{part}": 3 for part in ("k", "out", "q", "v")}
    adapters.set_scaling(model, {"transformer.resblocks.1.lora_q": 7.0})
    assert model.transformer.resblocks[1].lora_q.scaling == 7.0


def test_saved_adapters_come_back_and_are_refused_by_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, fresh = adapted(lora_dropout=0.1), small_clip("fused")
    disturb(model)
    load_lora_adapters(fresh, save_lora_adapters(model, tmp_path / "adapter"))
    assert torch.equal(outputs(fresh), outputs(model))
    with pytest.raises(ValueError, match="lora_q"):
        PeftModel.from_pretrained(small_clip("fused"), str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="scaling of"):
        load_lora_adapters(adapted(lora_alpha=9), tmp_path / "adapter")
    with pytest.raises(UserError, match="stand alone"):
        load_named_adapter(fresh, tmp_path / "adapter", "second")


def test_changed_base_weights_lie_in_their_slice_and_leave_the_identity_alone(tmp_path: Path) -> None:
    model = adapted(target_components=["text"])
    digests, name = base_digests(model), "transformer.resblocks.0.lora_k"
    before = model.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    others = {f"transformer.resblocks.1.lora_{part}": (torch.ones(20, 20),) for part in ("q", "v", "out")}
    save_base_delta(model, tmp_path, {name: (torch.ones(20, 20),), **others}, server_round=1)
    set_base_delta(model, fitting_base_delta(model, tmp_path))
    changed = model.transformer.resblocks[0].attn.in_proj_weight.detach() - before
    assert (changed[20:40] - 1).abs().max() < 1e-5
    assert not changed[:20].any()
    assert not changed[40:].any()
    assert base_digests(model) == digests


def test_a_copy_of_an_adapted_model_uses_its_own_adapters() -> None:
    model = adapted()
    twin, before = copy.deepcopy(model), outputs(model)
    disturb(twin)
    assert torch.equal(outputs(model), before)
    torch.testing.assert_close(outputs(twin), outputs(by_hand("fused", twin)), rtol=0, atol=1e-5)

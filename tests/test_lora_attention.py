"""LoRA inside nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora.adapters import adapter_layers, adapter_parameters, get_lora_state_dict
from lora.attention import FusedAttentionLoRA
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.verify import verify_gradients
from models.clip import FederatedCLIPModel
from models.errors import UserError
from tests.lora_models import disturb, features, outputs, small_clip


def fused(**settings: object) -> nn.Module:
    model = small_clip("fused")
    inject_lora(model, LoRAConfig(**{"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, **settings}))
    return model


def base_weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def test_outputs_and_gradients_are_those_of_plain_autograd_through_the_product() -> None:
    """Oracle: the same module with W + scaling * B @ A computed outside and swapped in by hand."""
    width, scaling = 16, 5 / 3
    attention = small_clip("fused").visual.transformer.resblocks[0].attn
    model = fused(target_components=["vision"])
    disturb(model)
    layer = model.visual.transformer.resblocks[0].attn
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))
    layer(x, x, x, need_weights=False)[0].square().sum().backward()

    factors = {n: p.detach().clone().requires_grad_() for n, p in adapter_parameters(layer).items()}
    a, b = factors[".lora_A.weight"], factors[".lora_B.weight"]
    out_a, out_b = (factors[f"base_layer.out_proj.lora_{f}.weight"] for f in "AB")
    weights = {
        "in_proj_weight": attention.in_proj_weight + scaling * b @ a,
        "out_proj.weight": attention.out_proj.weight + scaling * out_b @ out_a,
    }
    expected = torch.func.functional_call(attention, weights, (x, x, x), {"need_weights": False})[0]
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)
    expected.square().sum().backward()
    for name, parameter in adapter_parameters(layer).items():
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, factors[name].grad)


def test_the_base_weight_never_drifts() -> None:
    model = fused()
    disturb(model)
    before = base_weights(model)
    for _ in range(20):
        features(model).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, base_weights(model), strict=True))


def test_one_step_moves_every_factor_of_every_projection() -> None:
    model = fused()
    disturb(model)
    start = get_lora_state_dict(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    features(model).square().sum().backward()
    report = verify_gradients(model)
    assert report
    assert not report.all_zero
    optimizer.step()
    assert all(not torch.equal(start[n], t) for n, t in get_lora_state_dict(model).items())
    assert sum(name.endswith("out_proj.lora_B.weight") for name in start) == 4


def test_documented_targets_go_with_no_other_target() -> None:
    with pytest.raises(UserError, match=r"out_proj.*take attn"):
        fused(target_modules=["out_proj", "c_fc"])


def test_dropout_drops_input_features_and_is_unbiased() -> None:
    model = fused(lora_dropout=0.5, target_components=["vision"])
    disturb(model)
    layer = model.visual.transformer.resblocks[0].attn
    assert isinstance(layer, FusedAttentionLoRA)
    seen: list[torch.Tensor] = []
    original = layer.base_layer.forward

    def record(*args: object, **kwargs: object) -> object:
        seen.append(layer.base_layer.in_proj_weight.detach().clone())
        return original(*args, **kwargs)

    base, layer.base_layer.forward = layer.base_layer.in_proj_weight.detach().clone(), record
    layer.train()
    x = torch.zeros(1, 2, 16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(500):
            layer(x, x, x)
    deltas = torch.stack(seen) - base  # (draws, 3 d, d)
    dropped = (deltas.abs().sum(dim=1) < 1e-6).float()  # (draws, d): whole columns
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(deltas.mean(dim=0), layer.get_delta_weight("default"), rtol=0, atol=0.06)


def test_attention_weights_masks_and_cross_attention_pass_through() -> None:
    model = fused(target_components=["text"])
    layer = model.transformer.resblocks[0].attn
    plain = small_clip("fused").transformer.resblocks[0].attn
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 20, generator=generator), torch.randn(2, 5, 20, generator=generator)
    padding = torch.tensor([[False, False, False, True, True], [False] * 5])
    adapted = layer(query, key, key, key_padding_mask=padding)
    expected = plain(query, key, key, key_padding_mask=padding)
    torch.testing.assert_close(adapted, expected)  # outputs and attention weights


def test_open_clip_models_take_adapters_through_the_same_functions() -> None:
    pytest.importorskip("open_clip")
    model = FederatedCLIPModel("open_clip:RN50", 3, pretrained=False, device="meta")
    with pytest.raises(UserError, match="vision"):  # a ResNet tower has no blocks of attention
        inject_lora(model, LoRAConfig(target_modules=["no_such_layer"], target_components=["vision"]))
    model = FederatedCLIPModel("open_clip:ViT-B-32", 3, pretrained=False, device="meta")
    inject_lora(model, LoRAConfig(r=4, target_components=["text"]))
    assert len(adapter_layers(model)) == 2 * 12
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 12 * 4 * (512 + 3 * 512 + 2 * 512)


def test_an_open_clip_tower_is_unchanged_by_fresh_adapters_and_trains() -> None:
    open_clip = pytest.importorskip("open_clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = open_clip.transformer.ResidualAttentionBlock(16, 2)
    clip = small_clip("fused")
    clip.visual.transformer.resblocks[0] = block.eval().requires_grad_(False)
    base = outputs(clip)
    inject_lora(clip, LoRAConfig(r=2, target_components=["vision"]))
    assert torch.equal(outputs(clip), base)
    disturb(clip)
    features(clip, "vision").sum().backward()
    assert verify_gradients(clip)

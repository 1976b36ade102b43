"""The leaner LoRA layer against PEFT's own, which is its oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from lora.linear import LinearLoRA

BATCH_SHAPES = [(5, 6), (2, 3, 6)]


def adapted(names: tuple[str, ...] = ("default",), dropout: float = 0.0, **options: object) -> LinearLoRA:
    """A (6 -> 4) layer with random, non-zero adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    for name in names:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_dropout=dropout, **options)
        config._register_custom_module({nn.Linear: LinearLoRA})
        inject_adapter_in_model(config, model, name)
    layer = model[0]
    assert isinstance(layer, LinearLoRA)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer.set_adapter(list(names))
    return layer


def outcome(
    forward: Callable[..., torch.Tensor], layer: LinearLoRA, shape: tuple[int, ...]
) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = forward(layer, x)
    trained = [p for n, p in layer.named_parameters() if "lora_" in n]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *trained])]


@pytest.mark.parametrize("shape", BATCH_SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("names", [("default",), ("default", "second")])
def test_values_and_gradients_are_pefts(
    names: tuple[str, ...], dropout: float, shape: tuple[int, ...]
) -> None:
    layer = adapted(names, dropout).double()
    for ours, pefts in zip(
        outcome(LinearLoRA.forward, layer, shape), outcome(PeftLinear.forward, layer, shape), strict=True
    ):
        torch.testing.assert_close(ours, pefts, rtol=1e-12, atol=1e-12)


def merge(layer: LinearLoRA) -> None:
    layer.merge()


def disable(layer: LinearLoRA) -> None:
    layer.enable_adapters(enabled=False)


@pytest.mark.parametrize("change", [merge, disable])
def test_what_is_not_plain_is_pefts_bit_for_bit(change: Callable[[LinearLoRA], None]) -> None:
    layer = adapted()
    change(layer)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), PeftLinear.forward(layer, x))


def test_dora_is_left_to_peft() -> None:
    layer = adapted(use_dora=True)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), PeftLinear.forward(layer, x))


def test_a_half_precision_base_is_left_to_peft() -> None:
    layer = adapted()
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert torch.equal(layer(x), PeftLinear.forward(layer, x))
    assert layer(x).dtype == torch.bfloat16


def test_autocast_gives_pefts_values() -> None:
    layer = adapted()
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            layer(x).float(), PeftLinear.forward(layer, x).float(), rtol=2e-2, atol=2e-2
        )

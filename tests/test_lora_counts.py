"""Parameter counts of openai/clip-vit-base-patch32, on the meta device.

The expected numbers were measured with PEFT itself (one regular expression a row) and follow from the shapes:
per adapted Linear r * (d_in + d_out).
"""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from lora.config import LoRAConfig
from lora.injection import apply_lora_to_text_encoder, inject_lora
from lora.verify import count_parameters

BASE = 151_277_313
QV, QKV, QKVO = (
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "out_proj"],
)
MLP = ["fc1", "fc2"]
PER_RANK = [  # targets, vision, text: parameters per unit of rank
    (QV, 36_864, 24_576),
    (QKV, 55_296, 36_864),
    (QKVO, 73_728, 49_152),
    (MLP, 92_160, 61_440),
    (QKVO + MLP, 165_888, 110_592),
]


def vit_b_32() -> CLIPModel:
    with torch.device("meta"):
        return CLIPModel(CLIPConfig())  # transformers' defaults are ViT-B/32


@pytest.mark.parametrize("rank", [4, 8, 16, 32, 64])
@pytest.mark.parametrize(
    ("targets", "vision", "text"), PER_RANK, ids=lambda v: "-".join(v) if isinstance(v, list) else ""
)
def test_counts_of_both_towers_are_exact(targets: list[str], vision: int, text: int, rank: int) -> None:
    model = vit_b_32()
    inject_lora(model, LoRAConfig(r=rank, target_modules=targets))
    counts = count_parameters(model)
    assert counts["base"] == BASE
    assert counts["by_tower"] == {"vision": rank * vision, "text": rank * text, "head": 0}
    assert counts["trainable"] == counts["adapter"] == rank * (vision + text)
    assert counts["by_kind"]["lora_A"] == counts["by_kind"]["lora_B"] == rank * (vision + text) // 2


@pytest.mark.parametrize(("component", "count"), [("vision", 1_179_648), ("text", 786_432)])
def test_one_tower_leaves_the_other_alone(component: str, count: int) -> None:
    model = vit_b_32()
    inject_lora(model, LoRAConfig(r=16, target_modules=QKVO, target_components=[component]))
    assert count_parameters(model)["adapter"] == count_parameters(model)["by_tower"][component] == count


def test_text_encoder_default_is_786432_parameters() -> None:
    model = vit_b_32()
    assert apply_lora_to_text_encoder(model) == 12
    counts = count_parameters(model)
    assert counts["trainable"] == counts["by_tower"]["text"] == 786_432
    assert counts["total"] == BASE + 786_432
    assert counts["trainable_percent"] == pytest.approx(0.517, abs=1e-3)

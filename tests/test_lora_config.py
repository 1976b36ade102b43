"""LoRAConfig: defaults, presets and what it refuses."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from lora.adapters import lora_config_of
from lora.config import LoRAConfig, TowerOverride
from lora.injection import inject_lora
from lora.lora_config import LoRAConfig as DocumentedLoRAConfig
from lora.targets import block_of, target_pattern
from tests.lora_models import small_clip


def test_defaults_are_the_documented_ones() -> None:
    assert DocumentedLoRAConfig is LoRAConfig
    config = LoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.1, "none")
    assert config.target_modules is None
    assert config.save_only_trainable
    assert config.enabled
    assert config.tower_names == ("vision", "text")
    assert not config.adapts_head


def test_presets_choose_towers_or_head() -> None:
    clip = LoRAConfig.for_clip_model(r=4, lora_alpha=8, bias="all")
    assert (clip.r, clip.lora_alpha, clip.bias, clip.tower_names) == (4, 8, "all", ("vision", "text"))
    head = LoRAConfig.for_classification_head()
    assert (head.r, head.lora_alpha, head.tower_names, head.adapts_head) == (8, 16, (), True)


def test_overrides_hold_for_their_tower_alone() -> None:
    config = LoRAConfig(r=4, lora_alpha=8, layers=[0], text=TowerOverride(r=2, layers=[1]))
    assert config.for_tower("vision") == config
    text = config.for_tower("text")
    assert (text.r, text.lora_alpha, text.layers, text.scaling) == (2, 8, [1], 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"bias": "some"},
        {"target_components": []},
        {"target_components": ["audio"]},
        {"target_modules": []},
        {"rank": 4},
        {"vision": {"rank": 4}},
    ],
    ids=str,
)
def test_wrong_values_and_unknown_keys_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


def test_a_config_survives_the_way_through_plain_data() -> None:
    config = LoRAConfig(r=3, lora_alpha=1.5, vision=TowerOverride(lora_dropout=0.2), layers=[0, 3])
    assert LoRAConfig(**config.model_dump(mode="json")) == config


def test_patterns_match_the_first_number_as_the_block() -> None:
    pattern = target_pattern(["vision_model"], ["fc1", "self_attn.q_proj"], [1, 11])
    matches = {
        name: re.fullmatch(pattern, name) is not None
        for name in (
            "vision_model.encoder.layers.1.mlp.fc1",
            "vision_model.encoder.layers.11.self_attn.q_proj",
            "vision_model.encoder.layers.0.mlp.fc1",
            "vision_model.encoder.layers.1.self_attn.k_proj",
            "text_model.encoder.layers.1.mlp.fc1",
            "other.vision_model.encoder.layers.1.mlp.fc1",
            "vision_model.encoder.layers.0.experts.1.fc1",
        )
    }
    assert list(matches.values()) == [True, True, False, False, False, False, False]
    assert block_of("a.layers.3.experts.1") == 3
    assert block_of("visual_projection") is None


def test_settings_can_be_assigned_and_are_checked_as_a_whole() -> None:
    config = LoRAConfig(target_components=["classifier"])
    config.save_only_trainable = False
    assert config.save_only_trainable is False
    for name, value in (
        ("save_only_trainable", "no idea"),
        ("r", 0),
        ("rank", 4),
        ("train_temperature", True),
    ):
        before = config.model_copy()
        with pytest.raises(ValidationError, match=name):
            setattr(config, name, value)
        assert config == before


def test_what_is_assigned_after_injection_does_not_change_what_is_in_force() -> None:
    model, config = small_clip(), LoRAConfig(r=2)
    inject_lora(model, config)
    config.r = 4
    assert lora_config_of(model).r == 2  # type: ignore[union-attr]

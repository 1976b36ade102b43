"""Settings of PEFT adapters: each key is honoured, without effect, or refused by name."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lora.adapter_files import CONFIG_FILE
from lora.adapter_saving import save_lora_adapters
from lora.adapters import is_adapter_parameter
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_lora_adapters
from lora.peft_settings import HONOURED, REFUSED, WITHOUT_EFFECT
from models.errors import UserError
from tests.lora_models import disturb, outputs, small_clip

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own: about starts and unused settings
NON_DEFAULTS = (True, 7, "something", ["q_proj"], {"key": 1})


def by_peft(folder: Path, **settings: Any) -> Path:
    model = get_peft_model(small_clip(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
    disturb(model)
    model.save_pretrained(str(folder))
    return folder


def changed(folder: Path, **settings: Any) -> Path:
    content = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**content, **settings}))
    return folder


def test_every_setting_that_peft_knows_is_in_one_of_the_three_lists() -> None:
    assert {field.name for field in fields(LoraConfig)} == HONOURED | WITHOUT_EFFECT | REFUSED
    assert len(fields(LoraConfig)) == len(HONOURED) + len(WITHOUT_EFFECT) + len(REFUSED)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_setting_that_computes_something_else_is_refused_by_name(key: str, tmp_path: Path) -> None:
    folder = save_lora_adapters(_ours(), tmp_path)
    for value in NON_DEFAULTS:
        with pytest.raises(UserError, match=key):
            load_lora_adapters(small_clip(), changed(folder, **{key: value}))


def _ours() -> torch.nn.Module:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2))
    return model


def test_a_setting_of_a_newer_peft_is_refused_by_name_unless_it_is_off(tmp_path: Path) -> None:
    folder = by_peft(tmp_path)
    for off in (None, False, [], {}, ""):
        load_lora_adapters(small_clip(), changed(folder, use_sparkles=off))
    with pytest.raises(UserError, match=r"use_sparkles"):
        load_lora_adapters(small_clip(), changed(folder, use_sparkles=True))


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "sparkles"]
)
def test_a_start_that_changes_the_base_weights_is_refused(start: str, tmp_path: Path) -> None:
    model, folder = small_clip(), changed(by_peft(tmp_path), init_lora_weights=start)
    before = outputs(model)
    with pytest.raises(UserError, match=rf"init_lora_weights='{start}'"):
        load_lora_adapters(model, folder)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica", "olora", "pissa"])
def test_a_start_is_accepted_exactly_where_peft_leaves_the_base_weights_alone(
    start: bool | str, tmp_path: Path
) -> None:
    folder = by_peft(tmp_path, init_lora_weights=start)
    theirs = get_peft_model(small_clip(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start))
    base = dict(small_clip().named_parameters())
    trained = dict(theirs.base_model.model.named_parameters())
    frozen = {n.replace(".base_layer", ""): p for n, p in trained.items() if not is_adapter_parameter(n)}
    if all(torch.equal(parameter, base[name]) for name, parameter in frozen.items()):
        load_lora_adapters(small_clip(), folder)
    else:
        with pytest.raises(UserError, match="init_lora_weights"):
            load_lora_adapters(small_clip(), folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": r".*text_model.*"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"rank_pattern": {r".*layers\.1.*": 3}, "alpha_pattern": {r".*text_model.*": 5}},
        {"use_rslora": True, "lora_alpha": 3},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    ],
    ids="-".join,
)
def test_an_honoured_setting_gives_the_features_of_plain_peft(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder, model = by_peft(tmp_path, **settings), small_clip()
    load_lora_adapters(model, folder)
    theirs = PeftModel.from_pretrained(small_clip(), str(folder)).eval().base_model.model
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=0, atol=1e-6)
    assert not torch.equal(outputs(model), outputs(small_clip()))

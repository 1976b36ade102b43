"""Identity of a base model: all of its weights, and nothing else."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPModel

from lora.adapter_files import ADAPTER_FILE, CONFIG_FILE, read_adapter
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.adapters import adapter_layers
from lora.base_identity import base_digests
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_full_checkpoint, load_lora_adapters
from lora.named import load_named_adapter
from lora.second_adapter import add_second_adapter
from lora.switching import disable_lora, merge_and_unload, merge_lora, unmerge_lora
from models.clip import FederatedCLIPModel
from models.committed_folders import MANIFEST_FILE
from models.errors import UserError
from models.state import save_state
from tests.lora_models import INSTALLED_BACKENDS, disturb, small_clip

EVERYTHING = LoRAConfig(r=2, bias="all", train_temperature=True)


def trained(clip: nn.Module, config: LoRAConfig | None = None) -> nn.Module:
    inject_lora(clip, config or LoRAConfig(r=2))
    disturb(clip)
    return clip


def saved(folder: Path, clip: nn.Module, **metadata: Any) -> Path:
    """An adapter folder whose metadata are changed; None takes a key out."""
    save_lora_adapters(clip, folder)
    found = read_adapter(folder)
    kept = {key: value for key, value in {**found.metadata, **metadata}.items() if value is not None}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in kept.items()}
    save_state({f"base_model.model.{n}": t for n, t in found.state.items()}, folder / ADAPTER_FILE, texts)
    (folder / MANIFEST_FILE).unlink()  # it lists the file as it was saved
    return folder


@pytest.mark.parametrize("backend", INSTALLED_BACKENDS)
def test_the_digests_are_those_of_the_base_before_during_and_after_lora(backend: str) -> None:
    clip = small_clip(backend)
    before = base_digests(clip)
    assert list(before) == ["float32", "bfloat16", "float16"]
    trained(clip, EVERYTHING)
    assert base_digests(clip) == before
    merge_lora(clip)
    assert base_digests(clip) == before
    unmerge_lora(clip)
    disable_lora(clip)
    assert base_digests(clip) == before


def test_a_second_adapter_is_no_part_of_the_base() -> None:
    model = FederatedCLIPModel("tiny", 2, strategy="lora")
    before = base_digests(model)
    inject_lora(model, LoRAConfig(r=2))
    add_second_adapter(model, "private", seed=1)
    assert base_digests(model) == before


@pytest.mark.parametrize("backend", INSTALLED_BACKENDS)
def test_one_changed_value_of_any_weight_is_another_base(backend: str) -> None:
    clip = small_clip(backend)
    before, names = base_digests(clip), []
    for name, parameter in clip.named_parameters():
        with torch.no_grad():
            value = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] += 1e-3
            names += [name] if base_digests(clip)["float32"] == before["float32"] else []
            parameter.view(-1)[-1] = value
    assert not names
    assert base_digests(clip) == before


def test_a_base_with_a_merged_adapter_is_another_base(tmp_path: Path) -> None:
    first = merge_and_unload(trained(small_clip(), LoRAConfig(r=2, target_modules=["q_proj"])))
    folder = save_lora_adapters(trained(first), tmp_path / "second")
    plain = small_clip()
    with pytest.raises(UserError, match="other weights.*--any-base"):
        load_lora_adapters(plain, folder)
    with pytest.raises(UserError, match="other weights"):
        load_named_adapter(plain, folder, "second")
    assert not adapter_layers(plain)
    again = merge_and_unload(trained(small_clip(), LoRAConfig(r=2, target_modules=["q_proj"])))
    load_lora_adapters(again, folder)
    load_lora_adapters(plain, folder, check_base=False)


def test_an_adapter_saved_while_merged_names_the_base_under_it(tmp_path: Path) -> None:
    model = trained(small_clip())
    merge_lora(model)
    load_lora_adapters(small_clip(), save_lora_adapters(model, tmp_path))


def test_what_a_run_merged_into_the_base_is_no_part_of_it(tmp_path: Path) -> None:
    model = trained(small_clip())
    module = "vision_model.encoder.layers.0.self_attn.q_proj"
    save_lora_adapters(model, tmp_path, products={module: (torch.ones(16, 16),)}, server_round=1)
    loaded = small_clip()
    load_lora_adapters(loaded, tmp_path)
    assert base_digests(loaded) == base_digests(small_clip())
    load_lora_adapters(small_clip(), save_lora_adapters(loaded, tmp_path / "again"))


def test_a_full_checkpoint_brings_its_own_base(tmp_path: Path) -> None:
    save_full_checkpoint(small_clip(seed=1), tmp_path)
    model = small_clip()
    base_digests(model)
    load_full_checkpoint(model, tmp_path)
    assert base_digests(model) == base_digests(small_clip(seed=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_copy_of_the_base_is_recognised_and_said(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_lora_adapters(trained(small_clip()), tmp_path / "fp32")
    name = str(dtype).removeprefix("torch.")
    for clip in (small_clip().to(dtype), small_clip().to(dtype).float()):
        caplog.clear()
        load_lora_adapters(clip, folder)
        assert f"in {name} only" in caplog.text
    theirs = save_lora_adapters(trained(small_clip().to(dtype)), tmp_path / "half")
    load_lora_adapters(small_clip(), theirs)
    with pytest.raises(UserError, match="other weights"):
        load_lora_adapters(small_clip(seed=1).to(dtype), folder)


def test_the_hash_decides_and_not_the_name(tmp_path: Path) -> None:
    folder = saved(tmp_path, trained(small_clip()), base_model="somewhere/else")
    named = small_clip()
    named.model_name = "tiny"
    load_lora_adapters(named, folder)


def test_a_sample_of_an_older_version_is_still_looked_at(tmp_path: Path) -> None:
    folder = saved(tmp_path, trained(small_clip()), base_sha256=None)
    load_lora_adapters(small_clip(), folder)
    with pytest.raises(UserError, match="other weights"):
        load_lora_adapters(small_clip(seed=1), folder)


def by_peft(folder: Path, base: str, **changes: Any) -> Path:
    model = get_peft_model(CLIPModel.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(folder))
    content = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**content, **changes}))
    return folder


def test_plain_pefts_base_is_recognised_by_its_weights_under_another_name(
    small_clip_folder: Path, tmp_path: Path
) -> None:
    folder = by_peft(tmp_path / "adapter", str(small_clip_folder))
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in small_clip_folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    model = FederatedCLIPModel(str(copied), 2, strategy="lora")
    load_lora_adapters(model, folder)
    other = FederatedCLIPModel(str(copied), 2, strategy="lora", pretrained=False, seed=5)
    with pytest.raises(UserError, match="random weights.*--any-base"):
        load_lora_adapters(other, folder)


@pytest.mark.parametrize(
    "changes",
    [{"base_model_name_or_path": "/gone/clip"}, {"revision": "v2"}, {"base_model_name_or_path": "a/b/c"}],
    ids=["gone", "revision", "no-name"],
)
def test_where_names_are_all_there_is_the_message_says_so_and_names_the_option(
    changes: dict[str, str], small_clip_folder: Path, tmp_path: Path
) -> None:
    folder = by_peft(tmp_path, str(small_clip_folder), **changes)
    model = FederatedCLIPModel(str(small_clip_folder), 2, strategy="lora")
    with pytest.raises(
        UserError, match=rf"{next(iter(changes.values()))}.*nothing but that name.*--any-base"
    ):
        load_lora_adapters(model, folder)
    load_lora_adapters(model, folder, check_base=False)


def test_an_adapter_that_names_no_base_is_taken_with_a_warning(
    small_clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = by_peft(tmp_path, str(small_clip_folder), base_model_name_or_path=None)
    with caplog.at_level(logging.WARNING):
        load_lora_adapters(FederatedCLIPModel(str(small_clip_folder), 2, strategy="lora"), folder)
    assert "nothing says which base model" in caplog.text


def test_a_copied_model_does_not_share_what_is_known_of_the_first() -> None:
    clip = small_clip()
    base_digests(clip)
    other = copy.deepcopy(clip)
    other.logit_scale.data += 1
    assert base_digests(other) != base_digests(clip)

"""A user's script, as the documentation gives it: every public name imports and works together."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import lora
from federated.config.config_files import find_config
from lora import (
    LoRAConfig,
    apply_lora_to_text_encoder,
    check_lora_injection,
    count_parameters,
    disable_gradient_checkpointing,
    disable_lora,
    enable_gradient_checkpointing,
    enable_lora,
    get_lora_state_dict,
    inject_lora,
    load_full_checkpoint,
    load_lora_adapters,
    merge_and_unload,
    merge_lora,
    quick_clip_lora,
    save_full_checkpoint,
    save_lora_adapters,
    unmerge_lora,
    verify_gradients,
)
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.factory import LoRAConfigManager, LoRAModelManager, create_model
from lora.lora_config import LoRAConfig as DocumentedLoRAConfig
from models.clip import FederatedCLIPModel


def test_the_documented_script_runs(
    small_clip_folder: Path,
    tmp_path: Path,
    pixel_batch: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert DocumentedLoRAConfig is LoRAConfig
    data, labels = pixel_batch["pixel_values"], pixel_batch["labels"]
    config = LoRAConfig.for_clip_model(r=16, lora_alpha=32)
    model = FederatedCLIPModel(model_name=str(small_clip_folder), num_classes=3)
    w = CLIPLoRAWrapper(
        federated_clip_model=model, lora_config=config, target_components=["encoder", "classifier"]
    )
    w.apply_lora_to_federated_model()
    assert check_lora_injection(w)

    w.enable_gradient_checkpointing()
    loss = w.train_step(data, labels)
    w.disable_gradient_checkpointing()
    assert isinstance(loss, float)
    metrics = w.evaluate(data, labels)
    assert 0 <= metrics["accuracy"] <= 1
    params = w.get_parameters()
    w.set_parameters(params)
    w.disable_lora_layers()
    w.enable_lora_layers()

    counts = count_parameters(w)
    assert counts["trainable"] == counts["adapter"] == sum(p.size for p in params)
    state = get_lora_state_dict(w)
    assert sum(t.numel() for t in state.values()) == counts["adapter"]
    disable_lora(w)
    enable_lora(w)
    merge_lora(w)
    unmerge_lora(w)

    LoRAConfigManager().save_config(config, "clip_small")
    assert LoRAConfigManager().load_config("clip_small") == config
    LoRAModelManager().save_model(w, "name")
    LoRAModelManager().load_model("name", w)
    assert LoRAModelManager().get_model_info("name")["has_head"]
    assert (LoRAConfigManager().list_configs(), LoRAModelManager().list_models()) == (
        ["clip_small"],
        ["name"],
    )
    assert {path.name for path in tmp_path.iterdir()} == {"lora_configs", "lora_models"}

    save_lora_adapters(w, "adapter")
    fresh = FederatedCLIPModel(model_name=str(small_clip_folder), num_classes=3)
    load_lora_adapters(fresh, "adapter")
    merged = w.merge_and_unload()
    torch.testing.assert_close(merged.encode_image(data), fresh.encode_image(data), rtol=0, atol=1e-5)


def test_the_documented_shortcuts_run(small_clip_folder: Path, pixel_batch: dict[str, torch.Tensor]) -> None:
    quick = quick_clip_lora(
        str(small_clip_folder), num_classes=3, r=4, lora_alpha=8, target_components=["vision"]
    )
    quick.federated_model.task.loss(quick.federated_model, pixel_batch).backward()
    assert verify_gradients(quick)
    text = FederatedCLIPModel(str(small_clip_folder), 3)
    apply_lora_to_text_encoder(text)
    assert count_parameters(text)["by_tower"]["text"] == count_parameters(text)["adapter"] > 0
    head = CLIPLoRAWrapper(
        FederatedCLIPModel(str(small_clip_folder), 3), LoRAConfig.for_classification_head(r=8, lora_alpha=16)
    ).apply_lora_to_federated_model()
    assert len(head.get_parameters()) == 2
    built = create_model(
        {"model": {"type": "clip_lora", "model_name": str(small_clip_folder), "num_classes": 3}}
    )
    assert isinstance(built, CLIPLoRAWrapper)


def test_the_documented_defaults_hold() -> None:
    documented = {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": None,
        "bias": "none",
        "save_only_trainable": True,
    }
    assert documented.items() <= LoRAConfig().model_dump().items()
    assert LoRAConfig.for_clip_model() == LoRAConfig.for_clip_model(r=16, lora_alpha=32)
    head = LoRAConfig.for_classification_head()
    assert (head.r, head.lora_alpha, head.target_components) == (8, 16, ["classifier"])
    parameters = inspect.signature(FederatedCLIPModel).parameters
    assert parameters["model_name"].default == "openai/clip-vit-base-patch32"
    assert parameters["num_classes"].default == 10
    assert sorted(lora.__all__) == lora.__all__
    assert all(hasattr(lora, name) for name in lora.__all__)


def test_the_documented_configuration_builds_a_wrapper() -> None:
    wrapper = create_model(find_config("clip_lora"), pretrained=False, device="meta", task="retrieval")
    assert isinstance(wrapper, CLIPLoRAWrapper)
    assert wrapper.target_components == ["encoder"]
    assert count_parameters(wrapper)["adapter"] == 491_520  # q, v of both towers at r=8


def test_towers_and_layers_are_chosen_one_by_one(
    small_clip_folder: Path, pixel_batch: dict[str, torch.Tensor]
) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), 3, task="retrieval")
    settings = {"r": 4, "layers": [1], "text": {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0}}
    inject_lora(model, LoRAConfig(**settings, vision={"lora_dropout": 0.3}))
    report = check_lora_injection(model)
    ranks = {(b.tower, b.block): set(b.ranks.values()) for b in report.blocks}
    assert ranks == {("vision", 0): set(), ("vision", 1): {4}, ("text", 0): set(), ("text", 1): {2}}
    enable_gradient_checkpointing(model)
    tokens = model.tokenize(["cat", "dog", "red car"] * 4)
    model.task.loss(model, {"pixel_values": pixel_batch["pixel_values"], **tokens}).backward()
    disable_gradient_checkpointing(model)
    assert verify_gradients(model)


def test_full_checkpoints_and_files_of_hand_written_code_are_read(
    small_clip_folder: Path, pixel_batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    data = pixel_batch["pixel_values"]
    wrapper = quick_clip_lora(str(small_clip_folder), 3, r=2, lora_alpha=4)
    wrapper.train_step(data, pixel_batch["labels"])
    save_full_checkpoint(wrapper, tmp_path / "full", epoch=3)
    fresh = FederatedCLIPModel(str(small_clip_folder), 3)
    assert load_full_checkpoint(fresh, tmp_path / "full")["epoch"] == 3
    torch.testing.assert_close(fresh.encode_image(data), wrapper.encode_image(data), rtol=0, atol=0)
    assert isinstance(merge_and_unload(fresh), FederatedCLIPModel)

    width = 32
    key = "transformer.resblocks.0.lora_q"
    factors = {f"{key}.lora_A": torch.ones(2, width), f"{key}.lora_B": torch.ones(width, 2)}
    torch.save(
        {"lora_state_dict": factors, "lora_config": {"r": 2, "lora_alpha": 4}}, tmp_path / "documented.pt"
    )
    other = FederatedCLIPModel(str(small_clip_folder), 3)
    load_lora_adapters(other, tmp_path / "documented.pt")
    assert count_parameters(other)["by_tower"] == {"vision": 0, "text": 2 * 2 * width, "head": 0}

"""A user's script, as the documentation gives it: every public name imports and works together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora import (
    LoRAConfig,
    apply_lora_to_text_encoder,
    check_lora_injection,
    count_parameters,
    disable_lora,
    enable_lora,
    get_lora_state_dict,
    load_lora_adapters,
    merge_lora,
    quick_clip_lora,
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
    text = apply_lora_to_text_encoder(FederatedCLIPModel(str(small_clip_folder), 3))
    assert count_parameters(text)["by_tower"]["text"] == count_parameters(text)["adapter"] > 0
    head = CLIPLoRAWrapper(
        FederatedCLIPModel(str(small_clip_folder), 3), LoRAConfig.for_classification_head(r=8, lora_alpha=16)
    ).apply_lora_to_federated_model()
    assert len(head.get_parameters()) == 2
    built = create_model(
        {"model": {"type": "clip_lora", "model_name": str(small_clip_folder), "num_classes": 3}}
    )
    assert isinstance(built, CLIPLoRAWrapper)

"""The documented user's script: every line is a row of what must work exactly as written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from federated import Predictor
from federated.config.config_files import parse_config
from lora import (
    LoRAConfig,
    LoRALayer,
    MultiTaskCLIP,
    add_lora_to_attention_block,
    apply_lora_to_text_encoder,
    check_lora_injection,
    create_model,
    load_lora_adapters,
    load_model_with_lora,
    print_parameter_stats,
    quick_clip_lora,
    save_lora_adapters,
    verify_gradients,
)
from lora.adapters import adapter_parameters
from lora.injection import inject_lora
from models.clip import FederatedCLIPModel
from tests.lora_models import disturb, outputs, small_clip

CONFIG = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1}


class Block(nn.Module):
    """A residual attention block of ViT-B-32's text tower, as far as adapters see it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(512, 8, batch_first=True)


def test_the_documented_script_runs_as_written(  # noqa: PLR0915 - one script
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])

    model = quick_clip_lora(model_name="tiny", num_classes=3, lora_r=16)
    assert model.lora_config.r == 16 == quick_clip_lora("tiny", 3, r=16).lora_config.r

    clip: Any = FederatedCLIPModel("tiny", task="zero_shot", class_names=["a", "b"], num_classes=2)
    blocks = clip.num_blocks["text"]
    assert apply_lora_to_text_encoder(clip, 16, 16, 0.1, None) == blocks
    by_config: Any = FederatedCLIPModel("tiny", task="retrieval")
    assert apply_lora_to_text_encoder(by_config, config=LoRAConfig(r=2)) == blocks

    section = {"type": "clip_lora", "model_name": "tiny", "num_classes": 3}
    for config in (
        {"model": section, "lora": {"r": 4}},
        SimpleNamespace(model=SimpleNamespace(**section), lora=SimpleNamespace(r=4)),
        parse_config({"model": section, "lora": {"r": 4}}, source="a loaded configuration"),
    ):
        assert create_model(config).lora_config.r == 4
    assert create_model("clip_lora", model_name="tiny", num_classes=3).is_applied

    lora_config = LoRAConfig()
    lora_config.save_only_trainable = True

    layer = LoRALayer(6, 4, r=16, lora_alpha=16, lora_dropout=0.1)
    assert (layer.lora_A.shape, layer.lora_B.shape, layer.scaling) == ((16, 6), (4, 16), 1.0)
    assert layer.enabled
    assert not layer.merged
    layer.reset_parameters()

    block: Any = Block()
    assert add_lora_to_attention_block(
        block, r=16, lora_alpha=16, lora_dropout=0.1, target_modules=["in_proj", "out_proj"]
    )
    parts = (block.lora_q, block.lora_k, block.lora_v, block.lora_out)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 65_536  # 12 blocks: 786,432
    assert block.lora_enabled_in_proj
    assert block.lora_enabled_out_proj

    before = clip.encode_text(["a dress"])
    clip.load_lora_state_dict({name: torch.ones_like(t) for name, t in clip.get_lora_state_dict().items()})
    changed = clip.encode_text(["a dress"])
    assert not torch.allclose(changed, before)
    clip.merge_lora()
    clip.unmerge_lora()
    clip.disable_lora()
    torch.testing.assert_close(clip.encode_text(["a dress"]), before, rtol=1e-3, atol=1e-3)
    clip.enable_lora()
    torch.testing.assert_close(clip.encode_text(["a dress"]), changed, rtol=1e-3, atol=1e-3)
    clip.lock_image_tower()
    clip.lock_text_tower()
    clip.set_grad_checkpointing(True)
    assert {n for n, p in clip.named_parameters() if p.requires_grad} <= {
        f"{n.removesuffix('.weight')}.default.weight" for n in adapter_parameters(clip)
    }
    assert model.get_lora_state_dict().keys() == model.federated_model.get_lora_state_dict().keys()

    stats = print_parameter_stats(clip)
    assert stats["lora"] == stats["trainable"] < stats["total"]
    assert f"{stats['total']:,}" in capsys.readouterr().out

    content = {"epoch": 32, "lora_state_dict": clip.get_lora_state_dict(), "lora_config": CONFIG}
    torch.save({**content, "model_name": "tiny"}, "lora_epoch_32.pt")
    again: Any = load_model_with_lora("lora_epoch_32.pt")
    torch.testing.assert_close(again.encode_text(["a dress"]), changed, rtol=1e-3, atol=1e-3)

    tasks = MultiTaskCLIP("tiny")
    tasks.load_task("fashion", "lora_epoch_32.pt")
    assert tasks.current_task == "fashion"
    torch.testing.assert_close(tasks.encode_text(["a dress"]), changed, rtol=1e-3, atol=1e-3)
    tasks.load_task(None)
    torch.testing.assert_close(tasks.encode_text(["a dress"]), before, rtol=1e-5, atol=1e-5)
    assert tasks.encode_image(images).shape == (4, tasks.model.embedding_dim)

    assert check_lora_injection(model)
    model = quick_clip_lora("tiny", 3, target_components=["vision"])
    loss = model.train_step(images, labels, learning_rate=1e-3)
    assert loss > 0
    assert verify_gradients(model)
    assert model(images).shape == model.federated_model(images).shape == (4, 3)
    assert clip(images).shape == (4, 2)

    predictor = Predictor("tiny", ["a shoe", "a bag", "a coat"])
    predictions = predictor.predict_batch([Image.new("RGB", (40, 40), "red")] * 2, top_k=5)
    assert [len(row.class_names) for row in predictions] == [3, 3]
    assert sum(predictions[0].probabilities) == pytest.approx(1)

    patches = model.encode_image(images, patches=True)
    assert patches.shape == (4, 16, 128)
    assert load_lora_adapters(FederatedCLIPModel("tiny", 3), save_lora_adapters(model, "adapter"))


@pytest.mark.parametrize("layout", ["adapters alone", "every weight"])
def test_documented_checkpoints_go_into_open_clip_and_hugging_face_models(
    layout: str, tmp_path: Path
) -> None:
    trained = small_clip("fused")
    targets = ["in_proj", "out_proj"]
    inject_lora(trained, LoRAConfig(**CONFIG, target_modules=targets, target_components=["text"]))
    disturb(trained)
    state = trained.state_dict()
    factors = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    assert "transformer.resblocks.0.lora_q.lora_A" in factors
    content: dict[str, Any] = {"epoch": 3, "lora_config": CONFIG}
    content |= {"lora_state_dict": factors}
    if layout == "every weight":
        content = {"epoch": 3, "state_dict": state, "optimizer": {}, "lora_config": CONFIG}
    torch.save(content, tmp_path / "epoch_3.pt")
    fused, other = small_clip("fused"), small_clip("huggingface")
    load_lora_adapters(fused, tmp_path / "epoch_3.pt")
    torch.testing.assert_close(outputs(fused), outputs(trained))
    if layout == "adapters alone":
        assert load_lora_adapters(other, tmp_path / "epoch_3.pt").metadata["epoch"] == 3
        assert len(adapter_parameters(other)) == len(factors)

"""models.open_clip_backend: the same door, the same numbers as the Hugging Face towers.

Skipped where open_clip (an optional extra) is not installed, save for the error that says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from models.clip import FederatedCLIPModel
from models.clip_loading import load_clip
from models.errors import UserError

ARCHITECTURE = "fedlora-test"
WIDTH, LAYERS, EMBED_DIM, IMAGE_SIZE, PATCH_SIZE = 64, 2, 24, 32, 16


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr("models.open_clip_backend.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt '\.\[open-clip\]' in the clone"):
        load_clip("open_clip:ViT-B-32", pretrained=False)


@pytest.fixture(scope="module")
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A name in open_clip's registry for a small ViT CLIP with its full vocabulary."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": EMBED_DIM,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": 32,
            "patch_size": PATCH_SIZE,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
    }
    folder = tmp_path_factory.mktemp("open_clip_configs")
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return f"open_clip:{ARCHITECTURE}"


def _huggingface_twin() -> CLIPModel:
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "projection_dim": EMBED_DIM,
    }
    vision = {**tower, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(text_config=tower, vision_config=vision, projection_dim=EMBED_DIM)
        ).eval()
        for parameter in model.parameters():  # away from the zeros and ones of biases and norms
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def _copy(target: nn.Module | Tensor, source: nn.Module | Tensor) -> None:
    if isinstance(source, Tensor):
        target.data.copy_(source)
        return
    target.load_state_dict(source.state_dict())


def _copy_block(target: nn.Module, source: nn.Module) -> None:
    """One transformer block: open_clip stacks q, k and v in one matrix."""
    attention = source.self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    target.attn.in_proj_weight.data.copy_(torch.cat([part.weight for part in parts]))
    target.attn.in_proj_bias.data.copy_(torch.cat([part.bias for part in parts]))
    for ours, theirs in (
        (target.attn.out_proj, attention.out_proj),
        (target.ln_1, source.layer_norm1),
        (target.ln_2, source.layer_norm2),
        (target.mlp.c_fc, source.mlp.fc1),
        (target.mlp.c_proj, source.mlp.fc2),
    ):
        _copy(ours, theirs)


def _copy_weights(target: nn.Module, source: CLIPModel) -> None:
    """Hugging Face weights into an open_clip model of the same architecture."""
    vision, text = source.vision_model, source.text_model
    for ours, theirs in (
        (target.visual.class_embedding, vision.embeddings.class_embedding),
        (target.visual.conv1, vision.embeddings.patch_embedding),
        (target.visual.positional_embedding, vision.embeddings.position_embedding.weight),
        (target.visual.ln_pre, vision.pre_layrnorm),
        (target.visual.ln_post, vision.post_layernorm),
        (target.visual.proj, source.visual_projection.weight.T),
        (target.token_embedding, text.embeddings.token_embedding),
        (target.positional_embedding, text.embeddings.position_embedding.weight),
        (target.ln_final, text.final_layer_norm),
        (target.text_projection, source.text_projection.weight.T),
        (target.logit_scale, source.logit_scale),
    ):
        _copy(ours, theirs)
    for ours_blocks, their_blocks in (
        (target.visual.transformer.resblocks, vision.encoder.layers),
        (target.transformer.resblocks, text.encoder.layers),
    ):
        for ours, theirs in zip(ours_blocks, their_blocks, strict=True):
            _copy_block(ours, theirs)


def test_both_backends_give_the_same_features_for_the_same_weights(small_architecture: str) -> None:
    loaded, twin = load_clip(small_architecture, pretrained=False), _huggingface_twin()
    _copy_weights(loaded.clip, twin)
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    tokens = loaded.tokenize(["a photo of a cat", "two dogs and a red car in the snow", "cat"])
    with torch.no_grad():
        theirs = twin(pixel_values=pixels, **tokens)
        images, texts = loaded.encode_image(loaded.clip, pixels), loaded.encode_text(loaded.clip, tokens)
    torch.testing.assert_close(
        nn.functional.normalize(images, dim=-1), theirs.image_embeds, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        nn.functional.normalize(texts, dim=-1), theirs.text_embeds, atol=1e-5, rtol=1e-4
    )
    assert sum(p.numel() for p in loaded.clip.parameters()) == sum(p.numel() for p in twin.parameters())


def test_trimmed_texts_have_the_embedding_of_open_clips_own_encoder(small_architecture: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    loaded = load_clip(small_architecture, pretrained=False)
    texts = ["a cat", "a rather longer text about a dog on a red car"]
    with torch.no_grad():
        own = loaded.clip.encode_text(open_clip.get_tokenizer(ARCHITECTURE)(texts))
        ours = loaded.encode_text(loaded.clip, loaded.tokenize(texts))
    assert loaded.tokenize(texts)["input_ids"].shape[1] < 20
    torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-4)


def test_images_are_processed_as_open_clip_does_up_to_a_pixel_of_odd_margins(small_architecture: str) -> None:
    transform = pytest.importorskip("open_clip.transform")
    loaded = load_clip(small_architecture, pretrained=False)
    theirs = transform.image_transform_v2(
        transform.PreprocessCfg(**loaded.clip.visual.preprocess_cfg), is_train=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    torch.testing.assert_close(loaded.preprocess(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_the_towers_cover_every_parameter_but_the_temperature(small_architecture: str) -> None:
    loaded = load_clip(small_architecture, pretrained=False)
    outside = [n for n, _ in loaded.clip.named_parameters() if loaded.towers.tower_of(n) is None]
    assert outside == ["logit_scale"]


def test_random_weights_follow_the_seed(small_architecture: str) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (load_clip(small_architecture, pretrained=False, seed=s).clip for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.visual.proj, again.visual.proj)
    assert not torch.equal(one.visual.proj, other.visual.proj)


@pytest.mark.parametrize("task", ["classification", "zero_shot"])
def test_a_federated_model_trains_on_open_clip_towers(small_architecture: str, task: str) -> None:
    model = FederatedCLIPModel(
        small_architecture, 2, class_names=("cat", "dog"), task=task, strategy="full", pretrained=False
    )
    pixels = torch.randn(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 2
    assert model.evaluate(pixels, labels)["accuracy"] == model.zero_shot_accuracy(
        [{"pixel_values": pixels, "labels": labels}]
    )
    losses = [model.train_step(pixels, labels) for _ in range(15)]
    assert losses[-1] < losses[0]


def test_an_unknown_architecture_gets_the_nearest_names() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match="ViT-B-32"):
        load_clip("open_clip:ViT-B32", pretrained=False)


def test_pretrained_without_a_tag_lists_the_tags() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match="laion2b_s34b_b79k"):
        load_clip("open_clip:ViT-B-32")


def test_an_unknown_tag_is_refused() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match="no file and no tag"):
        load_clip("open_clip:ViT-B-32?pretrained=nothing")


def test_weights_load_from_a_file(small_architecture: str, tmp_path: Path) -> None:
    source = load_clip(small_architecture, pretrained=False, seed=5)
    torch.save(source.clip.state_dict(), tmp_path / "weights.pt")
    loaded = load_clip(f"{small_architecture}?pretrained={tmp_path / 'weights.pt'}")
    assert torch.equal(loaded.clip.visual.proj, source.clip.visual.proj)


def test_base_patch32_has_the_same_count_as_openais() -> None:
    pytest.importorskip("open_clip")
    clip = load_clip("open_clip:ViT-B-32", pretrained=False, device="meta").clip
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313

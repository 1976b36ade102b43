"""models.clip_loading and models.images: what each kind of model name gives, and what goes wrong how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from models.clip_loading import HUGGINGFACE_TOWERS, TINY_FOLDER, load_clip
from models.errors import UserError
from models.hub_tokenizer import TokenizerMissingError
from models.images import ImageProcessor

VIT_B32 = "openai/clip-vit-base-patch32"
has_tiny = pytest.mark.skipif(
    not (TINY_FOLDER / "model.safetensors").is_file(), reason="no bundled checkpoint"
)


def _noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# Architectures, counts


@pytest.mark.parametrize(
    ("name", "parameters"),
    # openai/CLIP's published architectures; B/32 and B/16 are also open_clip's counts.
    [(VIT_B32, 151_277_313), ("openai/clip-vit-base-patch16", 149_620_737)],
)
def test_openai_architectures_need_no_network_and_have_the_exact_parameter_count(
    name: str, parameters: int
) -> None:
    loaded = load_clip(name, pretrained=False, device="meta")
    assert sum(p.numel() for p in loaded.clip.parameters()) == parameters


def test_base_patch32_has_the_published_count_in_each_part() -> None:
    clip = load_clip(VIT_B32, pretrained=False, device="meta").clip
    counts = {"vision": 0, "text": 0, None: 0}
    for name, parameter in clip.named_parameters():
        counts[HUGGINGFACE_TOWERS.tower_of(name)] += parameter.numel()
    assert counts == {"vision": 87_456_000 + 393_216, "text": 63_165_952 + 262_144, None: 1}


def test_large_patch14_has_the_embedding_width_and_image_size_of_the_paper() -> None:
    loaded = load_clip("openai/clip-vit-large-patch14-336", pretrained=False, device="meta")
    assert (loaded.embedding_dim, loaded.image_size) == (768, 336)


# Local folders


def test_a_local_folder_gives_the_features_of_plain_transformers(small_clip_folder: Path) -> None:
    loaded = load_clip(str(small_clip_folder))
    plain = CLIPModel.from_pretrained(small_clip_folder).eval()
    pixels = torch.randn(
        2, 3, loaded.image_size, loaded.image_size, generator=torch.Generator().manual_seed(0)
    )
    tokens = loaded.tokenize(["a cat", "a photo of a dog"])
    with torch.no_grad():
        outputs = plain(pixel_values=pixels, **tokens)
        images, texts = loaded.encode_image(loaded.clip, pixels), loaded.encode_text(loaded.clip, tokens)
    torch.testing.assert_close(torch.nn.functional.normalize(images, dim=-1), outputs.image_embeds)
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=-1), outputs.text_embeds)


def test_padding_to_the_longest_text_changes_no_embedding(small_clip_folder: Path) -> None:
    loaded = load_clip(str(small_clip_folder))
    with torch.no_grad():
        alone = loaded.encode_text(loaded.clip, loaded.tokenize(["a cat"]))
        padded = loaded.encode_text(loaded.clip, loaded.tokenize(["a cat", "a photo of a big red car ."]))
    torch.testing.assert_close(padded[:1], alone, atol=1e-6, rtol=1e-5)


def test_long_texts_are_cut_to_the_context_and_keep_their_end_token(small_clip_folder: Path) -> None:
    loaded = load_clip(str(small_clip_folder))
    tokens = loaded.tokenize(["cat " * 100])
    assert tokens["input_ids"].shape == (1, 12)
    assert int(tokens["input_ids"][0, -1]) == loaded.clip.config.text_config.eos_token_id


def test_random_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone(
    small_clip_folder: Path,
) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (load_clip(str(small_clip_folder), pretrained=False, seed=s).clip for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    key = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(one.get_parameter(key), again.get_parameter(key))
    assert not torch.equal(one.get_parameter(key), other.get_parameter(key))


@has_tiny
def test_tiny_loads_offline_and_its_control_has_the_same_shapes_with_other_weights() -> None:
    tiny, control = load_clip("tiny"), load_clip("tiny", pretrained=False)
    shapes = {name: p.shape for name, p in tiny.clip.named_parameters()}
    assert shapes == {name: p.shape for name, p in control.clip.named_parameters()}
    key = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tiny.clip.get_parameter(key), control.clip.get_parameter(key))
    assert torch.equal(tiny.tokenize(["a cat"])["input_ids"], control.tokenize(["a cat"])["input_ids"])


def test_dtype_is_that_of_the_weights(small_clip_folder: Path) -> None:
    clip = load_clip(str(small_clip_folder), dtype=torch.bfloat16).clip
    assert {p.dtype for p in clip.parameters()} == {torch.bfloat16}


# Errors


def test_an_unreachable_hub_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.clip_loading._local_only", lambda source: True)
    with pytest.raises(UserError) as caught:
        load_clip("nobody/no-such-clip")
    for part in (
        "nobody/no-such-clip",
        "hub cannot be reached",
        "folder",
        "model_name=tiny",
        "pretrained=false",
    ):
        assert part in str(caught.value)


def test_the_hub_is_not_asked_for_a_local_folder(
    small_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    monkeypatch.setattr("models.clip_loading.HfApi.model_info", lambda *args, **kwargs: requests.append(args))
    loaded = load_clip(str(small_clip_folder))
    loaded.tokenize(["a cat"])
    assert not requests


def test_an_unknown_architecture_without_weights_lists_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.clip_loading._local_only", lambda source: True)
    with pytest.raises(UserError, match=VIT_B32):
        load_clip("nobody/no-such-clip", pretrained=False)


def test_a_missing_tokenizer_is_an_error_of_tokenize_not_of_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.clip_loading._local_only", lambda source: True)
    monkeypatch.setattr("models.hub_tokenizer.AutoTokenizer.from_pretrained", _raise_os_error)
    loaded = load_clip(VIT_B32, pretrained=False, device="meta")
    with pytest.raises(TokenizerMissingError, match=r"tokenizer\.json"):
        loaded.tokenize(["a cat"])


def _raise_os_error(*args: object, **kwargs: object) -> None:
    raise OSError("not in the cache")


def test_a_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_clip(str(tmp_path / "absent"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_clip(str(tmp_path))


def test_a_folder_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert'"):
        load_clip(str(tmp_path))


def _copy_with_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["vision_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_weights_that_lack_a_layer_are_refused_and_the_layer_named(
    small_clip_folder: Path, tmp_path: Path
) -> None:
    folder = _copy_with_config(small_clip_folder, tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"layers\.2"):
        load_clip(str(folder))


def test_weights_of_other_shapes_are_refused(small_clip_folder: Path, tmp_path: Path) -> None:
    folder = _copy_with_config(small_clip_folder, tmp_path / "wider", intermediate_size=80)
    with pytest.raises(UserError, match=r"fit config\.json"):
        load_clip(str(folder))


def test_a_truncated_weights_file_is_refused(small_clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(small_clip_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        load_clip(str(folder))


# Images


@pytest.mark.parametrize("size", [(28, 28), (16, 16), (40, 25), (25, 40), (17, 90), (8, 11)])
@pytest.mark.parametrize("settings", [{}, {"size": {"height": 24, "width": 20}}, {"do_normalize": False}])
def test_images_are_processed_as_transformers_does(
    size: tuple[int, int], settings: dict[str, object]
) -> None:
    defaults = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    theirs = CLIPImageProcessorPil(**{**defaults, **settings})
    image = _noise(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageProcessor.from_settings(theirs)(image), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "LA"])
def test_images_of_any_mode_become_three_channels(mode: str, small_clip_folder: Path) -> None:
    loaded = load_clip(str(small_clip_folder))
    pixels = loaded.preprocess(_noise(20, 30, mode))
    assert (pixels.shape, pixels.dtype) == ((3, loaded.image_size, loaded.image_size), torch.float32)


def test_processing_is_deterministic_and_leaves_the_image_alone(small_clip_folder: Path) -> None:
    preprocess, image = load_clip(str(small_clip_folder)).preprocess, _noise(20, 30)
    before = image.tobytes()
    assert torch.equal(preprocess(image), preprocess(image))
    assert image.tobytes() == before

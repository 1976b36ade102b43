"""Several adapters on one base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora.adapter_saving import save_lora_adapters
from lora.adapters import (
    adapter_parameters,
    get_lora_state_dict,
)
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_lora_adapters
from lora.named import (
    active_adapter,
    compare_embeddings,
    list_adapters,
    load_named_adapter,
    remove_adapter,
    set_active_adapter,
)
from lora.switching import (
    merge_lora,
    unmerge_lora,
)
from models.clip import FederatedCLIPModel
from models.errors import UserError
from tests.lora_models import BACKENDS, disturb, outputs, small_clip

CONFIGS = {  # different layers, towers and ranks
    "wide": LoRAConfig(r=4),
    "text": LoRAConfig(r=2, target_components=["text"], lora_alpha=7),
    "last": LoRAConfig(r=3, layers=[1]),
}


def save_all(folder: Path, backend: str) -> dict[str, torch.Tensor]:
    """Save one adapter per config; name -> what a model with this adapter alone gives."""
    expected = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = small_clip(backend)
        inject_lora(model, config)
        disturb(model, seed=seed + 10)
        save_lora_adapters(model, folder / name)
        expected[name] = outputs(model)
    return expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_adapter_acts_as_if_it_were_alone(backend: str, tmp_path: Path) -> None:
    expected = save_all(tmp_path, backend)
    model = small_clip(backend)
    base = outputs(model)
    for name in CONFIGS:
        load_named_adapter(model, tmp_path / name, name)
        assert torch.equal(outputs(model), base)  # nothing is active before it is chosen
    assert list_adapters(model) == sorted(CONFIGS)
    for name in ("wide", "text", "last", "wide"):
        set_active_adapter(model, name)
        assert active_adapter(model) == name
        torch.testing.assert_close(outputs(model), expected[name], rtol=0, atol=1e-6)
        set_active_adapter(model, None)
        assert active_adapter(model) is None
        assert torch.equal(outputs(model), base)


def test_memory_is_one_base_plus_the_adapters(tmp_path: Path) -> None:
    save_all(tmp_path, "huggingface")
    model = small_clip()
    base_size = sum(p.numel() for p in model.parameters())
    for name in CONFIGS:
        load_named_adapter(model, tmp_path / name, name)
    extra = sum(p.numel() for name in CONFIGS for p in adapter_parameters(model, name).values())
    assert sum(p.numel() for p in model.parameters()) == base_size + extra


def test_the_default_adapter_still_trains_and_travels_alone(
    small_clip_folder: Path, tmp_path: Path, pixel_batch: dict[str, torch.Tensor]
) -> None:
    def build() -> CLIPLoRAWrapper:
        model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=("cat", "dog", "red car"))
        config = LoRAConfig(r=2, lora_dropout=0.0, target_components=["vision"])
        return CLIPLoRAWrapper(model, config).apply_lora_to_federated_model()

    served = build()
    served.train_step(pixel_batch)
    save_lora_adapters(served, tmp_path)
    wrapper, alone = build(), build()
    names = wrapper.exchanged_names
    load_named_adapter(wrapper, tmp_path, "served")
    assert active_adapter(wrapper) == "default"
    assert wrapper.exchanged_names == names
    before = get_lora_state_dict(wrapper, "served")
    assert [wrapper.train_step(pixel_batch) for _ in range(2)] == [
        alone.train_step(pixel_batch) for _ in range(2)
    ]
    assert all(torch.equal(t, before[n]) for n, t in get_lora_state_dict(wrapper, "served").items())
    set_active_adapter(wrapper, "served")
    set_active_adapter(wrapper, "default")
    assert [
        n for n, p in wrapper.federated_model.named_parameters() if p.requires_grad and "served" in n
    ] == []
    assert all(
        torch.equal(a, b)
        for a, b in zip(wrapper.get_state().values(), alone.get_state().values(), strict=True)
    )


def test_class_embeddings_follow_the_active_adapter(small_clip_folder: Path, tmp_path: Path) -> None:
    def build() -> FederatedCLIPModel:
        return FederatedCLIPModel(
            str(small_clip_folder), 3, class_names=("cat", "dog", "red car"), strategy="head_only"
        )

    trained = build()
    inject_lora(trained, LoRAConfig(r=2, target_components=["text"]))
    disturb(trained)
    save_lora_adapters(trained, tmp_path)
    model = build()
    base = model.class_embeddings()
    load_named_adapter(model, tmp_path, "a")
    set_active_adapter(model, "a")
    torch.testing.assert_close(model.class_embeddings(), trained.class_embeddings().detach())
    set_active_adapter(model, None)
    assert torch.equal(model.class_embeddings(), base)


def test_embeddings_are_compared_example_by_example(
    small_clip_folder: Path, pixel_batch: dict[str, torch.Tensor]
) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=("cat", "dog", "red car"))
    inject_lora(model, LoRAConfig(r=2, target_components=["vision"]))
    texts = ["a photo of a cat", "the dog"]
    fresh = compare_embeddings(model, pixel_values=pixel_batch["pixel_values"], texts=texts)
    assert (fresh["image"].shape, fresh["text"].shape) == ((12,), (2,))
    torch.testing.assert_close(torch.cat(list(fresh.values())), torch.ones(14))
    disturb(model)
    adapted = model.encode_image(pixel_batch["pixel_values"])
    trained = compare_embeddings(model, pixel_values=pixel_batch["pixel_values"], texts=texts)
    assert (trained["image"] < 1 - 1e-4).all()
    torch.testing.assert_close(trained["text"], torch.ones(2))
    assert torch.equal(model.encode_image(pixel_batch["pixel_values"]), adapted)


def test_bad_names_files_and_states_are_refused_and_change_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, "huggingface")
    model = small_clip()
    load_lora_adapters(model, tmp_path / "wide")
    load_named_adapter(model, tmp_path / "text", "text")
    expected = outputs(model)

    def refuses(source: str, name: str, message: str, target: nn.Module = model) -> None:
        with pytest.raises(UserError, match=message):
            load_named_adapter(target, tmp_path / source, name)

    refuses("text", "text", "taken")
    refuses("text", "a.b", "taken or not")
    refuses("nowhere", "new", "no such folder")
    refuses("text", "new", "trained on base model", small_clip(seed=1))
    biased = small_clip()
    inject_lora(biased, LoRAConfig(bias="all"))
    save_lora_adapters(biased, tmp_path / "biased")
    refuses("biased", "new", "biases")
    with pytest.raises(UserError, match="no adapter 'new'"):
        set_active_adapter(model, "new")
    with pytest.raises(UserError, match="cannot remove"):
        remove_adapter(model, "default")
    merge_lora(model)
    with pytest.raises(UserError, match="merged"):
        set_active_adapter(model, "text")
    unmerge_lora(model)
    assert list_adapters(model) == ["default", "text"]
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)


def test_a_removed_adapter_leaves_the_others(tmp_path: Path) -> None:
    expected = save_all(tmp_path, "huggingface")
    model = small_clip()
    base = outputs(model)
    for name in CONFIGS:
        load_named_adapter(model, tmp_path / name, name)
    set_active_adapter(model, "wide")
    remove_adapter(model, "text")
    torch.testing.assert_close(outputs(model), expected["wide"], rtol=0, atol=1e-6)
    remove_adapter(model, "wide")
    assert torch.equal(outputs(model), base)
    assert list_adapters(model) == ["last"]
    set_active_adapter(model, "last")
    torch.testing.assert_close(outputs(model), expected["last"], rtol=0, atol=1e-6)

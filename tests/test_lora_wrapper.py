"""CLIPLoRAWrapper around a FederatedCLIPModel: the same verbs, less to send."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lora.adapter_saving import save_lora_adapters
from lora.adapters import (
    adapter_parameters,
    factor_pairs,
    scalings,
)
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.loading import load_lora_adapters
from lora.switching import (
    merge_lora,
)
from lora.verify import check_lora_injection, count_parameters, verify_gradients
from models.clip import FederatedCLIPModel
from models.errors import UserError

CLASS_NAMES = ("cat", "dog", "red car")
Batch = dict[str, torch.Tensor]


@pytest.fixture
def federated(small_clip_folder: Path) -> FederatedCLIPModel:
    return FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES)


def wrap(model: FederatedCLIPModel, *components: str, **settings: object) -> CLIPLoRAWrapper:
    config = LoRAConfig(**{"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, **settings})
    wrapper = CLIPLoRAWrapper(model, config, target_components=components or ("vision",))
    return wrapper.apply_lora_to_federated_model()


def test_only_adapters_and_head_travel(federated: FederatedCLIPModel) -> None:
    full = federated.exchanged_names
    wrapper = wrap(federated)
    assert wrapper.federated_model is federated
    names = wrapper.exchanged_names
    assert names == tuple(sorted(names))
    assert set(names) - set(adapter_parameters(wrapper)) == {"head.weight", "head.bias"}
    assert all(n.startswith("clip.vision_model.") for n in adapter_parameters(wrapper))
    assert len(names) < len(full)
    assert [p.shape for p in wrapper.get_parameters()] == [t.shape for t in wrapper.get_state().values()]
    assert {pair.module for pair in factor_pairs(names)} == set(scalings(wrapper))


def test_what_trains_is_what_travels(federated: FederatedCLIPModel) -> None:
    wrapper = wrap(federated, "encoder", bias="lora_only")
    trains = {n for n, p in federated.named_parameters() if p.requires_grad}
    assert {n.replace(".default", "") for n in trains} == set(wrapper.exchanged_names)
    assert "clip.vision_model.encoder.layers.0.self_attn.q_proj.base_layer.bias" in wrapper.exchanged_names
    counts = count_parameters(wrapper)
    assert counts["trainable"] == sum(counts["by_kind"].values())
    assert counts["trainable"] == sum(p.size for p in wrapper.get_parameters())


def test_a_frozen_head_stays_at_home(small_clip_folder: Path) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES, train_head=False)
    wrapper = wrap(model)
    assert set(wrapper.exchanged_names) == set(adapter_parameters(wrapper))
    assert not model.head.weight.requires_grad


def test_the_head_can_carry_an_adapter_instead(federated: FederatedCLIPModel, pixel_batch: Batch) -> None:
    before = federated.logits(pixel_batch).detach()
    wrapper = wrap(federated, "classifier")
    assert wrapper.exchanged_names == ("head.lora_A.weight", "head.lora_B.weight")
    assert torch.equal(wrapper.logits(pixel_batch), before)
    start = wrapper.get_state()
    wrapper.train_step(pixel_batch)
    assert not torch.equal(wrapper.get_state()["head.lora_B.weight"], start["head.lora_B.weight"])
    trained = wrapper.logits(pixel_batch)
    assert not torch.allclose(trained, before)
    wrapper.disable_lora_layers()
    assert torch.equal(wrapper.logits(pixel_batch), before)
    wrapper.enable_lora_layers()
    assert count_parameters(wrapper)["by_tower"] == {"vision": 0, "text": 0, "head": 2 * (24 + 3)}
    assert check_lora_injection(wrapper)
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged.logits(pixel_batch), trained, rtol=0, atol=1e-5)


def test_an_adapted_heads_bias_trains_with_the_other_biases(
    federated: FederatedCLIPModel, small_clip_folder: Path, pixel_batch: Batch, tmp_path: Path
) -> None:
    base = federated.logits(pixel_batch).detach()
    wrapper = wrap(federated, "vision", "classifier", bias="lora_only")
    assert "head.base_layer.bias" in wrapper.exchanged_names
    for _ in range(2):
        wrapper.train_step(pixel_batch)
    trained = wrapper.logits(pixel_batch).detach()
    save_lora_adapters(wrapper, tmp_path)
    other = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES)
    load_lora_adapters(other, tmp_path)
    assert torch.equal(other.logits(pixel_batch), trained)
    wrapper.disable_lora_layers()
    assert torch.equal(wrapper.logits(pixel_batch), base)


def test_wrappers_can_be_copied(federated: FederatedCLIPModel, pixel_batch: Batch) -> None:
    wrapper = wrap(federated)
    twin = copy.deepcopy(wrapper)
    twin.train_step(pixel_batch)
    assert not torch.equal(twin.logits(pixel_batch), wrapper.logits(pixel_batch))
    assert torch.equal(wrapper.logits(pixel_batch), federated.logits(pixel_batch))


def test_a_step_trains_adapters_and_head_and_nothing_else(
    federated: FederatedCLIPModel, pixel_batch: Batch
) -> None:
    wrapper = wrap(federated)
    frozen = {n: p.detach().clone() for n, p in federated.named_parameters() if not p.requires_grad}
    losses = [wrapper.train_step(pixel_batch["pixel_values"], pixel_batch["labels"]) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in federated.named_parameters() if n in frozen)
    metrics = wrapper.evaluate(pixel_batch)
    assert set(metrics) >= {"loss", "accuracy", "num_examples"}


def test_both_towers_get_gradients_where_the_task_uses_both(
    small_clip_folder: Path, pixel_batch: Batch
) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES, task="zero_shot")
    wrapper = wrap(model, "encoder")
    wrapper.enable_gradient_checkpointing()
    model.task.loss(model, pixel_batch).backward()
    report = verify_gradients(wrapper)
    assert report, str(report)
    wrapper.disable_gradient_checkpointing()


def test_text_adapters_that_the_task_cannot_train_are_warned_about(
    federated: FederatedCLIPModel, caplog: pytest.LogCaptureFixture
) -> None:
    wrap(federated, "encoder")
    assert "text tower" in caplog.text


def test_parameters_of_one_model_make_another_the_same(small_clip_folder: Path, pixel_batch: Batch) -> None:
    first, second = (
        wrap(FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES)) for _ in range(2)
    )
    first.train_step(pixel_batch)
    second.set_parameters(first.get_parameters())
    assert torch.equal(first.logits(pixel_batch), second.logits(pixel_batch))
    for sent, received in zip(first.get_parameters(), second.get_parameters(), strict=True):
        np.testing.assert_array_equal(sent, received)
    state = {name: torch.zeros_like(t) for name, t in first.get_state().items()}
    second.set_state(state)
    second.set_state({"head.bias": torch.ones(3)}, partial=True)
    assert second.head.bias.tolist() == [1, 1, 1]


def test_parameters_travel_unchanged_while_lora_is_switched_off(
    federated: FederatedCLIPModel, pixel_batch: Batch
) -> None:
    wrapper = wrap(federated, bias="all")
    wrapper.train_step(pixel_batch)
    sent = wrapper.get_parameters()
    wrapper.disable_lora_layers()
    for switched_off, on in zip(wrapper.get_parameters(), sent, strict=True):
        np.testing.assert_array_equal(switched_off, on)


def test_merging_for_good_returns_the_plain_model_and_its_old_exchange(
    federated: FederatedCLIPModel, pixel_batch: Batch
) -> None:
    names = federated.exchanged_names
    trains = [n for n, p in federated.named_parameters() if p.requires_grad]
    wrapper = wrap(federated)
    wrapper.train_step(pixel_batch)
    logits = wrapper.logits(pixel_batch).detach()
    merged = wrapper.merge_and_unload()
    assert merged is federated
    assert not wrapper.is_applied
    assert merged.exchanged_names == names
    assert [n for n, p in merged.named_parameters() if p.requires_grad] == trains
    torch.testing.assert_close(merged.logits(pixel_batch), logits, rtol=0, atol=1e-5)
    merged.train_step(pixel_batch)


def test_a_step_on_merged_or_disabled_adapters_is_refused(
    federated: FederatedCLIPModel, pixel_batch: Batch
) -> None:
    wrapper = wrap(federated)
    merge_lora(wrapper)
    with pytest.raises(UserError, match="merged or disabled"):
        wrapper.train_step(pixel_batch)
    wrapper.disable_lora_layers()
    with pytest.raises(UserError, match="merged or disabled"):
        wrapper.train_step(pixel_batch)


def test_not_enabled_leaves_the_model_as_it_is(federated: FederatedCLIPModel, pixel_batch: Batch) -> None:
    names = federated.exchanged_names
    wrapper = wrap(federated, enabled=False)
    assert not wrapper.is_applied
    assert wrapper.exchanged_names == names
    wrapper.train_step(pixel_batch)
    assert wrapper.merge_and_unload() is federated


def test_everything_else_is_the_federated_models_own(federated: FederatedCLIPModel) -> None:
    wrapper = wrap(federated)
    assert wrapper.clip is federated.clip
    assert wrapper.class_names == CLASS_NAMES
    assert torch.equal(wrapper.class_embeddings(), federated.class_embeddings())
    assert wrapper.target_components == ["vision"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = wrapper.no_such_thing


def test_models_without_a_clip_are_refused() -> None:
    with pytest.raises(UserError, match="FederatedCLIPModel"):
        CLIPLoRAWrapper(torch.nn.Linear(2, 2))


def test_a_half_precision_base_trains_adapters_and_head_in_float32(
    small_clip_folder: Path, pixel_batch: dict[str, torch.Tensor]
) -> None:
    model = FederatedCLIPModel(str(small_clip_folder), 3, strategy="lora", dtype=torch.bfloat16)
    config = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_components=["vision"])
    wrapper = CLIPLoRAWrapper(model, config).apply_lora_to_federated_model()
    exchanged = wrapper.exchanged_parameters
    assert {p.dtype for p in exchanged.values()} == {torch.float32}
    frozen = {p.dtype for name, p in wrapper.clip.named_parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    before = wrapper.get_state()
    data, labels = pixel_batch["pixel_values"], pixel_batch["labels"]
    losses = [wrapper.train_step(data, labels) for _ in range(15)]
    assert losses[-1] < losses[0]
    after = wrapper.get_state()
    assert all(not torch.equal(before[name], after[name]) for name in before)

"""FederatedCLIPModel: what trains, what travels, how the head starts, and what a step leaves alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import exchange
from models.clip import STRATEGIES, FederatedCLIPModel
from models.clip_loading import load_clip
from models.errors import UserError
from models.hub_tokenizer import TokenizerMissingError
from models.state import flat
from models.tasks import TASKS
from models.training import TrainingSettings

CLASS_NAMES = ("cat", "dog", "red car")
TEMPLATES = ("a photo of a {}.", "the {}")


@pytest.fixture
def build(small_clip_folder: Path):
    def make(**changes: object) -> FederatedCLIPModel:
        settings = {"num_classes": 3, "class_names": CLASS_NAMES, "templates": TEMPLATES, **changes}
        return FederatedCLIPModel(str(small_clip_folder), **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def paired_batch(pixel_batch: dict[str, Tensor], small_clip_folder: Path) -> dict[str, Tensor]:
    """Pixels with captions, as the retrieval task takes them."""
    captions = [f"a photo of {word} ." for word in ("cat", "dog", "tree")] * 4
    tokens = load_clip(str(small_clip_folder)).tokenize(captions)
    return {**pixel_batch, **tokens, "concept": pixel_batch["labels"]}


# The head and zero-shot classification


def test_the_untrained_head_reproduces_the_zero_shot_logits(build, pixel_batch) -> None:
    model = build()
    torch.testing.assert_close(model.logits(pixel_batch), model.zero_shot_logits(pixel_batch))


def test_zero_shot_logits_equal_a_hand_written_template_average(
    build, small_clip_folder, pixel_batch
) -> None:
    model, loaded = build(), load_clip(str(small_clip_folder))
    rows = []
    with torch.no_grad():
        for name in CLASS_NAMES:
            texts = [loaded.encode_text(loaded.clip, loaded.tokenize([t.format(name)])) for t in TEMPLATES]
            rows.append(torch.stack([(x / x.norm())[0] for x in texts]).mean(dim=0))
        images = loaded.encode_image(loaded.clip, pixel_batch["pixel_values"])
    weights = torch.stack([row / row.norm() for row in rows])
    images = images / images.norm(dim=1, keepdim=True)
    expected = loaded.clip.logit_scale.detach().exp() * images @ weights.T
    torch.testing.assert_close(model.zero_shot_logits(pixel_batch), expected, atol=1e-4, rtol=1e-4)


def test_accuracy_before_training_is_the_zero_shot_accuracy(build, pixel_batch) -> None:
    model = build()
    expected = float((model.zero_shot_logits(pixel_batch).argmax(1) == pixel_batch["labels"]).float().mean())
    assert model.evaluate(pixel_batch)["accuracy"] == pytest.approx(expected)
    assert model.zero_shot_accuracy([pixel_batch]) == pytest.approx(expected)


def test_zero_shot_accuracy_ignores_what_the_head_learned(build, pixel_batch) -> None:
    model = build(strategy="head_only")
    before = model.zero_shot_accuracy([pixel_batch])
    model.start_training(TrainingSettings(learning_rate=0.1), 5)
    for _ in range(5):
        model.train_step(pixel_batch)
    assert model.zero_shot_accuracy([pixel_batch]) == before


def test_the_head_is_affine_in_the_scaled_normalised_features(build, pixel_batch) -> None:
    model = build()
    nn.init.normal_(model.head.bias, generator=torch.Generator().manual_seed(0))
    features = F.normalize(model.encode_image(pixel_batch["pixel_values"]), dim=-1)
    expected = model.clip.logit_scale.exp() * (features @ model.head.weight.T) + model.head.bias
    torch.testing.assert_close(model.logits(pixel_batch), expected)


def test_class_embeddings_are_computed_once_while_the_text_tower_is_frozen(build) -> None:
    frozen, training = build(strategy="head_only"), build(strategy="full")
    assert frozen.class_embeddings() is frozen.class_embeddings()
    assert training.class_embeddings() is not training.class_embeddings()
    assert training.class_embeddings().requires_grad


def test_many_class_prompts_are_encoded_in_chunks_with_the_same_result(build, monkeypatch) -> None:
    at_once = build(strategy="head_only").class_embeddings()
    monkeypatch.setattr("models.prompts.MAX_PROMPTS", 4)
    torch.testing.assert_close(build(strategy="head_only").class_embeddings(), at_once)


def test_naming_a_text_parameter_for_exchange_drops_the_cached_class_embeddings(build) -> None:
    model = build(strategy="head_only")
    before = model.class_embeddings()
    model.set_exchanged(["clip.text_projection.weight"])
    state = model.get_state()
    model.set_state({name: torch.randn_like(value) for name, value in state.items()})
    assert not torch.allclose(model.class_embeddings(), before)


def test_class_embeddings_cached_during_a_bf16_step_are_in_full_precision(build, pixel_batch) -> None:
    cached, plain = (build(task="zero_shot", strategy="vision_and_projection") for _ in range(2))
    cached.start_training(TrainingSettings(precision="bf16"), 1)
    cached.train_step(pixel_batch)
    assert torch.equal(cached.class_embeddings(), plain.class_embeddings())


def test_without_class_names_the_head_starts_near_uniform_and_the_same_for_a_seed(build, pixel_batch) -> None:
    one, again, other = (build(class_names=None, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert float(one.logits(pixel_batch).detach().abs().max()) < 1.5
    with pytest.raises(UserError, match="class_names"):
        one.class_embeddings()


def test_random_weights_without_a_tokenizer_start_a_random_head_but_pretrained_ones_refuse(
    build, small_clip_folder, monkeypatch
) -> None:
    def no_tokenizer(*args: object) -> None:
        raise TokenizerMissingError("none here")

    monkeypatch.setattr("models.hub_tokenizer.HubTokenizer.__call__", no_tokenizer)
    assert build(pretrained=False).head.weight.shape == (3, 24)
    with pytest.raises(TokenizerMissingError):
        build()


# What trains and what travels


def _trained_parts(model: FederatedCLIPModel) -> set[str]:
    parts = set()
    for name in model.exchanged_names:
        is_head = name.startswith("head.")
        parts.add("head" if is_head else model.towers.tower_of(name.removeprefix("clip.")) or "temperature")
    return parts


@pytest.mark.parametrize(
    ("strategy", "task", "parts"),
    [
        ("full", "classification", {"vision", "text", "temperature", "head"}),
        ("full", "retrieval", {"vision", "text", "temperature"}),
        ("head_only", "classification", {"head"}),
        ("vision_and_projection", "classification", {"vision", "temperature", "head"}),
        ("vision_and_projection", "zero_shot", {"vision", "temperature"}),
        ("text_and_projection", "zero_shot", {"text", "temperature"}),
        ("text_and_projection", "retrieval", {"text", "temperature"}),
        ("lora", "classification", {"head"}),
        ("lora", "retrieval", set()),
    ],
)
def test_each_strategy_trains_exactly_what_it_says_and_sends_the_same(
    build, paired_batch, strategy: str, task: str, parts: set[str]
) -> None:
    model = build(strategy=strategy, task=task)
    assert _trained_parts(model) == parts
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert tuple(trainable) == model.exchanged_names
    if not parts:
        return
    TASKS[task].loss(model, paired_batch).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    beyond_the_loss = "clip.text_" if task == "classification" else "none"
    assert with_gradient == {name for name in trainable if not name.startswith(beyond_the_loss)}


def test_every_strategy_says_what_it_trains() -> None:
    assert all("train" in choice.summary and "travel" in choice.summary for choice in STRATEGIES.values())


@pytest.mark.parametrize("strategy", ["full", "vision_and_projection"])
def test_a_step_changes_what_trains_and_nothing_else(build, pixel_batch, strategy: str) -> None:
    model = build(strategy=strategy)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train_step(pixel_batch)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= set(model.exchanged_names)
    assert any(name.startswith("clip.vision_model") for name in changed)
    assert not any(name.startswith("clip.text") for name in changed)


def test_a_frozen_head_neither_trains_nor_travels(build) -> None:
    model = build(strategy="full", train_head=False)
    assert not any(name.startswith("head.") for name in model.exchanged_names)
    assert not any(p.requires_grad for p in model.head.parameters())


def test_exchanged_names_are_sorted_and_free_of_the_adapter_name(build) -> None:
    model = build(strategy="head_only")
    model.clip.add_module("extra", nn.ModuleDict({"default": nn.Linear(2, 2)}))
    model.set_exchanged(["head.weight", "clip.extra.weight"])
    assert model.exchanged_names == ("clip.extra.weight", "head.weight")
    assert torch.equal(model.get_state()["clip.extra.weight"], model.clip.extra["default"].weight)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"task": "detection"}, "classification"),
        ({"strategy": "prompt"}, "head_only"),
        ({"num_classes": 4}, "3 class names"),
        ({"templates": ("a photo",)}, "class name goes"),
        ({"templates": ()}, "at least one"),
        ({"strategy": "text_and_projection"}, "task=zero_shot"),
        ({"strategy": "head_only", "train_head": False}, "trains nothing"),
        ({"strategy": "head_only", "task": "retrieval"}, "trains nothing"),
        ({"num_classes": 0, "class_names": None}, "1 or more"),
        ({"strategy": "full", "dtype": torch.bfloat16}, "dtype float32"),
    ],
)
def test_contradicting_arguments_are_refused_with_the_remedy(build, changes, part: str) -> None:
    with pytest.raises(UserError, match=part):
        build(**changes)


def test_exchanging_a_name_the_model_lacks_is_refused(build) -> None:
    with pytest.raises(UserError, match=r"clip\.nothing"):
        build().set_exchanged(["clip.nothing"])


# State


def test_state_round_trips_between_two_models(build) -> None:
    source, target = build(strategy="full"), build(strategy="full", pretrained=False, seed=7)
    target.set_state(source.get_state())
    for name, value in target.get_state().items():
        assert torch.equal(value, source.get_state()[name])


def test_parameters_round_trip_in_the_order_of_the_names(build) -> None:
    model = build(strategy="full")
    arrays = model.get_parameters()
    assert [a.shape for a in arrays] == [tuple(model.get_state()[n].shape) for n in model.exchanged_names]
    changed = [np.float32(a + 1) for a in arrays]
    model.set_parameters(changed)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_parameters(), changed, strict=True))


@pytest.mark.parametrize("most", [0, 4_000_000])  # values that pass through memory of their own
def test_what_came_out_and_what_went_in_share_nothing_with_the_model(build, monkeypatch, most) -> None:
    monkeypatch.setattr(exchange, "_MAX_KEPT_VALUES", most)
    model = build()
    first = model.get_state()
    given = flat({name: torch.full_like(value, 2.0) for name, value in first.items()})
    before = first.vector.clone()
    model.set_state(given)
    second = model.get_state()
    model.set_state(flat({name: torch.zeros_like(value) for name, value in first.items()}))
    assert torch.equal(first.vector, before)
    assert (given.vector == 2.0).all()
    assert (second.vector == 2.0).all()
    assert not model.get_state().vector.any()


def test_the_state_is_a_copy_and_setting_it_writes_in_place(build) -> None:
    model = build(strategy="head_only")
    address = model.head.weight.data_ptr()
    state = model.get_state()
    state["head.weight"].zero_()
    assert float(model.head.weight.detach().abs().sum()) > 0
    model.set_state(state)
    assert model.head.weight.data_ptr() == address
    assert float(model.head.weight.detach().abs().sum()) == 0


def test_the_state_is_float32_whatever_the_models_dtype(build) -> None:
    model = build(dtype=torch.bfloat16, strategy="lora")
    model.set_exchanged(["clip.text_projection.weight", "head.weight"])
    assert {value.dtype for value in model.get_state().values()} == {torch.float32}


def test_a_wrong_shape_is_refused_by_key_and_nothing_is_written(build) -> None:
    model = build(strategy="head_only")
    before = model.get_state()
    wrong = {"head.bias": torch.ones(3), "head.weight": torch.zeros(4, 24)}
    with pytest.raises(UserError, match=r"head\.weight has shape \(4, 24\)"):
        model.set_state(wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.get_state().items())


def test_missing_and_unknown_keys_are_refused_by_name_unless_partial(build) -> None:
    model = build(strategy="head_only")
    with pytest.raises(UserError, match=r"missing: head\.weight"):
        model.set_state({"head.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"unknown: head\.wait"):
        model.set_state({**model.get_state(), "head.wait": torch.zeros(3)})
    model.set_state({"head.bias": torch.ones(3)}, partial=True)
    assert torch.equal(model.get_state()["head.bias"], torch.ones(3))


def test_a_wrong_number_of_arrays_is_refused(build) -> None:
    with pytest.raises(UserError, match="1 arrays given"):
        build(strategy="head_only").set_parameters([np.zeros(3, dtype=np.float32)])


# Training


def test_training_lowers_the_loss_and_evaluation_sees_it(build, pixel_batch) -> None:
    model = build(strategy="full")
    before = model.evaluate(pixel_batch)
    model.start_training(TrainingSettings(learning_rate=1e-3), 20)
    for _ in range(20):
        model.train_step(pixel_batch)
    after = model.evaluate(pixel_batch)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] > before["accuracy"]


def test_a_client_trains_the_same_whoever_trained_before_it(build, pixel_batch) -> None:
    settings = TrainingSettings(learning_rate=1e-2, schedule="cosine", weight_decay=0.1)
    shared, alone = build(strategy="full"), build(strategy="full")
    received = shared.get_state()
    other = {"pixel_values": pixel_batch["pixel_values"].flip(0), "labels": pixel_batch["labels"]}
    shared.start_training(settings, 3)
    for _ in range(3):
        shared.train_step(other)
    for model in (shared, alone):
        model.set_state(received)
        model.start_training(settings, 3)
        for _ in range(3):
            model.train_step(pixel_batch)
    mine, reference = shared.get_state(), alone.get_state()
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


@pytest.mark.parametrize("task", ["classification", "zero_shot"])
def test_micro_batches_give_the_whole_batchs_gradient_step(build, pixel_batch, task: str) -> None:
    states, losses = [], []
    for size in (None, 5):
        model = build(strategy="full", task=task)
        model.start_training(TrainingSettings(optimizer="sgd", learning_rate=1e-2, micro_batch_size=size), 1)
        losses.append(model.train_step(pixel_batch))
        states.append(model.get_state())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_retrieval_refuses_micro_batches_which_would_change_its_loss(build, paired_batch) -> None:
    model = build(strategy="full", task="retrieval")
    model.start_training(TrainingSettings(micro_batch_size=4), 1)
    with pytest.raises(UserError, match="micro_batch_size=4"):
        model.train_step(paired_batch)


@pytest.mark.parametrize("task", ["classification", "zero_shot", "retrieval"])
def test_bf16_trains_close_to_float32(build, paired_batch, task: str) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = build(strategy="full", task=task)
        model.start_training(TrainingSettings(precision=precision), 3)
        losses[precision] = [model.train_step(paired_batch) for _ in range(3)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_labels_may_be_given_apart_or_inside_the_batch(build, pixel_batch) -> None:
    apart, inside = build(), build()
    labels = pixel_batch["labels"]
    assert apart.train_step(pixel_batch["pixel_values"], labels) == inside.train_step(pixel_batch)
    assert apart.evaluate(pixel_batch["pixel_values"], labels) == inside.evaluate(pixel_batch)


def test_given_image_features_replace_the_frozen_vision_tower_exactly(build, pixel_batch) -> None:
    by_pixels, by_features = build(strategy="head_only"), build(strategy="head_only")
    with torch.no_grad():
        features = by_features.encode_image(pixel_batch["pixel_values"])
    batch = {"image_features": features, "labels": pixel_batch["labels"]}
    assert by_features.train_step(batch) == by_pixels.train_step(pixel_batch)
    assert torch.equal(by_features.head.weight, by_pixels.head.weight)
    assert by_features.evaluate(batch) == by_pixels.evaluate(pixel_batch)


def test_given_image_features_are_refused_while_the_vision_tower_trains(build, pixel_batch) -> None:
    model = build(strategy="full")
    with pytest.raises(UserError, match="image_features"):
        model.train_step({"image_features": torch.zeros(12, 24), "labels": pixel_batch["labels"]})


def test_added_dropout_is_active_in_training_steps_only_and_the_base_stays_in_eval_mode(
    build, pixel_batch
) -> None:
    model = build(strategy="full")
    seen: list[bool] = []

    class Probe(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            seen.append(model.head[1].training)
            assert not any(m.training for m in model.clip.modules())
            return features

    model.head = nn.Sequential(Probe(), nn.Dropout(0.5), model.head)
    model.set_exchanged(model.exchanged_names[:1])
    model.train_step(pixel_batch)
    model.evaluate(pixel_batch)
    assert seen == [True, False]
    assert not any(m.training for m in model.modules())


def test_dropout_is_off_again_after_a_step_that_failed(build, pixel_batch) -> None:
    model = build(strategy="full")
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    model.set_exchanged([])
    with pytest.raises(UserError, match="labels"):
        model.train_step({"pixel_values": pixel_batch["pixel_values"]})
    assert not any(m.training for m in model.modules())


def test_the_temperature_trains_but_never_beyond_100(build, paired_batch) -> None:
    model = build(strategy="text_and_projection", task="retrieval")
    with torch.no_grad():
        model.clip.logit_scale.fill_(math.log(100.0) - 1e-3)
    before = model.clip.logit_scale.item()
    model.start_training(TrainingSettings(learning_rate=0.5), 3)
    for _ in range(3):
        model.train_step({**paired_batch, "concept": torch.zeros(12)})
    assert model.clip.logit_scale.item() != before
    assert model.clip.logit_scale.item() <= math.log(100.0) + 1e-6


def test_training_with_nothing_trainable_says_so(build, pixel_batch) -> None:
    model = build(strategy="lora", train_head=False)
    with pytest.raises(UserError, match="no parameter is trainable"):
        model.train_step(pixel_batch)


def test_a_step_by_hand_shows_its_gradients_and_local_training_leaves_none_behind(build, pixel_batch) -> None:
    model = build(strategy="full")
    model.train_step(pixel_batch)
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("clip.vision_model"))
    model.start_training(TrainingSettings(), 1)
    model.train_step(pixel_batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_deep_copy_is_independent(build, pixel_batch) -> None:
    model = build(strategy="full")
    model.train_step(pixel_batch)
    twin = copy.deepcopy(model)
    before = model.get_state()
    twin.train_step(pixel_batch)
    assert all(torch.equal(value, before[name]) for name, value in model.get_state().items())
    assert not torch.equal(twin.get_state()["head.weight"], before["head.weight"])


# Evaluation


def test_evaluating_batch_by_batch_equals_evaluating_at_once(build, pixel_batch) -> None:
    model = build()
    halves = [{key: value[a:b] for key, value in pixel_batch.items()} for a, b in ((0, 5), (5, 12))]
    whole, parts = model.evaluate(pixel_batch), model.evaluate(halves)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert parts["num_examples"] == 12
    assert all(type(value) is float for value in parts.values())


def test_evaluating_nothing_is_refused(build) -> None:
    with pytest.raises(UserError, match="no batch"):
        build().evaluate([])


def test_construction_and_evaluation_leave_the_global_generator_alone(build, pixel_batch) -> None:
    before = torch.random.get_rng_state()
    build(class_names=None, pretrained=False).evaluate(pixel_batch)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_documented_constructor_counts_151_million_parameters_before_the_head() -> None:
    model = FederatedCLIPModel(
        "openai/clip-vit-base-patch32", num_classes=10, pretrained=False, device="meta"
    )
    assert sum(p.numel() for p in model.clip.parameters()) == 151_277_313
    assert sum(p.numel() for p in model.head.parameters()) == 10 * 513

"""Claims about models that answer questions about images: what they compute, train, keep and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from federated.config.config_files import load_config
from lora import create_model, load_lora_adapters, save_lora_adapters
from lora.adapters import is_adapter_parameter
from lora.vqa_wrapper import VQALoRAWrapper
from models.errors import UserError
from models.mbart_loading import ARCHITECTURES, BARTPHO
from models.training import Batch, TrainingSettings
from models.vqa import FederatedVQAModel
from models.vqa_task import predict_answers, read_questions, vqa_loss

ROWS = {
    "question": ["what color is the shape?", "is there a circle?", "what shape is in the image?", "is it?"],
    "answer": ["blue", "yes", "rectangle", "no"],
    "label": [2, 0, 1, 0],
    "picture": ["a", "b", "a", "c"],
}
COLOURS = {"a": "blue", "b": "white", "c": "red"}


def rows() -> dict[str, Any]:
    images = [Image.new("RGB", (64, 64), COLOURS[picture]) for picture in ROWS["picture"]]
    return {**ROWS, "image": images}


@pytest.fixture(scope="module")
def model() -> FederatedVQAModel:
    return FederatedVQAModel(class_names=("yes/no", "shape", "colour"))


@pytest.fixture
def batch(model: FederatedVQAModel) -> Batch:
    return read_questions(model, rows())


# ---- what is computed


def test_the_loss_is_that_of_the_mbart_on_patches_followed_by_words(
    model: FederatedVQAModel, batch: Batch
) -> None:
    patches = model.vision(pixel_values=batch["pixel_values"]).last_hidden_state[:, 1:]
    words = model.text.get_input_embeddings()(batch["input_ids"])
    mask = torch.cat([torch.ones(4, patches.shape[1], dtype=torch.long), batch["attention_mask"]], dim=1)
    theirs = model.text(
        inputs_embeds=torch.cat([model.head["projector"](patches), words], dim=1),
        attention_mask=mask,
        labels=batch["labels"],
    )
    torch.testing.assert_close(vqa_loss(model, batch), theirs.loss)


def test_answers_begin_and_end_as_the_checkpoint_says_and_pads_do_not_count(batch: Batch) -> None:
    labels = batch["labels"]
    assert (labels[:, 0] == 0).all()
    assert all(row[row != -100][-1] == 2 for row in labels)
    assert (labels == -100).any()
    assert not (labels == 1).any()


def test_pads_behind_a_question_change_no_answer(model: FederatedVQAModel, batch: Batch) -> None:
    alone = {key: value[3:] for key, value in batch.items()}
    length = int(alone["attention_mask"].sum())
    assert length < alone["input_ids"].shape[1]
    bare = {**alone, **{key: alone[key][:, :length] for key in ("input_ids", "attention_mask")}}
    torch.testing.assert_close(model(alone), model(bare))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_that_generation_from_the_inputs_writes(
    model: FederatedVQAModel, batch: Batch, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "num_beams", num_beams)
    patches = model.head["projector"](model.patch_states(batch["pixel_values"]))
    words = model.text.get_input_embeddings()(batch["input_ids"])
    ids = model.text.generate(
        inputs_embeds=torch.cat([patches, words], dim=1),
        attention_mask=F.pad(batch["attention_mask"], (patches.shape[1], 0), value=1),
        num_beams=num_beams,
        max_new_tokens=24,
    )
    assert predict_answers(model, batch) == model.tokenizer.texts(ids)
    assert (ids[:, 0] == model.text.config.decoder_start_token_id).all()


def test_a_picture_that_is_several_times_in_a_batch_is_encoded_once_and_exactly(
    model: FederatedVQAModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = FederatedVQAModel.patch_states
    monkeypatch.setattr(
        FederatedVQAModel, "patch_states", lambda self, x: sizes.append(len(x)) or plain(self, x)
    )
    once = model(batch)
    monkeypatch.setattr(model, "deduplicates", False)
    every = model(batch)
    assert sizes == [3, 4]
    torch.testing.assert_close(once, every)


def test_an_evaluation_counts_each_type_of_question(model: FederatedVQAModel, batch: Batch) -> None:
    said = predict_answers(model, batch)
    metrics = model.evaluate(batch)
    hits = [a == b for a, b in zip(said, ROWS["answer"], strict=True)]
    assert metrics["exact_match"] == sum(hits) / 4
    assert metrics["exact_match_yes_no"] == (hits[1] + hits[3]) / 2
    assert {"exact_match_shape", "exact_match_colour", "token_f1"} <= metrics.keys()
    assert metrics["loss"] == pytest.approx(float(vqa_loss(model, batch).detach()), rel=1e-5)


def test_few_steps_learn_a_few_rows_by_heart() -> None:
    wrapper = VQALoRAWrapper(FederatedVQAModel(use_vision_lora=True)).apply_lora_to_federated_model()
    batch = read_questions(wrapper.federated_model, rows())
    wrapper.start_training(TrainingSettings(learning_rate=3e-3), num_steps=40)
    for _ in range(40):
        wrapper.train_step(batch)
    assert wrapper.evaluate(batch)["exact_match"] == 1.0
    assert predict_answers(wrapper.federated_model, batch) == ROWS["answer"]


# ---- a closed set of answers


def closed(**options: Any) -> FederatedVQAModel:
    return FederatedVQAModel(head="classification", answers=("yes", "no", "blue"), **options)


def test_a_classifier_chooses_from_the_closed_set_and_misses_what_is_not_in_it() -> None:
    model = closed()
    batch = read_questions(model, rows())
    assert batch["labels"].tolist() == [2, 0, -100, 1]
    assert model(batch).shape == (4, 3)
    assert set(predict_answers(model, batch)) <= {"yes", "no", "blue"}
    assert model.evaluate(batch)["exact_match"] <= 3 / 4
    expected = F.cross_entropy(model(batch)[[0, 1, 3]], torch.tensor([2, 0, 1]))
    torch.testing.assert_close(vqa_loss(model, batch), expected)


# ---- what trains


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("decoder", "parts"), [("full", {"projector", "decoder"}), ("frozen", {"projector"})]
)
def test_the_pre_trained_parts_are_frozen_but_for_what_is_asked_for(decoder: Any, parts: set[str]) -> None:
    model = FederatedVQAModel(decoder=decoder)
    assert {name.split(".")[1] for name in trained(model)} == parts
    assert {name.split(".")[0] for name in trained(model)} == {"head"}
    assert set(model.exchanged_names) == trained(model)
    model.requires_grad_(True)
    model.freeze_pretrained()
    assert set(model.exchanged_names) == trained(model)


def test_unfrozen_layers_are_the_last_ones_of_the_encoder_and_train() -> None:
    model = FederatedVQAModel(unfreeze_encoder_layers=1, decoder="frozen")
    layers = model.text.model.encoder.layers
    assert model.head["layers"][0] is layers[1]
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    model.train_step(read_questions(model, rows()), learning_rate=1e-2)
    changed = {name for name, value in layers.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"1"}


def test_adapters_of_the_decoder_train_and_its_weights_do_not() -> None:
    wrapper = VQALoRAWrapper(FederatedVQAModel(decoder="lora")).apply_lora_to_federated_model()
    counts = wrapper.parameter_counts()
    width, rank = 128, 16
    assert counts["encoder"] == 2 * 3 * 2 * rank * width  # two layers, q, k and v, A and B
    assert counts["decoder"] == 2 * counts["encoder"]  # attention to itself and to the encoder
    assert all(
        is_adapter_parameter(name) or name.startswith("head.projector.")
        for name in trained(wrapper.federated_model)
    )


def test_everything_trains_in_full() -> None:
    model = FederatedVQAModel(strategy="full")
    assert len(trained(model)) == len(list(model.named_parameters())) == len(model.exchanged_names)
    assert not model.vision_is_frozen


def test_a_classifier_sends_no_decoder_that_it_does_not_read() -> None:
    names = closed(strategy="full").exchanged_names
    assert not any(name.startswith("text.model.decoder.") for name in names)
    assert any(name.startswith("text.model.shared.") for name in names)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    wrapper = disturbed(use_vision_lora=True, text_lora_dropout=0.0)
    batch = read_questions(wrapper.federated_model, rows())
    found = []
    for switch in (wrapper.disable_gradient_checkpointing, wrapper.enable_gradient_checkpointing):
        switch()
        wrapper.zero_grad()
        vqa_loss(wrapper.federated_model, batch).backward()
        found.append({n: p.grad.clone() for n, p in wrapper.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_unloading_leaves_the_plain_model_with_the_same_answers() -> None:
    wrapper = disturbed(use_vision_lora=True)
    batch = read_questions(wrapper.federated_model, rows())
    adapted, names = wrapper(batch), FederatedVQAModel().exchanged_names
    wrapper.disable_lora_layers()
    assert not torch.allclose(wrapper(batch), adapted, atol=1e-3)
    wrapper.enable_lora_layers()
    plain: Any = wrapper.merge_and_unload()
    torch.testing.assert_close(plain(batch), adapted, rtol=1e-4, atol=1e-4)
    assert plain.exchanged_names == names


@pytest.mark.parametrize(
    ("options", "recipe", "words"),
    [
        ({"unfreeze_encoder_layers": 1}, {"use_text_lora": True}, "unfreeze_encoder_layers=0"),
        ({"unfreeze_encoder_layers": 3}, {}, "has 2 layers"),
        ({"head": "classification"}, {}, "two answers or more"),
        ({"answers": ("a", "b")}, {}, "head=classification"),
        ({"most_question_tokens": 500}, {}, "reads 128"),
        ({"text_model": "./nowhere"}, {}, "there is no such folder"),
        ({"text_model": str(Path(__file__).parents[1] / "models" / "tiny_clip")}, {}, "model_type='clip'"),
        ({"strategy": "half"}, {}, "strategy"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, Any], recipe: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        VQALoRAWrapper(FederatedVQAModel(**options), **recipe)


def test_the_flags_of_the_recipe_have_its_defaults_and_text_adapters_go_first() -> None:
    assert VQALoRAWrapper(FederatedVQAModel()).lora_config.model_dump(exclude_defaults=True) == {
        "target_components": ["text"]
    }
    both = VQALoRAWrapper(FederatedVQAModel(use_vision_lora=True, text_lora_r=4)).lora_config
    assert (both.for_tower("text").r, both.for_tower("vision").r) == (4, 8)
    assert (both.for_tower("text").lora_alpha, both.for_tower("vision").lora_alpha) == (32, 16)
    without = VQALoRAWrapper(FederatedVQAModel(unfreeze_encoder_layers=1, use_vision_lora=True)).lora_config
    assert without.tower_names == ("vision",)
    assert not VQALoRAWrapper(FederatedVQAModel(use_text_lora=False)).lora_config.enabled


# ---- rows


def test_a_question_that_is_too_long_is_cut_counted_and_still_ends() -> None:
    model = FederatedVQAModel(most_question_tokens=5)
    batch = read_questions(model, {**rows(), "question": ["what is this and this and that"] * 4})
    assert batch["input_ids"].shape == (4, 5)
    assert (batch["input_ids"][:, -1] == 2).all()
    assert model.tokenizer.num_cut == 4


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_a_row_without_an_answer_is_refused_by_its_question(model: FederatedVQAModel, empty: Any) -> None:
    with pytest.raises(UserError, match="'is it' has no answer|'is it\\?' has no answer"):
        read_questions(model, {**rows(), "answer": ["a", "b", "c", empty]})


def test_a_batch_of_answers_outside_the_closed_set_is_refused() -> None:
    model = closed()
    batch = read_questions(model, {**rows(), "answer": ["green"] * 4})
    with pytest.raises(UserError, match=r"model\.options\.answers"):
        model.train_step(batch)


# ---- files


def disturbed(**options: Any) -> VQALoRAWrapper:
    wrapper = VQALoRAWrapper(FederatedVQAModel(**options)).apply_lora_to_federated_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return wrapper


@pytest.mark.parametrize("options", [{"use_vision_lora": True}, {"decoder": "lora"}])
def test_a_saved_adapter_gives_the_same_model_again_here_and_in_plain_peft(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    wrapper = disturbed(**options)
    batch = read_questions(wrapper.federated_model, rows())
    expected = wrapper(batch)
    save_lora_adapters(wrapper, tmp_path / "adapter")
    again = FederatedVQAModel(**options)
    load_lora_adapters(again, tmp_path / "adapter")
    assert torch.equal(again(batch), expected)
    plain = FederatedVQAModel(**options)
    plain.head.load_state_dict(wrapper.head.state_dict())
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(adapted.base_model.model(batch), expected)


def test_the_base_is_the_same_before_and_after_the_decoder_trained(tmp_path: Path) -> None:
    wrapper = disturbed()
    save_lora_adapters(wrapper, tmp_path / "adapter")
    other = FederatedVQAModel(pretrained=False)
    with pytest.raises(UserError, match="other weights"):
        load_lora_adapters(other, tmp_path / "adapter")


@pytest.mark.parametrize(("model_type", "is_adapted"), [("vqa", False), ("vqa_lora", True)])
def test_a_configuration_makes_the_model(model_type: str, is_adapted: bool) -> None:
    made = create_model({"model": {"type": model_type, "options": {"decoder": "frozen"}}, "lora": {"r": 3}})
    assert isinstance(made, VQALoRAWrapper if is_adapted else FederatedVQAModel)
    assert any(map(is_adapter_parameter, trained(made))) == is_adapted


# ---- the real BARTpho, without its weights


def bartpho(**options: Any) -> VQALoRAWrapper:
    settings = {"text_model": BARTPHO, "pretrained": False, "device": "meta", **options}
    clip = "openai/clip-vit-base-patch32"
    return VQALoRAWrapper(FederatedVQAModel(clip, **settings)).apply_lora_to_federated_model()


@pytest.mark.parametrize(("rank", "counted"), [(8, 589_824), (16, 1_179_648), (32, 2_359_296)])
def test_adapters_in_bartpho_have_the_documented_numbers_of_parameters(rank: int, counted: int) -> None:
    counts = bartpho(text_lora_r=rank, decoder="frozen").parameter_counts()
    layers, width = ARCHITECTURES[BARTPHO]["encoder_layers"], ARCHITECTURES[BARTPHO]["d_model"]
    assert counts["encoder"] == counted == layers * 3 * 2 * rank * width
    assert counts["vision"] == counts["decoder"] == 0


def test_three_unfrozen_layers_and_the_decoder_of_bartpho_have_the_documented_numbers() -> None:
    counts = bartpho(unfreeze_encoder_layers=3).parameter_counts()
    width, wide = 1024, 4096
    attention, norm = 4 * (width * width + width), 2 * width
    mlp = 2 * width * wide + wide + width
    assert counts["encoder"] == 3 * (attention + mlp + 2 * norm) == 37_788_672
    assert counts["decoder"] > 200_000_000
    vision = bartpho(use_vision_lora=True, decoder="frozen").parameter_counts()["vision"]
    assert vision == 12 * 3 * 2 * 8 * 768 == 442_368


@pytest.mark.parametrize("wrong", [{"decoder": "Full"}, {"head": "classify"}])
def test_a_kind_of_decoder_or_head_that_there_is_not_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        FederatedVQAModel(**wrong)


def test_a_loaded_configuration_makes_the_model_that_its_file_makes() -> None:
    loaded, read = create_model(load_config("easy_vqa")), create_model("easy_vqa")
    assert type(loaded) is type(read) is VQALoRAWrapper
    assert loaded.lora_config == read.lora_config

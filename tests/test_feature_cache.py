"""Caches of frozen work: equal results with and without, valid only where they must be, bounded, shared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import federated.rounds.run
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.data.captions import Captions
from federated.data.dataset import FederatedData
from federated.data.row_cache import RowCache
from federated.rounds.batches import evaluate_server, local_batches
from federated.rounds.build import load_run_data
from federated.rounds.run import Run, build_run
from models.clip_loading import load_clip

ALL_OFF = tuple(
    f"cache.{name}=false"
    for name in ("image_features", "text_features", "class_embeddings", "activations", "deduplicate_captions")
)
SMALL = (
    "partition.num_clients=2",
    "partition.name=iid",
    "partition.options={}",
    "client.batch_size=16",
    "client.optimizer=sgd",  # AdamW's first steps turn rounding errors of tiny gradients into whole steps
    "data.max_train_samples=120",
    "data.max_test_samples=40",
)
RETRIEVAL = ("data.options={language: en, vendors: [noto, twemoji], test_vendors: [noto]}",)
BLOCKS = ("lora.layers=[1]", "lora.target_modules=[q_proj, v_proj]")
CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "text adapters": ("retrieval_vi", RETRIEVAL, "train image features"),
    "head only": ("head_only", (), "train image features"),
    "vision adapters from block 1": ("quickstart", BLOCKS, "train image activations"),
    "text adapters from block 1": ("retrieval_vi", (*RETRIEVAL, *BLOCKS), "caption activations"),
    "vision adapters with captions": (
        "retrieval_vi",
        (*RETRIEVAL, "lora.target_components=[vision]", "lora.target_modules=[q_proj]"),
        "caption features",
    ),
}


@functools.cache
def data_of(config: str) -> FederatedData:
    return load_run_data(ExperimentConfig.model_validate_json(config))


@pytest.fixture(autouse=True)
def _data_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: ExperimentConfig) -> FederatedData:
        only_data = ExperimentConfig(data=config.data, seed=config.seed)
        return data_of(only_data.model_dump_json())

    monkeypatch.setattr(federated.rounds.run, "load_run_data", load)


def build(name: str, overrides: Sequence[str] = ()) -> Run:
    return build_run(load_config(name, [*SMALL, *overrides]))


def train(experiment: Run, num_steps: int = 3) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    model = experiment.model
    experiment.reset()
    model.start_training(experiment.training_settings, num_steps)
    batches = local_batches(experiment, 1, num_steps, np.random.default_rng(0), server_round=1)
    losses = [model.train_step(batch) for batch in batches]
    return losses, model.get_state(), evaluate_server(experiment)


def assert_close(first: Any, second: Any, tolerance: float) -> None:
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    changed = torch.cat([value.flatten() for value in first[1].values()])
    expected = torch.cat([value.flatten() for value in second[1].values()])
    assert float((changed - expected).norm() / expected.norm()) <= tolerance
    assert first[2]["loss"] == pytest.approx(second[2]["loss"], rel=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_with_and_without_caches(case: str) -> None:
    name, overrides, expected_note = CASES[case]
    cached, plain = build(name, overrides), build(name, [*overrides, *ALL_OFF])
    assert any(note.startswith(f"{expected_note}: computed once") for note in cached.reader.caches.notes)
    assert not any("computed once" in note for note in plain.reader.caches.notes)
    first = train(cached)
    assert_close(first, train(plain), 1e-5)
    again = train(cached)  # from rows that are all kept by now
    assert again[0] == first[0]
    assert all(torch.equal(again[1][key], value) for key, value in first[1].items())


def test_images_that_are_cached_are_not_decoded_again() -> None:
    experiment = build("head_only")
    first = train(experiment)
    # a call fails from here on
    experiment.reader.train_images.pixel_values = None  # type: ignore[method-assign,assignment]
    assert train(experiment)[0] == first[0]


def test_augmented_training_images_are_not_cached_but_test_images_are() -> None:
    experiment = build("head_only", ["client.augmentation={flip_probability: 0.5}"])
    assert "train images: not cached (client.augmentation changes them)" in experiment.reader.caches.notes
    assert not experiment.reader.caches.serves_images(experiment.reader.train_images, training=True)
    assert experiment.reader.caches.serves_images(experiment.reader.test_images, training=False)


def test_augmented_captions_are_not_taken_from_the_cache() -> None:
    name, overrides, _ = CASES["vision adapters with captions"]
    experiment = build(name, [*overrides, 'client.augmentation={templates: ["an {}"]}'])
    batch = next(local_batches(experiment, 0, 1, np.random.default_rng(0), server_round=1))
    assert "text_features" not in batch


def test_what_trains_is_never_cached() -> None:
    (note,) = build("quickstart").reader.caches.notes
    reason = "training changes the vision tower from its first block on, so its work cannot be kept"
    assert note == f"images: not cached ({reason})"


def test_dropout_in_the_text_tower_keeps_equal_captions_apart() -> None:
    experiment = build("retrieval_vi", [*RETRIEVAL, "lora.lora_dropout=0.1"])
    batch = experiment.reader.caches.of_texts(["a cat", "a cat"])
    assert "caption_id" not in batch
    assert "repeated captions: not cached (dropout differs for each)" in experiment.reader.caches.notes


def test_repeated_captions_are_encoded_once_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build("retrieval_vi", RETRIEVAL)
    model = experiment.model
    encoded: list[int] = []
    real = model.federated_model._encode_text

    def counting(clip: Any, tokens: dict[str, Tensor]) -> Tensor:
        encoded.append(len(tokens["input_ids"]))
        return real(clip, tokens)

    monkeypatch.setattr(model.federated_model, "_encode_text", counting)
    texts = ["a cat", "a red apple on a tree", "a cat", "a cat"]
    shared = experiment.reader.caches.of_texts(texts)
    apart = {key: value for key, value in shared.items() if key != "caption_id"}
    weights = torch.randn(4, model.embedding_dim, generator=torch.Generator().manual_seed(0))
    gradients = []
    for batch in (shared, apart):
        model.zero_grad()
        (model.text_features(batch) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert encoded == [2, 4]
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def test_tokens_end_with_the_longest_caption_and_trimming_changes_nothing() -> None:
    texts = ["a cat", "a red apple on a tree"]
    trimmed = build("retrieval_vi", RETRIEVAL)
    padded = build("retrieval_vi", [*RETRIEVAL, "cache.trim_prompts=false"])
    tokens = trimmed.reader.caches.of_texts(texts)
    direct = trimmed.model.tokenize(texts)
    assert all(torch.equal(tokens[key], direct[key]) for key in direct)
    assert int(tokens["attention_mask"].sum(dim=1).max()) == tokens["input_ids"].shape[1]
    with torch.no_grad():
        short, long = (e.model.text_features(e.reader.caches.of_texts(texts)) for e in (trimmed, padded))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)


# Rows


def squares(asked: list[int] | None = None) -> Any:
    def compute(rows: np.ndarray) -> Tensor:
        if asked is not None:
            asked.append(len(rows))
        return torch.from_numpy(rows.astype(np.float32) ** 2).unsqueeze(1).repeat(1, 3)

    return compute


@pytest.mark.parametrize("max_bytes", [0, 5 * 12, 10**6])
@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_right_whatever_fits(max_bytes: int, tmp_path: Path, *, on_disk: bool) -> None:
    folder = str(tmp_path) if on_disk else None
    cache = RowCache(squares(), 10, (3,), batch_size=4, max_bytes=max_bytes, folder=folder)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(0, 10, size=6)
        assert torch.equal(cache.rows(rows), squares()(rows))
    assert cache.max_bytes <= max_bytes
    assert cache.num_kept <= cache.capacity
    assert not list(tmp_path.iterdir())


def test_rows_are_computed_once_and_always_in_batches_of_one_shape() -> None:
    asked: list[int] = []
    cache = RowCache(squares(asked), 10, (3,), batch_size=4, max_bytes=10**6)
    for rows in ([1, 2], [2, 1, 1], [0, 1, 2, 3, 4, 5, 6]):
        cache.rows(rows)
    assert asked == [4, 4, 4]


def test_the_features_of_an_image_do_not_depend_on_its_company() -> None:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = load_clip("tiny")
    with torch.no_grad():
        there, back = (loaded.encode_image(loaded.clip, batch) for batch in (images, images.flip(0)))
    assert torch.equal(there, back.flip(0))


def test_captions_keep_their_numbers_and_new_ones_get_further_ones() -> None:
    captions = Captions(load_clip("tiny").tokenize, ["a cat", "a dog", "a cat"])
    assert captions.known == ("a cat", "a dog")
    assert captions.batch(["a dog", "new", "a cat", "new"])["caption_id"].tolist() == [1, 2, 0, 2]


def test_a_subset_for_evaluation_is_the_same_in_every_round() -> None:
    experiment = build("head_only", ["evaluation.max_samples=15"])
    first, second = evaluate_server(experiment), evaluate_server(experiment)
    assert first == second
    assert first["num_examples"] == 15

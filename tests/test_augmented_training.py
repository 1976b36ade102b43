"""Claims about what a client trains on and how: augmentation, and that every setting reaches the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import federated.results.report
import federated.tools.central
from federated.config.augmentation_options import CLIP_DEVIATION, CLIP_MEAN
from federated.config.config_files import dump_config, load_config
from federated.config.seeding import generator
from federated.data.augmented_batches import augment_batch, colour_range, training_augmentation
from federated.data.batch_order import local_index_batches
from federated.engines.flower_apps import run_of
from federated.rounds.batches import evaluate_client, evaluate_server, local_batches
from federated.rounds.local_training import Assignment, train_locally
from federated.rounds.run import Run, build_run
from federated.tools.central import train_centrally
from lora.adapters import unwrap
from models.errors import UserError
from models.images import ImageProcessor
from models.training import LocalTrainer, TrainingSettings, learning_rate_at

SMALL = (
    "partition={name: iid, num_clients: 3}",
    "client.local_steps=4",
    "client.batch_size=8",
    "data.max_train_samples=120",
    "data.max_validation_samples=40",
    "data.max_test_samples=40",
)
AUGMENTATION = (
    "client.augmentation={crop_scale: [0.5, 1.0], flip_probability: 0.5, brightness: 0.3, saturation: 0.3}"
)
EMOJI = (
    "model.num_classes=8",
    "task.name=retrieval",
    "data={source: emoji, max_train_samples: 60, max_test_samples: 20}",
)


def small_experiment(*overrides: str) -> Run:
    return build_run(load_config("quickstart", [*SMALL, *overrides]))


def client_batches(experiment: Run, client_id: int = 0, server_round: int = 1) -> list[dict[str, Any]]:
    rng = generator(experiment.config.seed, "client", server_round, client_id)
    return list(local_batches(experiment, client_id, 3, rng, server_round=server_round))


def processor(mean: float, deviation: float) -> ImageProcessor:
    return ImageProcessor.from_values(
        size=None,
        crop=None,
        resample=Image.Resampling.BICUBIC,
        factor=1 / 255,
        mean=[mean] * 3,
        std=[deviation] * 3,
    )


@pytest.fixture(scope="module")
def plain() -> Run:
    return small_experiment()


@pytest.fixture(scope="module")
def augmented() -> Run:
    return small_experiment(AUGMENTATION)


def test_without_augmentation_batches_are_bit_by_bit_the_shard_s_rows(plain: Run) -> None:
    rng = generator(0, "client", 1, 0)
    order = local_index_batches(plain.shards[0].train, 8, 3, rng)
    raw = (plain.reader.train_images.batch(rows) for rows in order)
    for ours, theirs in zip(client_batches(plain), raw, strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert torch.equal(ours["labels"], theirs["labels"])


def test_augmentation_changes_images_and_leaves_order_and_labels(plain: Run, augmented: Run) -> None:
    for before, after in zip(client_batches(plain), client_batches(augmented), strict=True):
        assert torch.equal(before["labels"], after["labels"])
        assert before["pixel_values"].shape == after["pixel_values"].shape
        assert not torch.equal(before["pixel_values"], after["pixel_values"])


def test_a_client_s_augmentation_repeats_and_belongs_to_it_and_its_round(augmented: Run) -> None:
    first, again = client_batches(augmented), client_batches(augmented)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    rows = augmented.shards[0].train[:8]
    batch = augmented.reader.train_images.batch(rows)
    seen = [
        augment_batch(batch, augmented.reader.augmentation, generator(0, "augment", server_round, client_id))
        for server_round, client_id in ((1, 0), (1, 1), (2, 0))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(seen[a]["pixel_values"], seen[b]["pixel_values"])
    assert torch.equal(batch["pixel_values"], augmented.reader.train_images.pixel_values(rows))


def test_evaluation_never_sees_augmentation(plain: Run, augmented: Run) -> None:
    assert evaluate_server(plain) == evaluate_server(augmented)
    assert evaluate_client(plain, 0) == evaluate_client(augmented, 0)


def test_nothing_to_do_hands_the_same_batch_back() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4), "captions": ["a", "b"]}
    off = training_augmentation({}, processor(0.5, 0.5), captions=True)
    assert augment_batch(batch, off, np.random.default_rng(0)) is batch


def test_colours_are_changed_in_the_model_s_own_range(plain: Run) -> None:
    mean, deviation = colour_range(plain.model.preprocess)
    assert mean == pytest.approx(CLIP_MEAN, abs=1e-5)
    assert deviation == pytest.approx(CLIP_DEVIATION, abs=1e-5)
    other = processor(0.2, 0.9)
    augmentation = training_augmentation({"brightness": 1.0}, other, captions=False)
    assert augmentation.mean == pytest.approx((0.2,) * 3, abs=1e-6)
    assert augmentation.deviation == pytest.approx((0.9,) * 3, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    batch = {"pixel_values": torch.stack([other(Image.fromarray(image)) for image in noise])}
    colours = augment_batch(batch, augmentation, np.random.default_rng(1))["pixel_values"] * 0.9 + 0.2
    assert -1e-5 < float(colours.min()) < 0.05
    assert 0.95 < float(colours.max()) < 1 + 1e-5


def test_colours_named_in_the_configuration_win() -> None:
    options = {"brightness": 0.5, "mean": [0.1, 0.1, 0.1]}
    assert training_augmentation(options, processor(0.5, 0.5), captions=False).mean == (0.1, 0.1, 0.1)


def test_captions_go_into_templates_in_training_alone() -> None:
    template = "client.augmentation={templates: ['this is {} here']}"
    with_template, without = small_experiment(*EMOJI, template), small_experiment(*EMOJI)
    start, end = (without.model.tokenize([text])["input_ids"][0, 1].item() for text in ("this", "here"))
    for plain_batch, batch in zip(client_batches(without), client_batches(with_template), strict=True):
        assert torch.equal(plain_batch["concept"], batch["concept"])
        assert torch.equal(plain_batch["pixel_values"], batch["pixel_values"])
        assert (batch["input_ids"][:, 1] == start).all()
        assert (batch["input_ids"] == end).any(dim=1).all()
    assert evaluate_server(with_template) == evaluate_server(without)


def test_templates_without_captions_are_refused() -> None:
    with pytest.raises(UserError, match="task.templates"):
        small_experiment("client.augmentation={templates: ['{}!']}")


@pytest.mark.parametrize(
    ("augmentation", "word"),
    [
        ("{flip: 0.5}", "flip_probability"),
        ("{flip_probability: 2}", "between 0 and 1"),
        ("{crop_scale: 1}", "form"),
    ],
)
def test_a_wrong_augmentation_is_named_before_anything_is_loaded(augmentation: str, word: str) -> None:
    with pytest.raises(UserError, match=r"client\.augmentation") as error:
        load_config("quickstart", [f"client.augmentation={augmentation}"])
    assert word in str(error.value)


def test_one_concept_is_never_on_both_sides_of_a_client_s_split() -> None:
    experiment = small_experiment(*EMOJI, "data.max_train_samples=600", "partition.local_test_fraction=0.3")
    concepts = np.asarray(experiment.data.train["concept"])
    for shard in experiment.shards:
        assert len(shard.test)
        assert not set(concepts[shard.train]) & set(concepts[shard.test])


# Every setting reaches the trainer, in a client's local training and in central training.

NUM_STEPS = 4


class Watch:
    """What the trainer really does: the rate of each step, and sizes and dtypes of forward passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[float] = []
        self.trainer: LocalTrainer | None = None
        self.forward_sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()
        original = LocalTrainer._apply_gradients

        def apply_gradients(trainer: LocalTrainer) -> None:
            self.trainer = trainer
            self.rates.append(trainer.optimizer.param_groups[0]["lr"])
            original(trainer)

        monkeypatch.setattr(LocalTrainer, "_apply_gradients", apply_gradients)

    def look_at(self, experiment: Run) -> Run:
        layer = unwrap(experiment.model).clip.vision_model.encoder.layers[0].mlp.fc1

        def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                self.forward_sizes.append(len(output))
                self.dtypes.add(output.dtype)

        layer.register_forward_hook(note)
        return experiment


def train_a_client(watch: Watch, overrides: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    experiment = watch.look_at(small_experiment(*overrides))
    train_locally(experiment, Assignment(client_id=0, server_round=1), experiment.wire_state())


def train_in_one_place(watch: Watch, overrides: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        federated.tools.central,
        "build_run",
        lambda config: watch.look_at(build_run(config)),
    )
    patch.setattr(federated.results.report, "write_report", lambda path: path)
    overrides = [*SMALL, f"train.steps={NUM_STEPS}", f"output.root={folder}", *overrides]
    train_centrally(load_config("quickstart", overrides))


both_ways = pytest.mark.parametrize("trains", [train_a_client, train_in_one_place])
Trains = Callable[[Watch, list[str], Path, pytest.MonkeyPatch], None]

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "weight_decay": 0.03,
    "optimizer": "sgd",
    "momentum": 0.5,
    "schedule": "cosine",
    "clip_norm": 0.5,
    "micro_batch_size": 3,
    "precision": "bf16",
}
WARM_UPS = ({"warmup_steps": 2}, {"warmup_ratio": 0.5})
"""Two steps of four, by either key."""


@both_ways
@pytest.mark.parametrize("warm_up", WARM_UPS, ids=["steps", "ratio"])
def test_every_training_setting_of_the_yaml_reaches_the_trainer(
    warm_up: dict[str, Any], trains: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {*SETTINGS, *(key for keys in WARM_UPS for key in keys)}
    assert known == set(TrainingSettings.__dataclass_fields__), "a new setting needs a line here"
    settings = SETTINGS | warm_up
    watch = Watch(monkeypatch)
    trains(watch, [f"client.{key}={value}" for key, value in settings.items()], tmp_path, monkeypatch)
    trainer = watch.trainer
    assert trainer is not None
    assert trainer.settings == TrainingSettings(**settings)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.03}
    expected = [learning_rate_at(trainer.settings, step, NUM_STEPS) for step in range(NUM_STEPS)]
    assert watch.rates == expected
    assert expected[0] < expected[1] == max(expected) > expected[-1]
    assert max(watch.forward_sizes) == 3
    assert len(watch.forward_sizes) == 3 * NUM_STEPS  # batches of eight in parts of three
    assert watch.dtypes == {torch.bfloat16}


@both_ways
def test_gradients_are_clipped_where_the_yaml_says_so(
    trains: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    original = LocalTrainer._clip

    def clip(trainer: LocalTrainer) -> None:
        original(trainer)
        gradients = [p.grad.norm() for p in trainer.parameters if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))

    monkeypatch.setattr(LocalTrainer, "_clip", clip)
    trains(Watch(monkeypatch), ["client.clip_norm=1e-3"], tmp_path / "clipped", monkeypatch)
    assert all(norm <= 1.001e-3 for norm in norms)
    norms.clear()
    trains(Watch(monkeypatch), [], tmp_path / "free", monkeypatch)
    assert min(norms) > 1e-2


def test_the_configuration_survives_the_way_to_a_client(plain: Run) -> None:
    config = load_config("quickstart", [*SMALL, AUGMENTATION, "client.schedule=cosine"])
    experiment = run_of({"config": dump_config(config)})
    assert experiment.reader.augmentation.crop_scale == (0.5, 1.0)
    assert experiment.training_settings.schedule == "cosine"

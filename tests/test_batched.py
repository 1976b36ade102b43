"""Batched clients: several clients trained in one pass are the clients trained one after another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASS_NAMES, IMAGE_SIZE
from torch import nn

import federated.engines.batched_clients
import federated.engines.simulation
import federated.results.report
import federated.rounds.local_training
from federated.config.config_files import load_config
from federated.engines.batched_clients import (
    BatchedClients,
    batched_clients,
    measured_group_size,
    one_by_one_because,
    split_evenly,
)
from federated.engines.batched_losses import gather
from federated.engines.batched_training import JointTrainer
from federated.engines.simulation import limited_threads, run_experiment
from federated.rounds.batches import local_batches
from federated.rounds.run import Run, build_run
from lora.batched import StackedAdapter, StackedHead, clip_gradients, gradient_norms, obstacle
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.switching import (
    disable_lora,
)
from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.lean_blocks import quick_gelu
from models.state import State
from models.training import Batch, TrainingSettings

NUM_CLIENTS = 3
CAPTIONS = ("a cat", "the red car", "a photo of a blue tree . one two", "dog")
TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with limited_threads(1):
        yield


def build_model(
    folder: Path, task: str = "classification", towers: Sequence[str] = ("vision",), **changes: Any
) -> Any:
    model = FederatedCLIPModel(str(folder), 3, class_names=CLASS_NAMES, task=task, strategy="lora")
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": TARGETS, **changes}
    config = LoRAConfig(target_components=list(towers), **settings)
    return CLIPLoRAWrapper(model, config).apply_lora_to_federated_model()


def random_states(model: Any) -> list[State]:
    generator = torch.Generator().manual_seed(3)
    return [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in model.get_state().items()}
        for _ in range(NUM_CLIENTS)
    ]


def random_batches(model: Any, sizes: Sequence[Sequence[int]]) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(4)

    def batch(size: int, client: int) -> Batch:
        tensors = {
            "pixel_values": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "labels": torch.randint(0, 3, (size,), generator=generator),
        }
        if model.task.name == "retrieval":
            texts = [
                CAPTIONS[(client + 2 * i) % (2 + client)] for i in range(size)
            ]  # of another longest text
            tensors |= {"concept": torch.arange(size) // 2, **model.tokenize(texts)}
        return tensors

    return [[batch(size, client) for size in steps] for client, steps in enumerate(sizes)]


def one_by_one(
    model: Any, settings: TrainingSettings, states: Sequence[State], batches: Sequence[Sequence[Batch]]
) -> tuple[list[State], list[float]]:
    trained, losses = [], []
    for state, steps in zip(states, batches, strict=True):
        model.set_state(state)
        model.start_training(settings, len(steps))
        own = [model.train_step(batch) for batch in steps]
        trained.append(model.get_state())
        losses.append(sum(own) / len(own))
    return trained, losses


def relative(ours: State, theirs: State) -> float:
    assert list(ours) == list(theirs)
    first = torch.cat([ours[name].flatten() for name in theirs])
    second = torch.cat([theirs[name].flatten() for name in theirs])
    return float((first - second).norm() / second.norm())


def check_equal(
    model: Any, settings: TrainingSettings, sizes: Sequence[Sequence[int]], tolerance: float = 1e-5
) -> None:
    states, batches = random_states(model), random_batches(model, sizes)
    expected, losses = one_by_one(model, settings, states, batches)
    before = model.get_state()
    steps = [len(own) for own in sizes]
    trainer = JointTrainer(model, settings)
    for _ in range(2):  # the second time with used stacks and a used optimizer
        joint = trainer.train(states, batches, steps, model.exchanged_names)
        assert joint.train_losses == pytest.approx(losses, rel=tolerance * 10)
        for ours, theirs, start in zip(joint.states, expected, states, strict=True):
            assert relative(ours, start) > 1e-4
            assert relative(ours, theirs) <= tolerance
    assert relative(model.get_state(), before) == 0  # the model's own adapter is not touched


# ---- the layers, against a loop over clients


def test_stacked_layers_are_the_loop_over_clients_in_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = nn.Linear(5, 7).double().requires_grad_(False)
    a, b = nn.Parameter(draw(3, 2, 5)), nn.Parameter(draw(3, 7, 2))
    weight, bias = nn.Parameter(draw(3, 4, 7)), nn.Parameter(draw(12))
    rows = draw(6, 5)
    ours = StackedHead(weight, bias)(StackedAdapter(base, a, b, 0.5)(rows))
    (ours**2).sum().backward()
    stacked = [p.grad.clone() for p in (a, b, weight, bias) if p.grad is not None]
    for parameter in (a, b, weight, bias):
        parameter.grad = None
    outputs = []
    for k in range(3):
        x = rows[2 * k : 2 * k + 2]
        hidden = base(x) + 0.5 * x @ a[k].T @ b[k].T
        outputs.append(hidden @ weight[k].T + bias.view(3, 4)[k])
    torch.testing.assert_close(ours, torch.cat(outputs), rtol=1e-12, atol=1e-12)
    (torch.cat(outputs) ** 2).sum().backward()
    for parameter, gradient in zip((a, b, weight, bias), stacked, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-12)


def test_each_client_is_clipped_by_its_own_norm() -> None:
    stacks = [nn.Parameter(torch.randn(3, 4, 2)), nn.Parameter(torch.randn(6))]
    scales = torch.tensor([0.01, 1.0, 10.0])
    stacks[0].grad = torch.randn(3, 4, 2) * scales.view(3, 1, 1)
    stacks[1].grad = (torch.randn(3, 2) * scales.view(3, 1)).flatten()
    alone = []
    for k in range(3):
        own = [nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2))]
        own[0].grad, own[1].grad = stacks[0].grad[k].clone(), stacks[1].grad.view(3, 2)[k].clone()
        norm = nn.utils.clip_grad_norm_(own, 1.0)
        assert float(gradient_norms(stacks, 3)[k]) == pytest.approx(float(norm))
        alone.append(own)
    clip_gradients(stacks, 3, 1.0)
    for k, own in enumerate(alone):
        torch.testing.assert_close(stacks[0].grad[k], own[0].grad)
        torch.testing.assert_close(stacks[1].grad.view(3, 2)[k], own[1].grad)


def test_lean_blocks_change_neither_features_nor_gradients(small_clip_folder: Path) -> None:
    model = build_model(small_clip_folder)
    model.set_state(random_states(model)[0])
    pixels = random_batches(model, [[4]])[0][0]["pixel_values"]
    parameters = [p for n, p in model.federated_model.named_parameters() if "lora_" in n]
    results = []
    for lean in (False, True):
        inner = model.federated_model
        if lean:
            with inner.lean():
                features = inner.encode_image(pixels)
        else:
            features = inner.encode_image(pixels)
        results.append((features, torch.autograd.grad(features.square().sum(), parameters)))
    (plain, gradients), (ours, lean_gradients) = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    for ours_one, plain_one in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(ours_one, plain_one, rtol=1e-4, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_quick_gelu_has_the_right_derivative() -> None:
    x = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, (x,))


# ---- whole local trainings, against one client after another


@pytest.mark.parametrize(
    "settings",
    [
        TrainingSettings(),
        TrainingSettings(weight_decay=0.1, warmup_steps=1, schedule="cosine"),
        TrainingSettings(clip_norm=0.05),
        TrainingSettings(optimizer="sgd", learning_rate=0.01, weight_decay=0.1),
        TrainingSettings(optimizer="sgd", learning_rate=0.01, momentum=0.0),
    ],
    ids=["adamw", "decay-and-schedule", "clipping", "sgd", "plain-sgd"],
)
def test_clients_trained_together_end_where_they_end_alone(
    small_clip_folder: Path, settings: TrainingSettings
) -> None:
    check_equal(build_model(small_clip_folder), settings, [[4, 4, 4]] * NUM_CLIENTS)


def test_ragged_batches_and_unequal_steps_change_nothing(small_clip_folder: Path) -> None:
    settings = TrainingSettings(clip_norm=0.05, weight_decay=0.1)
    check_equal(build_model(small_clip_folder), settings, [[4, 2, 3], [1], [3, 4]])


@pytest.mark.parametrize(
    ("task", "towers"),
    [("zero_shot", ["text"]), ("zero_shot", ["vision"]), ("retrieval", ["text"]), ("retrieval", ["encoder"])],
)
def test_every_task_trains_together_as_alone(small_clip_folder: Path, task: str, towers: list[str]) -> None:
    model = build_model(small_clip_folder, task, towers)
    check_equal(model, TrainingSettings(), [[4, 3], [4, 4], [2, 4]])


@pytest.mark.parametrize("task", ["classification", "zero_shot", "retrieval"])
def test_every_client_of_a_group_trains_a_temperature_of_its_own(small_clip_folder: Path, task: str) -> None:
    model = build_model(small_clip_folder, task, ["vision"], train_temperature=True)
    assert obstacle(model) is None
    settings = TrainingSettings(weight_decay=0.1, clip_norm=0.05)
    check_equal(model, settings, [[4, 3], [4, 4], [2]])
    states = [{**s, "clip.logit_scale": torch.tensor(4.7)} for s in random_states(model)]  # above ln 100
    batches = random_batches(model, [[2]] * NUM_CLIENTS)
    joint = JointTrainer(model, settings).train(states, batches, [1] * NUM_CLIENTS, model.exchanged_names)
    assert all(state["clip.logit_scale"] <= math.log(100) + 1e-6 for state in joint.states)


def test_frozen_factors_stay_and_have_no_gradient(small_clip_folder: Path) -> None:
    model = build_model(small_clip_folder)
    names = [name for name in model.exchanged_names if "lora_A" not in name]
    states, batches = random_states(model), random_batches(model, [[2, 2]] * NUM_CLIENTS)
    joint = JointTrainer(model, TrainingSettings()).train(states, batches, [2] * NUM_CLIENTS, names)
    for state, trained in zip(states, joint.states, strict=True):
        for name in model.exchanged_names:
            assert torch.equal(state[name], trained[name]) == ("lora_A" in name), name


def test_bf16_autocast_agrees_to_its_precision(small_clip_folder: Path) -> None:
    settings = TrainingSettings(precision="bf16", optimizer="sgd", learning_rate=0.01)
    check_equal(build_model(small_clip_folder), settings, [[4, 4]] * NUM_CLIENTS, tolerance=2e-2)


def test_unequal_steps_under_a_cosine_are_refused(small_clip_folder: Path) -> None:
    model = build_model(small_clip_folder)
    trainer = JointTrainer(model, TrainingSettings(schedule="cosine"))
    with pytest.raises(UserError, match="schedule=constant"):
        trainer.train(random_states(model), [[]] * NUM_CLIENTS, [1, 2, 3], model.exchanged_names)


def test_filling_repeats_a_clients_own_row_and_counts_nothing() -> None:
    batch = gather([{"labels": torch.tensor([7, 8, 9])}, {"labels": torch.tensor([5])}], torch.device("cpu"))
    assert batch.tensors["labels"].tolist() == [7, 8, 9, 5, 5, 5]
    torch.testing.assert_close(batch.weights, torch.tensor([[1 / 3] * 3, [1, 0, 0]]))


# ---- what cannot be batched


def test_what_cannot_be_stacked_is_named(small_clip_folder: Path) -> None:
    assert obstacle(build_model(small_clip_folder)) is None
    full = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES)
    assert "only adapters and a linear head" in str(obstacle(full))
    head_only = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES, strategy="head_only")
    assert obstacle(head_only) is None
    model = FederatedCLIPModel(str(small_clip_folder), 3, class_names=CLASS_NAMES, strategy="lora")
    dropout = CLIPLoRAWrapper(model, LoRAConfig(lora_dropout=0.1)).apply_lora_to_federated_model()
    assert "dropout" in str(obstacle(dropout))
    off = build_model(small_clip_folder)
    disable_lora(off)
    assert "switched off" in str(obstacle(off))


# ---- on the engine


def small_run_config(folder: Path, clip: Path, batched: int | str, *overrides: str) -> Any:
    return load_config(
        "quickstart",
        [
            f"model.model_name={clip}",
            "federation={rounds: 2, cohort_size: 4}",
            "partition={name: dirichlet, num_clients: 5, options: {alpha: 0.5, min_samples: 4}}",
            "client={local_steps: 2, batch_size: 16, augmentation: {flip_probability: 0.5}}",
            "data={max_train_samples: 100, max_test_samples: 20}",
            "evaluation.clients=false",
            f"engine.batched_clients={batched}",
            f"output={{root: {folder}, name: '{batched}'}}",
            *overrides,
        ],
    )


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federated.results.report, "write_report", lambda path: None)


def run_lines(config: Any) -> list[dict[str, Any]]:
    path = run_experiment(config)
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_runs_agree(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for line, expected in zip(ours, theirs, strict=True):
        assert line["cohort"] == expected["cohort"]
        assert line["failed"] == expected["failed"]
        assert line["uplink_wire_bytes"] == expected["uplink_wire_bytes"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for client, metrics in expected["clients"].items():
            assert line["clients"][client] == pytest.approx(metrics, rel=1e-4)


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize("aggregator", ["fedavg", "rolora"])
def test_a_run_with_batched_clients_is_the_same_run(
    tmp_path: Path, small_clip_folder: Path, monkeypatch: pytest.MonkeyPatch, aggregator: str
) -> None:
    sizes, train, made = [], JointTrainer.train, []

    def watched(run: Run) -> BatchedClients | None:
        together = batched_clients(run)
        made.extend([] if together is None else [together])
        return together

    def noted(self: JointTrainer, states: Sequence[State], *arguments: Any) -> Any:
        sizes.append(len(states))
        return train(self, states, *arguments)

    monkeypatch.setattr(JointTrainer, "train", noted)
    monkeypatch.setattr(federated.engines.simulation, "batched_clients", watched)
    name = f"aggregation.name={aggregator}"
    expected = run_lines(small_run_config(tmp_path, small_clip_folder, "off", name))
    config = small_run_config(tmp_path, small_clip_folder, 3, name)
    assert sizes == []
    check_runs_agree(run_lines(config), expected)
    assert sizes == [2, 2, 2, 2]  # two rounds of a cohort of four, in groups of at most three
    assert [together._prepared for together in made] == [{}]  # every client has taken its result


@pytest.mark.usefixtures("without_report")
def test_a_client_at_fault_fails_alone(
    tmp_path: Path, small_clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Run, client_id: int, *arguments: Any, **options: Any) -> Any:
        if client_id == 2:
            raise UserError("image 7 cannot be decoded")
        return local_batches(run, client_id, *arguments, **options)

    for module in (federated.rounds.local_training, federated.engines.batched_clients):
        monkeypatch.setattr(module, "local_batches", broken)
    everybody = "federation={rounds: 1}"
    expected = run_lines(small_run_config(tmp_path, small_clip_folder, "off", everybody))
    ours = run_lines(small_run_config(tmp_path, small_clip_folder, 2, everybody))
    assert [failure["client_id"] for failure in ours[-1]["failed"]] == [2]
    assert len(ours[-1]["clients"]) == 4
    check_runs_agree(ours, expected)


def test_the_measurement_leaves_model_and_random_streams_as_they_were(
    tmp_path: Path, small_clip_folder: Path
) -> None:
    experiment = build_run(small_run_config(tmp_path, small_clip_folder, "auto"))
    before, stream = experiment.model.get_state(), torch.get_rng_state()
    trainer = JointTrainer(experiment.model, experiment.training_settings)
    assert measured_group_size(experiment, trainer, repeats=1) in (None, 4)
    assert relative(experiment.model.get_state(), before) == 0
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("client.proximal_mu=0.1", "client.proximal_mu"),
        ("lora.lora_dropout=0.1", "dropout"),
        ("client.micro_batch_size=4", "client.micro_batch_size"),
        ("aggregation.name=fed_sb", "fed_sb"),
    ],
)
def test_runs_that_cannot_be_batched_say_why_and_train_one_by_one(
    tmp_path: Path, small_clip_folder: Path, caplog: pytest.LogCaptureFixture, override: str, reason: str
) -> None:
    experiment = build_run(small_run_config(tmp_path, small_clip_folder, 4, override))
    assert reason in str(one_by_one_because(experiment))
    assert batched_clients(experiment) is None
    assert reason in caplog.text


def test_the_configuration_takes_a_number_auto_or_off() -> None:
    for written, meant in (("off", "off"), ("auto", "auto"), ("8", 8)):
        config = load_config("quickstart", [f"engine.batched_clients={written}"])
        assert config.engine.batched_clients == meant
    for wrong in ("1", "0", "true", "many"):
        with pytest.raises(UserError, match="engine.batched_clients"):
            load_config("quickstart", [f"engine.batched_clients={wrong}"])


def test_groups_are_as_even_as_can_be() -> None:
    sizes = [len(group) for group in split_evenly(list(range(100)), 8)]  # type: ignore[arg-type]
    assert sum(sizes) == 100
    assert set(sizes) <= {7, 8}
    assert split_evenly([], 8) == []

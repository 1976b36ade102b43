"""`lora.train_temperature`: CLIP's temperature trains and travels beside the adapters, if asked to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aggregator_simulation import RANK, adapter, scaling_of
from conftest import CLASS_NAMES
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file

from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from federated.methods import AGGREGATORS, Update, fedavg
from federated.methods.server_optimizers import SERVER_OPTIMIZERS, with_server_optimizer
from federated.results.records import read_run
from federated.rounds.run import Run, build_run
from federated.tools.inspection import describe_run
from federated.tools.trained_models import open_model
from lora.adapter_files import ADAPTER_FILE
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.adapters import adapter_layers
from lora.clip_wrapper import CLIPLoRAWrapper
from lora.config import LoRAConfig
from lora.injection import inject_lora
from lora.loading import load_full_checkpoint, load_lora_adapters
from lora.named import load_named_adapter
from lora.switching import disable_lora, enable_lora, merge_and_unload
from lora.verify import count_parameters, verify_gradients
from models.clip import FederatedCLIPModel
from models.errors import UserError
from models.temperature import MAX_LOG_TEMPERATURE
from models.training import Batch, TrainingSettings
from tests.lora_models import INSTALLED_BACKENDS, disturb, features, small_clip
from tests.real_federation import METHODS, NUM_CLIENTS, RealFederation, small_config, with_method
from tests.small_run import small_config as small_run_config

NAME = "clip.logit_scale"
ON = "lora.train_temperature=true"
RATES = {"fedavgm": "learning_rate"}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call


def wrapped(folder: Path, task: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = FederatedCLIPModel(
        str(folder), 3, class_names=CLASS_NAMES, task=task, strategy="lora", dtype=dtype
    )
    settings = {"r": 2, "lora_dropout": 0.0, "target_components": ["vision"], "train_temperature": True}
    return CLIPLoRAWrapper(model, LoRAConfig(**{**settings, **changes})).apply_lora_to_federated_model()


def batch_of(model: Any, pixel_batch: Batch) -> Batch:
    if model.task.name != "retrieval":
        return pixel_batch
    return {"pixel_values": pixel_batch["pixel_values"], **model.tokenize(["a cat", "red car"] * 6)}


def train(model: Any, batch: Batch, steps: int = 3) -> None:
    model.start_training(TrainingSettings(learning_rate=1e-2), steps)
    for _ in range(steps):
        model.train_step(batch)


# ---- on one machine


def test_it_is_frozen_and_at_home_by_default(small_clip_folder: Path, pixel_batch: Batch) -> None:
    model = wrapped(small_clip_folder, "zero_shot", train_temperature=False)
    before = model.logit_scale.item()
    train(model, pixel_batch)
    assert NAME not in model.exchanged_names
    assert model.logit_scale.item() == before
    assert count_parameters(model)["by_kind"]["temperature"] == 0


@pytest.mark.parametrize("task", ["classification", "zero_shot", "retrieval"])
def test_it_trains_travels_and_is_counted_when_asked_for(
    small_clip_folder: Path, pixel_batch: Batch, task: str
) -> None:
    model, without = (wrapped(small_clip_folder, task, train_temperature=on) for on in (True, False))
    assert set(model.exchanged_names) - set(without.exchanged_names) == {NAME}
    assert count_parameters(model)["by_kind"]["temperature"] == 1
    assert count_parameters(model)["trainable"] == count_parameters(without)["trainable"] + 1
    before = model.logit_scale.item()
    train(model, batch_of(model, pixel_batch))
    assert model.get_state()[NAME].item() == model.logit_scale.item() != before


BOUND = torch.tensor(MAX_LOG_TEMPERATURE).item()


def by_partial_state(model: Any) -> None:
    model.set_state({NAME: torch.tensor(9.0)}, partial=True)


def by_whole_state(model: Any) -> None:
    model.set_state({**model.get_state(), NAME: torch.tensor(9.0)})


def by_flat_state(model: Any) -> None:
    state = model.get_state()
    state[NAME].fill_(9.0)  # a view of its one vector
    model.set_state(state)


def by_parameters(model: Any) -> None:
    arrays = dict(zip(model.exchanged_names, model.get_parameters(), strict=True))
    model.set_parameters(list({**arrays, NAME: np.asarray(9.0, np.float32)}.values()))


@pytest.mark.parametrize("enters", [by_partial_state, by_whole_state, by_flat_state, by_parameters])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_at_100_or_below_however_it_enters(
    small_clip_folder: Path, pixel_batch: Batch, enters: Any, dtype: torch.dtype
) -> None:
    model = wrapped(small_clip_folder, "zero_shot", dtype=dtype)
    enters(model)
    assert model.logit_scale.item() == model.get_state()[NAME].item() == BOUND
    train(model, pixel_batch, steps=1)
    assert model.logit_scale.item() <= BOUND


def test_a_step_across_the_bound_ends_on_it(small_clip_folder: Path, pixel_batch: Batch) -> None:
    model = wrapped(small_clip_folder, "zero_shot")

    def pull() -> torch.Tensor:
        return -100.0 * model.logit_scale

    model.start_training(TrainingSettings(learning_rate=1.0, optimizer="sgd"), 1, extra_loss=pull)
    model.train_step(pixel_batch)
    assert model.logit_scale.item() == BOUND


def test_below_the_bound_a_state_enters_bit_for_bit(small_clip_folder: Path) -> None:
    model = wrapped(small_clip_folder, "zero_shot")
    model.set_state({NAME: torch.tensor(4.605)}, partial=True)
    assert model.logit_scale.item() == torch.tensor(4.605).item()


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_no_server_optimizer_takes_it_above_the_bound(name: str) -> None:
    rule = with_server_optimizer(fedavg(), SERVER_OPTIMIZERS[name](**{RATES.get(name, "eta"): 50.0}))
    server = rule.init({NAME: torch.tensor(4.0), "head.bias": torch.zeros(2)}, {})
    for _ in range(3):
        state = {n: t + 0.1 for n, t in server.state.items()}
        server = rule.apply(server, [Update(0, 3, state, {})])
        assert server.state[NAME].item() <= BOUND
    assert (server.state["head.bias"] > BOUND).all()  # nothing else is bounded


@pytest.mark.parametrize("method", AGGREGATORS)
def test_no_aggregate_is_above_the_bound(method: str) -> None:
    """A decoded update may be: int8 rounds, and a client may send what it likes."""
    rule = AGGREGATORS[method]()
    server = rule.init({**adapter(), NAME: torch.tensor(9.0).double()}, scaling_of(RANK))
    assert server.state[NAME].item() <= MAX_LOG_TEMPERATURE
    sent = rule.uplink(server.state, 1)
    if NAME in sent:
        state = {n: torch.tensor(9.0).double() if n == NAME else server.state[n] for n in sent}
        after = rule.apply(server, [Update(0, 3, state, scaling_of(RANK))])
        assert after.state[NAME].item() == MAX_LOG_TEMPERATURE
    else:
        assert method == "fedsa"


@pytest.mark.parametrize("backend", INSTALLED_BACKENDS)
def test_it_keeps_the_contract_of_adapters(backend: str, tmp_path: Path) -> None:
    model = small_clip(backend)
    base = model.logit_scale.item()
    inject_lora(model, LoRAConfig(r=2, train_temperature=True))
    disturb(model)
    trained = model.logit_scale.item()
    assert trained != base
    (model.logit_scale.exp() * features(model)).square().sum().backward()
    assert verify_gradients(model), str(verify_gradients(model))
    disable_lora(model)
    assert model.logit_scale.item() == base
    save_lora_adapters(model, tmp_path)  # what trains is saved, also while the base is in force
    enable_lora(model)
    assert model.logit_scale.item() == trained
    other = small_clip(backend)
    load_lora_adapters(other, tmp_path)
    assert other.logit_scale.item() == trained
    assert other.logit_scale.requires_grad
    merge_and_unload(model)
    assert model.logit_scale.item() == trained
    assert not model.logit_scale.requires_grad
    assert not adapter_layers(model)
    assert list(model.state_dict()) == list(small_clip(backend).state_dict())


def test_unwrapping_freezes_it_again_and_keeps_the_outputs(
    small_clip_folder: Path, pixel_batch: Batch
) -> None:
    model = wrapped(small_clip_folder, "zero_shot")
    train(model, pixel_batch)
    logits = model.zero_shot_logits(pixel_batch).detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.zero_shot_logits(pixel_batch), logits, rtol=0, atol=1e-4)
    assert merged.exchanged_names == ()
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_a_half_precision_base_trains_it_in_float32(
    small_clip_folder: Path, pixel_batch: Batch, tmp_path: Path
) -> None:
    model = wrapped(small_clip_folder, "zero_shot", dtype=torch.bfloat16)
    assert model.logit_scale.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    before = model.logit_scale.item()
    train(model, pixel_batch)
    trained = model.logit_scale.item()
    assert 0 < abs(trained - before) < 0.05
    save_lora_adapters(model, tmp_path)
    other = FederatedCLIPModel(
        str(small_clip_folder), 3, task="zero_shot", strategy="lora", dtype=torch.bfloat16
    )
    load_lora_adapters(other, tmp_path)
    assert other.logit_scale.item() == trained
    assert {p.dtype for p in model.merge_and_unload().parameters()} == {torch.bfloat16}


def test_a_head_alone_has_no_use_for_it() -> None:
    with pytest.raises(ValidationError, match=r"train_temperature.*target_components"):
        LoRAConfig.for_classification_head(train_temperature=True)
    with pytest.raises(UserError, match=r"train_temperature.*target_components"):
        load_config("quickstart", [ON, "lora.target_components=[classifier]"])


# ---- in files


def test_plain_peft_loads_the_folder_and_takes_the_temperature_over(tmp_path: Path) -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, train_temperature=True))
    disturb(model)
    save_lora_adapters(model, tmp_path)
    theirs = PeftModel.from_pretrained(small_clip(), str(tmp_path)).base_model.model.eval()
    assert theirs.logit_scale.item() == model.logit_scale.item()
    with torch.no_grad():
        torch.testing.assert_close(features(theirs), features(model), rtol=0, atol=1e-5)


def test_a_folder_without_it_loads_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    old, model = small_clip(), small_clip()
    inject_lora(old, LoRAConfig(r=2))
    disturb(old)
    save_lora_adapters(old, tmp_path)
    inject_lora(model, LoRAConfig(r=2, train_temperature=True))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
    load_lora_adapters(model, tmp_path)
    assert model.logit_scale.item() == 1.5
    assert torch.equal(features(model), features(old))


def test_a_model_whose_temperature_is_frozen_refuses_the_folder_and_says_what_to_set(tmp_path: Path) -> None:
    model, frozen = small_clip(), small_clip()
    inject_lora(model, LoRAConfig(r=2, train_temperature=True))
    save_lora_adapters(model, tmp_path)
    inject_lora(frozen, LoRAConfig(r=2))
    with pytest.raises(UserError, match=r"logit_scale.*train_temperature"):
        load_lora_adapters(frozen, tmp_path)
    load_named_adapter(frozen, tmp_path, "beside")  # embeddings have no temperature
    assert frozen.logit_scale.item() == small_clip().logit_scale.item()


def test_a_refused_load_leaves_a_half_precision_base_as_it_was(tmp_path: Path) -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, train_temperature=True))
    save_lora_adapters(model, tmp_path)
    (tmp_path / "base_delta.safetensors").write_bytes(b"no tensors")
    (tmp_path / "manifest.json").unlink()
    half = small_clip().to(torch.bfloat16)
    with pytest.raises(UserError, match="damaged"):
        load_lora_adapters(half, tmp_path)
    assert half.logit_scale.dtype == torch.bfloat16
    assert not half.logit_scale.requires_grad


def test_full_checkpoints_hold_it(small_clip_folder: Path, pixel_batch: Batch, tmp_path: Path) -> None:
    model = wrapped(small_clip_folder, "zero_shot")
    train(model, pixel_batch)
    save_full_checkpoint(model, tmp_path)
    other = FederatedCLIPModel(str(small_clip_folder), 3, task="zero_shot", strategy="lora")
    load_full_checkpoint(other, tmp_path)
    assert other.logit_scale.item() == model.logit_scale.item()
    assert NAME in other.exchanged_names


# ---- in a federation


@pytest.fixture(scope="module")
def experiment() -> Run:
    return build_run(small_config("task.name=zero_shot", ON))


@pytest.mark.parametrize("method", METHODS)
def test_every_aggregator_averages_it_by_the_clients_weights(
    experiment: Run, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = RealFederation(with_method(experiment, method), monkeypatch)
    federation.play(1, range(NUM_CLIENTS))
    start = experiment.initial_state[NAME].item()
    trained = [federation.trained[client][NAME].item() for client in range(NUM_CLIENTS)]
    assert len({start, *trained}) == NUM_CLIENTS + 1  # it moved, and for each client in its own way
    if method == "fedsa":  # private, as the head is there
        assert not any(NAME in delta for _, delta in federation.uplinks)
        return
    weights = [experiment.num_examples(client) for client in range(NUM_CLIENTS)]
    expected = float(np.average(trained, weights=weights))
    found = federation.strategy.server_state.state[NAME].item()
    assert found == pytest.approx(expected, abs=1e-6)
    federation.play(2, range(NUM_CLIENTS))
    assert federation.held[0][NAME].item() == found  # it came down with the next round


def test_it_adds_one_number_to_a_payload_and_nothing_when_off() -> None:
    off, on = (describe_run(small_config("task.name=zero_shot", *more)) for more in ((), (ON,)))
    assert (on.uplink_values, on.downlink_values) == (off.uplink_values + 1, off.downlink_values + 1)
    assert (on.uplink_bytes, on.downlink_bytes) == (off.uplink_bytes + 4, off.downlink_bytes + 4)
    assert on.counts["by_kind"]["temperature"] == 1


def test_a_run_counts_its_bytes_and_saves_it(tmp_path: Path) -> None:
    shared = ["task.name=zero_shot", "evaluation.clients=false", "lora.target_components=[vision]"]
    runs = {}
    for name, more in (("without", []), ("with", [ON])):
        config = small_run_config(tmp_path, overrides=[*shared, *more, f"output.name={name}"])
        runs[name] = run_experiment(config)
    totals = {name: read_run(run).ledger.total(direction="uplink") for name, run in runs.items()}
    assert (
        totals["with"].payload_bytes == totals["without"].payload_bytes + 2 * 3 * 4
    )  # rounds, clients, bytes
    assert "base_model.model.logit_scale" not in load_file(runs["without"] / "adapter" / ADAPTER_FILE)
    saved = load_file(runs["with"] / "adapter" / ADAPTER_FILE)["base_model.model.logit_scale"].item()
    model = open_model(runs["with"]).model
    assert model.logit_scale.item() == saved
    assert saved != pytest.approx(FederatedCLIPModel("tiny").logit_scale.item(), abs=1e-4)
    assert saved <= math.log(100) + 1e-6

"""Runs that start from an adapter: ours, or one of plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPModel

from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.simulation import run_experiment
from federated.rounds.global_model import load_global_state
from federated.rounds.run import build_run
from federated.tools.central import train_centrally
from federated.tools.evaluation import evaluate_source
from federated.tools.export import export_model
from federated.tools.trained_models import open_model
from lora.adapters import get_lora_state_dict, unwrap
from models.clip_loading import TINY_FOLDER
from models.errors import UserError
from tests.small_run import small_config

SHORT = (
    *("federation.rounds=1", "output.report=false", "data.max_train_samples=100"),
    *("evaluation.clients=false", "client.learning_rate=0.02"),
)
KEPT_BY_ALL = (
    "fedavg",
    "ffa",
    "flora",
    "fedex",
    "flexlora",
    "hetlora",
    "fed_sb",
    "fedsvd",
    "lora_fair",
    "dual",
)


def short(folder: Path, *overrides: str) -> ExperimentConfig:
    return small_config(folder, overrides=[*SHORT, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(short(tmp_path_factory.mktemp("trained"), "output.name=first"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unwrap(model).logits({"pixel_values": pixels})


def peft_folder(folder: Path, r: int = 8) -> Path:
    """An adapter as plain PEFT writes it, with B other than zero."""
    config = LoraConfig(
        r=r, lora_alpha=16, target_modules=r"vision_model\..*\.(q_proj|k_proj|v_proj|out_proj)"
    )
    model = get_peft_model(CLIPModel.from_pretrained(TINY_FOLDER), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("aggregator", KEPT_BY_ALL)
def test_round_0_is_the_adapter_under_every_rule(aggregator: str, trained: Path, tmp_path: Path) -> None:
    run = build_run(short(tmp_path, f"model.adapter={trained}", f"aggregation.name={aggregator}"))
    load_global_state(run, run.initial_server_state)
    torch.testing.assert_close(logits(run.model), logits(open_model(trained).model), atol=2e-4, rtol=1e-4)


def test_a_run_that_goes_on_begins_where_the_first_ended_and_says_what_it_began_with(
    trained: Path, tmp_path: Path
) -> None:
    folder = run_experiment(short(tmp_path, f"model.adapter={trained}"))
    before = json.loads((trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["server_round"] == 0
    assert first["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert load_config(folder / "config.yaml").model.adapter == str(trained)
    recorded = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["adapter"]
    manifest = json.loads((trained / "adapter" / "manifest.json").read_text(encoding="utf-8"))
    assert recorded == {"path": str(trained), "sha256": manifest["files"]["adapter_model.safetensors"]}


def test_the_run_stays_usable_when_the_adapter_that_it_began_with_is_gone(
    trained: Path, tmp_path: Path
) -> None:
    start = export_model(trained, tmp_path / "start")
    folder = run_experiment(short(tmp_path, f"model.adapter={start}"))
    start.rename(tmp_path / "elsewhere")
    _, report = evaluate_source(folder)
    assert "accuracy" in report
    assert open_model(folder).uses_head


def test_central_training_starts_from_an_adapter(trained: Path, tmp_path: Path) -> None:
    folder = train_centrally(
        short(tmp_path, f"model.adapter={trained}", "train.steps=1", "output.name=central")
    )
    first = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    last = json.loads((trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert first["accuracy"] == last["accuracy"]


def test_evaluate_takes_the_configuration_s_adapter(trained: Path, tmp_path: Path) -> None:
    overrides = ["data.max_test_samples=100", f"output.root={tmp_path}"]
    by_key, _ = evaluate_source("quickstart", [*overrides, f"model.adapter={trained}"], output=tmp_path / "a")
    by_option, _ = evaluate_source(
        "quickstart", overrides, adapter=trained / "adapter", output=tmp_path / "b"
    )
    results = [
        json.loads((f / "evaluation_results.json").read_text(encoding="utf-8")) for f in (by_key, by_option)
    ]
    assert results[0]["trained"] == str(trained / "adapter")
    assert results[0]["accuracy"] == results[1]["accuracy"]


def test_an_adapter_of_plain_peft_is_a_start(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    targets = "lora.target_modules=[q_proj,k_proj,v_proj,out_proj]"
    run = build_run(short(tmp_path, f"model.adapter={folder}", targets))
    wanted = open_model(folder).model
    found, given = get_lora_state_dict(run.model), get_lora_state_dict(wanted)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in found)
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.r=4", r"made with lora\.r=8, the model here with lora\.r=4; set lora\.r=8"),
        ("lora.lora_alpha=8", r"set lora\.lora_alpha=16"),
        ("lora.target_modules=[fc1]", r"set lora\.target_modules=\[q_proj,k_proj,v_proj,out_proj\]"),
        ("model.pretrained=false", "other weights"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_setting_that_would(
    override: str, said: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        build_run(short(tmp_path, f"model.adapter={trained}", override))


def test_peft_s_adapter_of_another_rank_is_refused_with_the_setting_that_would_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set lora\.r=2"):
        build_run(short(tmp_path, f"model.adapter={peft_folder(tmp_path / 'peft', r=2)}"))


def test_an_adapter_beside_a_changed_base_is_refused_with_the_remedy(tmp_path: Path) -> None:
    flora = run_experiment(short(tmp_path, "aggregation.name=flora", "output.name=flora"))
    with pytest.raises(UserError, match=r"--merge` and set model\.model_name"):
        build_run(short(tmp_path, f"model.adapter={flora}"))
    merged = export_model(flora, tmp_path / "merged", merge=True)
    run = build_run(short(tmp_path, f"model.model_name={merged}", "model.adapter=null"))
    assert not any(
        tensor.any() for name, tensor in get_lora_state_dict(run.model).items() if "lora_B" in name
    )


def test_an_adapter_without_a_model_that_takes_one_is_refused_by_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.adapter goes with model\.type=clip_lora"):
        short(tmp_path, "model.adapter=somewhere", "model.type=clip")


def test_a_seed_that_would_score_rows_which_the_adapter_saw_is_refused(tmp_path: Path) -> None:
    digits = (
        *("data.source=digits", "model.num_classes=null", f"output.root={tmp_path}", "client.local_steps=1"),
        *("partition.name=iid", "partition.options={}", "partition.num_clients=2", *SHORT),
    )
    first = run_experiment(load_config("quickstart", [*digits, "output.name=digits"]))
    with pytest.raises(UserError, match="seed 0, which also drew the test rows"):
        build_run(load_config("quickstart", [*digits, "seed=1", f"model.adapter={first}"]))


def test_local_steps_are_the_same_with_gradient_checkpointing(tmp_path: Path) -> None:
    states = []
    for checkpointing in ("false", "true"):
        config = short(
            tmp_path,
            f"client.gradient_checkpointing={checkpointing}",
            "lora.target_components=[vision,text]",
            "task.name=zero_shot",
            f"output.name=checkpointing_{checkpointing}",
            *("client.optimizer=sgd", "client.momentum=0", "client.learning_rate=0.1"),
        )
        folder = run_experiment(config)
        states.append(get_lora_state_dict(open_model(folder).model))
    assert any(tensor.any() for name, tensor in states[0].items() if "lora_B" in name)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_reaches_a_model_without_adapters(tmp_path: Path) -> None:
    from lora.gradient_checkpointing import is_gradient_checkpointing

    run = build_run(short(tmp_path, "client.gradient_checkpointing=true", "model.type=clip"))
    assert is_gradient_checkpointing(run.model)

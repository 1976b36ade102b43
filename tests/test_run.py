"""Whole runs on the bundled model and data: what they write, that they repeat, what they count."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import federated.engines.simulation
from federated.communication.ledger import Ledger
from federated.config.config_files import load_config
from federated.engines.inprocess import InProcessGrid
from federated.engines.simulation import run_experiment
from federated.results.run_folder import peak_memory_bytes
from federated.rounds.checkpoint import latest_checkpoint, load_server_checkpoint
from federated.rounds.global_model import load_global_state
from federated.rounds.run import build_run
from models.clip_loading import TINY_FOLDER
from tests.small_run import lines_without_times, small_config


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(small_config(tmp_path_factory.mktemp("runs")))


def test_a_run_folder_holds_everything_the_design_promises(quick_run: Path) -> None:
    names = {path.name for path in quick_run.iterdir()}
    promised = {"config.yaml", "environment.json", "summary.json", "metrics.jsonl", "communication.csv"}
    promised |= {"partition.json", "checkpoint", "adapter", "report.html", "plots"}
    assert promised <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith((".part", ".partial")) for name in names)


def test_the_saved_configuration_reproduces_the_run_bit_by_bit_in_any_client_order(
    quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backwards(InProcessGrid):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, execution_order=lambda messages: list(reversed(messages)))

    monkeypatch.setattr(federated.engines.simulation, "InProcessGrid", Backwards)
    again = run_experiment(load_config(quick_run / "config.yaml", [f"output.root={tmp_path}"]))
    assert lines_without_times(again) == lines_without_times(quick_run)
    for name in ("adapter/adapter_model.safetensors", "adapter/head.safetensors", "communication.csv"):
        assert (again / name).read_bytes() == (quick_run / name).read_bytes(), name


def test_another_seed_gives_another_run(quick_run: Path, tmp_path: Path) -> None:
    other = run_experiment(small_config(tmp_path, overrides=["seed=1"]))
    assert lines_without_times(other) != lines_without_times(quick_run)


def test_the_ledger_adds_up_to_what_the_round_lines_and_the_summary_say(quick_run: Path) -> None:
    ledger = Ledger.read_csv(quick_run / "communication.csv")
    summary = json.loads((quick_run / "summary.json").read_text(encoding="utf-8"))
    lines = lines_without_times(quick_run)
    for direction in ("uplink", "downlink"):
        for count in ("payload_bytes", "wire_bytes"):
            total = sum(getattr(row, count) for row in ledger.rows if row.direction == direction)
            assert total == summary["communication"][f"{direction}_{count}"]
            assert total == sum(line[f"{direction}_{count}"] for line in lines)


def test_the_accuracies_of_the_classes_add_up_to_the_final_accuracy(quick_run: Path) -> None:
    summary = json.loads((quick_run / "summary.json").read_text())
    rows, partition = summary["per_class"], json.loads((quick_run / "partition.json").read_text())
    assert [row["name"] for row in rows] == partition["class_names"]
    right = [row["accuracy"] * row["num_examples"] for row in rows]
    assert right == pytest.approx([round(number) for number in right])
    assert sum(right) / sum(row["num_examples"] for row in rows) == pytest.approx(summary["final"])


def test_a_training_payload_is_four_bytes_for_each_exchanged_value(quick_run: Path) -> None:
    summary = json.loads((quick_run / "summary.json").read_text(encoding="utf-8"))
    for row in Ledger.read_csv(quick_run / "communication.csv").select(phase="train"):
        assert row.parameters == summary["parameters"]["exchanged"]
        assert row.payload_bytes == 4 * row.parameters
        assert row.payload_bytes < row.wire_bytes < row.payload_bytes + 2500


def test_evaluation_traffic_is_counted(quick_run: Path) -> None:
    ledger = Ledger.read_csv(quick_run / "communication.csv")
    last = ledger.total(phase="evaluate", direction="downlink", server_round=2)
    assert last.transfers == 3
    assert (
        last.payload_bytes
        == 3 * 4 * json.loads((quick_run / "summary.json").read_text())["parameters"]["exchanged"]
    )


def test_the_adapter_loads_in_plain_peft_and_gives_the_same_features(quick_run: Path) -> None:
    experiment = build_run(load_config(quick_run / "config.yaml"))
    load_global_state(experiment, load_server_checkpoint(latest_checkpoint(quick_run)).server)
    pixel_values = experiment.reader.test_images.pixel_values(range(8))
    plain = PeftModel.from_pretrained(
        transformers.CLIPModel.from_pretrained(TINY_FOLDER), quick_run / "adapter"
    )
    with torch.no_grad():
        ours = experiment.model.encode_image(pixel_values)
        theirs = plain.get_image_features(pixel_values=pixel_values).pooler_output
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not any("head" in name for name in load_file(quick_run / "adapter" / "adapter_model.safetensors"))
    assert set(load_file(quick_run / "adapter" / "head.safetensors")) == {"head.weight", "head.bias"}


def test_full_fine_tuning_measures_the_other_side_of_the_comparison(quick_run: Path, tmp_path: Path) -> None:
    full = run_experiment(small_config(tmp_path, "full_finetune"))
    ours = json.loads((quick_run / "summary.json").read_text(encoding="utf-8"))
    theirs = json.loads((full / "summary.json").read_text(encoding="utf-8"))
    predicted = {row["name"]: row for row in ours["communication"]["comparison"]}["full model FedAvg"]
    ledger = Ledger.read_csv(full / "communication.csv")
    assert ledger.total().payload_bytes == predicted["total_bytes"]
    assert theirs["parameters"]["exchanged"] == theirs["parameters"]["total"]
    assert theirs["communication"]["one_off_base_bytes"] == 0
    assert ours["communication"]["comparison"][1:] == theirs["communication"]["comparison"][1:]


def test_head_only_sends_the_head_alone(tmp_path: Path) -> None:
    run = run_experiment(small_config(tmp_path, "head_only"))
    exchanged = json.loads((run / "summary.json").read_text(encoding="utf-8"))["parameters"]["exchanged"]
    assert exchanged == 128 * 10 + 10


def test_rounds_that_clients_scored_say_so_and_the_best_is_one_of_them(tmp_path: Path) -> None:
    overrides = ["aggregation.name=fedsa", "evaluation.clients_every=1", "output.report=false"]
    run = run_experiment(small_config(tmp_path, overrides=overrides))
    before, *rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "scored_by" not in before
    assert [line["scored_by"] for line in rounds] == ["clients"] * len(rounds)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["best"] == max(line["accuracy"] for line in rounds)
    assert summary["zero_shot"] == before["accuracy"]


def test_a_failing_client_is_named_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = federated.engines.simulation.train_locally

    def breaks_for_client_1(experiment: Any, assignment: Any, held: Any) -> Any:
        if assignment.client_id == 1:
            raise MemoryError("no memory left on this client")
        return original(experiment, assignment, held)

    monkeypatch.setattr(federated.engines.simulation, "train_locally", breaks_for_client_1)
    run = run_experiment(small_config(tmp_path))
    first_round = lines_without_times(run)[1]
    assert [failure["client_id"] for failure in first_round["failed"]] == [1]
    assert "no memory left" in first_round["failed"][0]["reason"]
    assert set(first_round["clients"]) == {"0", "2"}
    failed = list(
        Ledger.read_csv(run / "communication.csv").select(phase="train", status="failed", server_round=1)
    )
    assert [(row.client_id, row.direction) for row in failed] == [(1, "downlink"), (1, "uplink")]


def test_a_round_in_which_all_clients_fail_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(federated.engines.simulation, "train_locally", breaks)
    lines = lines_without_times(run_experiment(small_config(tmp_path)))
    assert lines[1]["skipped"] is True
    assert lines[1]["accuracy"] == lines[0]["accuracy"]


def test_a_run_without_its_report_leaves_everything_else(tmp_path: Path) -> None:
    path = run_experiment(small_config(tmp_path, overrides=["output.report=false", "federation.rounds=1"]))
    assert not (path / "report.html").exists()
    assert (path / "summary.json").is_file()
    assert (path / "adapter").is_dir()


def test_peak_memory_counts_a_child_that_still_runs() -> None:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    touched = "x[::4096] = bytes(len(x[::4096]))"
    hold = f"x = bytearray({own + 50_000_000}); {touched}; print(len(x), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > own
        assert peak_memory_bytes() > own + 50_000_000
        child.communicate("\n")
    assert peak_memory_bytes() > own + 50_000_000  # ended, it counts as well

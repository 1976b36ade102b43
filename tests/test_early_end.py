"""A federated run that ends when its global model no longer improves on the validation rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from real_federation import NUM_CLIENTS, small_config
from small_run import lines_without_times

from federated.engines.simulation import run_experiment
from federated.results.records import read_run
from federated.results.report_cards import notices
from federated.rounds.compatibility import build_aggregator
from federated.rounds.early_stopping import BestSoFar
from models.errors import UserError

KEY = "federation.early_stopping"


def run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, Any], Path]:
    settings = "output.report=false", f"output.root={folder}", "data.max_validation_samples=40"
    path = run_experiment(small_config(*settings, *overrides))
    return lines_without_times(path), json.loads((path / "summary.json").read_text()), path


def test_a_run_ends_when_patience_does_and_says_why(tmp_path: Path) -> None:
    """No gain is as large as 1, so that round 0 stays the best: two evaluations later it is enough."""
    lines, summary, path = run(
        tmp_path, f"{KEY}.patience=2", f"{KEY}.minimum_change=1", "federation.rounds=9"
    )
    assert [line["server_round"] for line in lines] == [0, 1, 2]
    assert all(0 <= line["validation_accuracy"] <= 1 for line in lines)
    assert summary["rounds"] == 2
    assert summary["stopped"].startswith(
        "stopped after round 2 of 9: validation accuracy has not improved by more than 1 in 2"
    )
    evaluated = [c for c, entry in lines[-1]["clients"].items() if "eval_examples" in entry]
    assert len(evaluated) == NUM_CLIENTS  # as after any last round
    assert (path / "adapter" / "manifest.json").is_file()
    assert any("Stopped after round 2" in notice for notice in notices(read_run(path)))


def test_without_patience_running_out_a_run_is_the_run_without_early_stopping(tmp_path: Path) -> None:
    rounds = "federation.rounds=2"
    lines, summary, _ = run(tmp_path / "with", f"{KEY}.patience=2", rounds)
    bare, plain, _ = run(tmp_path / "without", rounds)
    assert "stopped" not in summary
    assert [{k: v for k, v in line.items() if not k.startswith("validation_")} for line in lines] == bare
    assert summary["final"] == plain["final"]


def test_evaluations_count_not_rounds(tmp_path: Path) -> None:
    settings = f"{KEY}.patience=1", f"{KEY}.minimum_change=1", "evaluation.every=2", "federation.rounds=5"
    lines, _, _ = run(tmp_path, *settings)
    assert ["validation_accuracy" in line for line in lines] == [True, False, True]


def test_no_validation_split_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"patience=1 needs a validation split.*validation_fraction=0\.1"):
        run(tmp_path, f"{KEY}.patience=1", "data.source=digits", "data.validation_fraction=0")
    assert not list(tmp_path.iterdir())


def test_a_method_without_a_global_model_is_refused() -> None:
    with pytest.raises(UserError, match="fedsa has none"):
        build_aggregator(small_config(f"{KEY}.patience=1", "aggregation.name=fedsa"))


def test_a_metric_that_is_not_evaluated_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{KEY}\.metric=recall: .* accuracy, loss"):
        run(tmp_path, f"{KEY}.patience=1", f"{KEY}.metric=recall")


def test_what_was_seen_goes_into_a_commit_and_back() -> None:
    values = [0.1, 0.5, 0.45, 0.52, 0.3, 0.2]
    whole = BestSoFar("accuracy", 3, 0.05)
    for epoch, value in enumerate(values):
        whole.update(epoch, value)
    for cut in range(len(values)):
        before, after = BestSoFar("accuracy", 3, 0.05), BestSoFar("accuracy", 3, 0.05)
        for epoch, value in enumerate(values[:cut]):
            before.update(epoch, value)
        after.restore(json.loads(json.dumps(before.state())))
        for epoch, value in enumerate(values[cut:], start=cut):
            after.update(epoch, value)
        assert after == whole
        assert after.is_exhausted
    with pytest.raises(UserError, match="early stopping"):
        whole.restore({"best": "high"})

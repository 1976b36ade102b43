"""Faults, simulated time and an early end in runs that go on: the bytes of one that never stopped."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.crashes import results_of, tiny_config
from federated.engines.simulation import fork_experiment, resume_experiment, run_experiment
from federated.results.run_status import in_words, read_status
from models.errors import UserError
from tests.crash_points import built_once, stopped_after

UNDER = (
    "federation.cohort_size=3",
    *(
        f"faults.{fault}=0.12"
        for fault in ("dropout", "crash_after_training", "torn_payload", "duplicate", "late")
    ),
    "clock.deadline_seconds=20",
    "clock.uplink_mbps={name: lognormal, median: 2, sigma: 0.7}",
    "clock.availability=0.8",
)
EARLY = ("federation.rounds=9", "federation.early_stopping={patience: 3, minimum_change: 1}")


@pytest.fixture(scope="module", autouse=True)
def _one_build() -> Iterator[None]:
    with built_once():
        yield


@pytest.mark.parametrize("overrides", [UNDER, EARLY], ids=["faults and clock", "early end"])
def test_a_run_under_conditions_goes_on_with_the_same_bytes(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results_of(run_experiment(tiny_config(tmp_path / "whole", "fedavg", *overrides)))
    run = stopped_after(tiny_config(tmp_path / "stopped", "fedavg", *overrides), 2, monkeypatch)
    status = read_status(run)
    assert (status.state, status.can_be_resumed) == ("interrupted", True)
    assert any(f"fedlora resume {run}" in line.plain for line in in_words(status))
    assert results_of(resume_experiment(run)) == expected
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if overrides is EARLY:
        assert summary["stopped"].startswith("stopped after round 3 of 9")
    else:
        assert summary["failures"]
        with (run / "communication.csv").open(encoding="utf-8") as file:
            assert all(row["simulated_seconds"] for row in csv.DictReader(file))


def test_a_clock_cannot_begin_in_the_middle_of_a_run(tmp_path: Path) -> None:
    run = run_experiment(tiny_config(tmp_path, "fedavg", "output.keep_checkpoints=4"))
    with pytest.raises(UserError, match=r"clock.* cannot change"):
        fork_experiment(run, 1, "branch", ["clock.latency_seconds=1"])
    branch = fork_experiment(run, 1, "branch", ["faults.dropout=1"])
    lines = [json.loads(text) for text in (branch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(line["failed"]) for line in lines] == [0, 0, 2, 2]

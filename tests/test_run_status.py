"""What ``fedlora status`` says of a run, from the files of its folder alone."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from command import fedlora
from real_federation import small_config

from benchmarks.silent import SilentDisplay
from federated.engines.simulation import run_experiment
from federated.results import run_status
from federated.results.run_place import claim, release
from federated.results.run_status import RunStatus, follow, in_words, read_status
from models.errors import UserError

SETTINGS = ("output.report=false", "faults.dropout=0.5", "clock.deadline_seconds=5", "federation.rounds=2")


def written(folder: Path, *lines: dict[str, object]) -> Path:
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text("federation: {rounds: 7}\n", encoding="utf-8")
    return folder


def a_round(number: int, **more: object) -> dict[str, object]:
    counts = {"uplink_wire_bytes": 1000, "downlink_wire_bytes": 500, "seconds": 2.0, "cohort": [0, 1]}
    return {"server_round": number, "accuracy": 0.1 * number, "clients": {}, "failed": [], **counts, **more}


def text_of(status: RunStatus) -> str:
    return "\n".join(line.plain for line in in_words(status))


def test_a_real_run_is_told_of_while_it_runs_and_when_it_has_ended(tmp_path: Path) -> None:
    seen = []

    class Asking(SilentDisplay):
        def round_done(self, metrics: object) -> None:
            seen.append(read_status(tmp_path / "asked"))

    config = small_config(*SETTINGS, f"output.root={tmp_path}", "output.name=asked")
    folder = run_experiment(config, display=Asking())  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(s.state, s.server_round, s.rounds) for s in seen] == [("running", n, 2) for n in range(3)]
    assert all(status.process for status in seen)
    ended = read_status(folder)
    assert (ended.state, ended.process, ended.server_round, ended.rounds) == ("ended", None, 2, 2)
    assert ended.value == lines[-1]["accuracy"]
    assert ended.wire_bytes == sum(line["uplink_wire_bytes"] + line["downlink_wire_bytes"] for line in lines)
    assert ended.num_failed == sum(len(line["failed"]) for line in lines)
    assert ended.simulated_seconds == lines[-1]["simulated_seconds_total"]
    assert "dropout (on purpose)" in text_of(ended)
    assert not ended.can_be_resumed


def test_a_copy_on_another_machine_says_the_same_but_that_it_runs(tmp_path: Path) -> None:
    run = written(tmp_path / "run", a_round(0), a_round(1))
    lock = claim(tmp_path / "other", overwrite=False)
    shutil.copy(tmp_path / "other" / "run.lock", run / "run.lock")
    release(tmp_path / "other", lock)
    status = read_status(run)
    assert (status.state, status.process, status.server_round, status.rounds) == ("interrupted", None, 1, 7)
    assert "does not run on this machine and has not ended, last written" in text_of(status)


def test_a_run_that_left_a_commit_can_be_resumed(tmp_path: Path) -> None:
    run = written(tmp_path / "run", a_round(0), a_round(1))
    assert not read_status(run).can_be_resumed
    (run / "checkpoint" / "commit_001_000001").mkdir(parents=True)
    (run / "checkpoint" / "commit_001_000001" / "manifest.json").write_text("{}")
    assert read_status(run).can_be_resumed
    assert f"fedlora resume {run}" in text_of(read_status(run))


def test_words_are_of_the_last_round(tmp_path: Path) -> None:
    failed = [{"client_id": n, "reason": f"reason {n}\nand more"} for n in range(7)]
    run = written(tmp_path / "run", a_round(0), a_round(1, failed=failed[:1]), a_round(2, failed=failed))
    text = text_of(read_status(run))
    assert "round 2 of 7, accuracy 20.0 %, 4.50 kB sent, 6.00 s, 8 failures, 7 in this round" in text
    assert "client 4: reason 4\n  and 2 more" in text


def test_nothing_is_made_up_before_a_round_is_done(tmp_path: Path) -> None:
    status = read_status(written(tmp_path / "run"))
    assert (status.server_round, status.metric, status.value) == (None, None, None)
    assert "no round is done" in text_of(status)


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        read_status(tmp_path)


def test_following_tells_of_each_round_once_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    lock = claim(folder, overwrite=False)
    metrics = folder / "metrics.jsonl"
    metrics.write_text("")
    steps = iter(["", json.dumps(a_round(0)) + "\n", "", json.dumps(a_round(1)) + "\n", "end"])

    def meanwhile(seconds: float) -> None:
        text = next(steps)
        if text == "end":
            (folder / "summary.json").write_text('{"headline_metric": "accuracy", "rounds": 1}')
            release(folder, lock)
        else:
            metrics.write_text(metrics.read_text() + text)

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert run_status.time is time
    told = [(status.state, status.server_round) for status in follow(folder)]
    assert told == [("running", None), ("running", 0), ("running", 1), ("ended", 1)]


def test_the_command_prints_words_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", a_round(0), a_round(3))
    code, out, _ = fedlora(capsys, "status", run)
    assert code == 0
    assert "round 3 of 7" in out
    code, out, _ = fedlora(capsys, "status", run, "--json", "--follow")
    assert code == 0
    assert json.loads(out)["server_round"] == 3
    code, _, err = fedlora(capsys, "status", tmp_path)
    assert code == 2
    assert "is not a run folder" in err

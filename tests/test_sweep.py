"""Claims about running a study: what is finished stays, what fails is named, a killed sweep ends the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from federated.config.config_files import dump_config
from federated.config.schema import ExperimentConfig
from federated.results.records import RunRecord
from federated.results.study_page import write_page, write_tables
from federated.tools import sweep_runs
from federated.tools.study_plan import PlannedRun, Study, plan_study
from federated.tools.sweep_runs import run_study
from models.errors import UserError
from tests.command import fedlora
from tests.fake_run import FakeRun
from tests.small_run import SMALL

METHODS = {"aggregation.name": ["fedavg", "ffa"]}
TABLES = ("tables.md", "tables.tex", "results.csv")


@dataclass
class Told:
    """What a watcher was told."""

    kept: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    most_at_once: int = 0

    def runs_planned(self, num_runs: int, what: str) -> None: ...

    def tick(self, running: Sequence[str]) -> None:
        self.most_at_once = max(self.most_at_once, len(running))

    def run_done(self, run: PlannedRun, record: RunRecord, *, kept: bool) -> None:
        (self.kept if kept else self.done).append(run.name)

    def run_failed(self, run: PlannedRun, reason: str) -> None:
        self.failed[run.name] = reason

    def value_chosen(self, variant: str, key: str, value: Any) -> None:
        self.chosen[variant] = value


def accuracies(run: PlannedRun) -> tuple[float, ...]:
    """A curve that depends on the settings alone."""
    bonus = 0.04 if run.config.aggregation.name == "ffa" else 0.0
    return tuple(0.2 + 0.1 * t + bonus * t + 0.01 * ((7 * run.seed + t) % 3) for t in range(4))


def fake(run: PlannedRun) -> None:
    """Leave what a run leaves, all at once."""
    making = run.folder.parent.parent / "logs" / f".{run.name}"
    FakeRun(accuracies=accuracies(run), client_metrics=False).write(making)
    (making / "config.yaml").write_text(dump_config(run.config))
    shutil.rmtree(run.folder, ignore_errors=True)
    making.rename(run.folder)


def study_in(folder: Path, **given: Any) -> Study:
    settings = {"grid": METHODS, "seeds": 3, **given}
    return plan_study("quickstart", [f"output.root={folder}", "output.name=study"], **settings)


def tables_of(study: Study, do: Callable[[PlannedRun], None] = fake, **options: Any) -> list[bytes]:
    results = run_study(study, Told(), do=do, **options)
    write_tables(results, study.folder, target="45%", budget="20MB")
    return [(study.folder / name).read_bytes() for name in TABLES]


def test_what_is_finished_is_kept_and_the_rest_is_run(tmp_path: Path) -> None:
    study, told = study_in(tmp_path), Told()
    run_study(study, told, do=fake)
    names = [run.name for run in study.candidates()]
    assert (told.done, told.kept) == (names, [])
    (study.folder / "runs" / names[1] / "summary.json").unlink()  # broken: it did not come to its end
    shutil.rmtree(study.folder / "runs" / names[4])
    again = Told()
    run_study(study, again, do=fake)
    assert again.done == [names[1], names[4]]
    assert sorted(again.kept) == sorted(set(names) - {names[1], names[4]})


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    def do(run: PlannedRun) -> None:
        if run.name == "fedavg-seed1":
            raise UserError("the data is gone:\n  look for it")
        if run.name == "ffa-seed0":
            raise RuntimeError("out of luck")
        if run.name == "ffa-seed2":
            os.kill(os.getpid(), signal.SIGKILL)
        fake(run)

    study, told = study_in(tmp_path), Told()
    results = run_study(study, told, do=do, jobs=2)
    assert results.failures == told.failed
    logs = study.folder / "logs"
    assert told.failed == {
        "fedavg-seed1": f"the data is gone: look for it (log: {logs / 'fedavg-seed1.log'})",
        "ffa-seed0": f"RuntimeError: out of luck (log: {logs / 'ffa-seed0.log'})",
        "ffa-seed2": f"killed by SIGKILL (log: {logs / 'ffa-seed2.log'})",
    }
    assert "Traceback" in (logs / "ffa-seed0.log").read_text()
    assert [sorted(variant.runs) for variant in results.variants] == [[0, 2], [1]]
    page = write_page(results, study.folder, *write_tables(results, study.folder)).read_text()
    assert "out of luck" in page
    assert "| 2 of 3 |" in (study.folder / "tables.md").read_text()


def test_as_many_runs_go_at_a_time_as_jobs_each_with_its_share_of_threads(tmp_path: Path) -> None:
    cores = os.cpu_count() or 1

    def do(run: PlannedRun) -> None:
        time.sleep(0.05)
        assert run.config.engine.threads == max(1, min(64, cores // 3))
        fake(run)

    study = study_in(tmp_path)
    study = replace(
        study,
        base=study.base.model_copy(update={"engine": study.base.engine.model_copy(update={"threads": 64})}),
    )
    told = Told()
    results = run_study(study, told, do=do, jobs=3)
    assert (results.failures, told.most_at_once) == ({}, 3)


def test_finished_runs_with_other_settings_are_not_replaced_unasked(tmp_path: Path) -> None:
    run_study(study_in(tmp_path), Told(), do=fake)
    other = plan_study(
        "quickstart", [f"output.root={tmp_path}", "output.name=study", "lora.r=4"], grid=METHODS
    )
    with pytest.raises(UserError, match=r"other settings: fedavg-seed0, .* and 1 more\. Pass --overwrite"):
        run_study(other, Told(), do=fake)
    told = Told()
    run_study(other, told, do=fake, overwrite=True)
    assert (len(told.done), told.kept) == (6, [])


def test_a_study_is_run_by_one_sweep_at_a_time(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    with sweep_runs._alone(study.folder), pytest.raises(UserError, match="in use by another sweep"):
        run_study(study, Told(), do=fake)


def _gone(pids: Iterable[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_sweep_killed_at_any_point_and_started_again_gives_the_same_table(
    after: int, tmp_path: Path
) -> None:
    def slow(run: PlannedRun) -> None:
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(0.03)
        fake(run)
        (tmp_path / f"{run.name}.done").touch()

    expected = tables_of(study_in(tmp_path / "whole"))
    study = study_in(tmp_path / "killed")
    process = multiprocessing.get_context("fork").Process(
        target=run_study, args=(study, Told()), kwargs={"do": slow, "jobs": 2}
    )
    process.start()
    pids: list[int] = []
    while len(list(tmp_path.glob("*.done"))) < after or not pids:
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        time.sleep(0.002)
    process.kill()
    process.join()
    for _ in range(500):  # its runs end with it
        if _gone(int(path.stem) for path in tmp_path.glob("*.pid")):
            break
        time.sleep(0.01)
    told = Told()
    results = run_study(study, told, do=fake)
    assert len(told.kept) >= after
    write_tables(results, study.folder, target="45%", budget="20MB")
    assert [(study.folder / name).read_bytes() for name in TABLES] == expected


@pytest.mark.parametrize(
    ("there", "same", "expected"),
    [(True, True, "resume"), (True, False, "begin"), (False, True, "begin"), (None, True, "begin")],
)
def test_a_run_that_was_cut_off_goes_on_where_its_commit_has_the_same_settings(
    there: bool | None, same: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There: a whole commit; None: not even a folder."""
    run = next(study_in(tmp_path).candidates())
    if there is not None:
        run.folder.mkdir(parents=True)
        config = run.config if same else run.config.model_copy(update={"seed": 9})
        (run.folder / "config.yaml").write_text(dump_config(config))
    done: list[str] = []

    def read_latest(checkpoint: Path) -> None:
        if not there:
            raise UserError("no commit")

    monkeypatch.setattr(sweep_runs, "read_latest", read_latest)
    monkeypatch.setattr(sweep_runs, "resume_experiment", lambda folder: done.append("resume"))
    monkeypatch.setattr(sweep_runs, "run_experiment", lambda config, overwrite: done.append("begin"))
    sweep_runs.do_run(run)
    assert done == [expected]


# ---- tuning


def test_a_value_is_chosen_by_validation_and_never_by_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [1e-3, 2e-3, 4e-3]
    validation = {("fedavg", 1e-3): 0.5, ("fedavg", 2e-3): 0.7, ("fedavg", 4e-3): 0.7, ("ffa", 1e-3): 0.9}

    def do(run: PlannedRun) -> None:
        if run.variant == "ffa" and run.chosen == 4e-3:
            raise UserError("diverged")
        fake(run)  # its test curve is the same for all rates

    def evaluate(folder: Path, *, split: str, overwrite: bool) -> None:
        assert split == "validation"
        name, rate = (
            folder.name.split("-")[0],
            float(folder.name.split("learning_rate=")[1].split("-seed")[0]),
        )
        (folder / "evaluation_validation").mkdir()
        value = {"accuracy": validation.get((name, rate), 0.1)}
        (folder / "evaluation_validation" / "evaluation_results.json").write_text(json.dumps(value))

    monkeypatch.setattr(sweep_runs, "evaluate_source", evaluate)
    study = study_in(tmp_path, tune={"key": "client.learning_rate", "values": rates}, seeds=2)
    told = Told()
    results = run_study(study, told, do=do)
    assert told.chosen == {"fedavg": 2e-3, "ffa": 1e-3}
    assert [variant.chosen for variant in results.variants] == [2e-3, 1e-3]
    assert list(told.failed) == ["ffa-learning_rate=0.004-seed0"]
    runs = sorted(path.name for path in (study.folder / "runs").iterdir())
    assert len(runs) == 5 + 2  # five values ran with seed 0, and seed 1 with what was chosen
    assert {"fedavg-learning_rate=0.002-seed1", "ffa-learning_rate=0.001-seed1"} < set(runs)
    write_tables(results, study.folder)
    table = (study.folder / "tables.md").read_text()
    assert "client.learning_rate" in table
    assert "| fedavg | 0.002 |" in table


# ---- real runs


REAL = (*SMALL, "partition.num_clients=2", "client.local_steps=1", "data.max_test_samples=40")


@pytest.mark.slow
def test_a_real_sweep_killed_and_started_again_gives_the_table_of_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def real(name: str) -> Study:
        return plan_study(
            "quickstart", [*REAL, f"output.root={tmp_path / name}", "output.name=s"], grid=METHODS, seeds=2
        )

    study = real("killed")
    process = multiprocessing.get_context("fork").Process(target=run_study, args=(study, Told()))
    process.start()
    second = study.folder / "runs" / "fedavg-seed1" / "metrics.jsonl"
    while not (second.is_file() and second.read_text()):
        time.sleep(0.01)
    process.kill()
    process.join()
    time.sleep(0.5)
    for name in ("killed", "whole"):
        code, out, _ = fedlora(
            capsys, "sweep", "quickstart", *REAL, f"output.root={tmp_path / name}", "output.name=s",
            "--grid", "aggregation.name=[fedavg,ffa]", "--seeds", "2", "--target", "20%", "--budget", "1MB",
        )  # fmt: skip
        assert code == 0
        assert "Cost-to-Target" in out
        assert ("finished before" in out) == (name == "killed")
    tables = [
        [(tmp_path / name / "s" / file).read_bytes() for file in TABLES] for name in ("killed", "whole")
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_rate_is_tuned_on_the_validation_rows_of_real_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = fedlora(
        capsys, "sweep", "quickstart", *REAL, f"output.root={tmp_path}", "output.name=s",
        "--tune", "client.learning_rate=[1e-9,5e-3]", "--seeds", "2",
    )  # fmt: skip
    assert code == 0, err
    assert "s: chose client.learning_rate=5e-3" in out


def test_the_command_ends_with_1_where_a_run_failed_and_names_it_when_it_is_quiet_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(config: ExperimentConfig, overwrite: bool) -> None:
        if config.seed:
            raise UserError("the data is gone")
        fake(PlannedRun(str(config.output.name), "x", config.seed, config))

    monkeypatch.setattr(sweep_runs, "run_experiment", begin)
    place = (f"output.root={tmp_path}", "output.name=study")
    code, out, err = fedlora(capsys, "sweep", "quickstart", *place, "--seeds", "2", "--quiet")
    assert code == 1
    assert out.strip() == str(tmp_path / "study" / "study.html")
    assert "failed: study-seed1: the data is gone" in err
    code, out, err = fedlora(capsys, "sweep", "quickstart", *place, "--seeds", "1")
    assert (code, err) == (0, "")
    assert "study-seed0  accuracy" in out
    assert "finished before" in out


def test_no_seeds_are_refused_on_the_command_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = fedlora(capsys, "sweep", "quickstart", f"output.root={tmp_path}", "--seeds", "0")
    assert code == 2
    assert "seeds" in err


def test_a_combination_that_cannot_be_run_ends_the_command_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("sweep", "quickstart", f"output.root={tmp_path}", "--grid", "aggregation.name=[fedavg,nope]")
    code, out, err = fedlora(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "combination nope: aggregation.name: no aggregator 'nope'" in err
    assert not list(tmp_path.iterdir())

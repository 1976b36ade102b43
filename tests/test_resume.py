"""Claims about runs that go on: wherever they stopped, they end with the bytes of one that never did."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import federated
from benchmarks.crashes import METHODS, continued, plain, results_of, tiny_config
from federated.communication.ledger import Ledger
from federated.engines import simulation
from federated.engines.simulation import fork_experiment, resume_experiment, run_experiment
from federated.rounds import server
from federated.rounds.checkpoint import ServerCheckpoint, commits_of, read_commit, read_latest, round_of
from federated.rounds.fingerprints import _rows_digest, fingerprints
from federated.rounds.run import build_run
from models.errors import NoRoomError, UserError
from tests.crash_points import Stopped, built_once, failing_at, stop, stopped_after
from tests.mutations import mutated_bytes


@pytest.fixture(scope="module", autouse=True)
def _one_build() -> Iterator[None]:
    with built_once():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(tiny_config(tmp_path_factory.mktemp("whole"), "fedavg"))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_ends_with_the_bytes_of_one_that_never_stopped(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = results_of(run_experiment(tiny_config(tmp_path / "whole", method)))
    run = stopped_after(tiny_config(tmp_path / "stopped", method), 3, monkeypatch)
    assert results_of(resume_experiment(run)) == expected


def test_what_was_sent_and_lost_is_counted_apart(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(tiny_config(tmp_path, "fedavg"), 2, monkeypatch)
    lost = [row for row in Ledger.read_csv(run / "communication.csv").rows if row.server_round == 2]
    resume_experiment(run)
    assert list(Ledger.read_csv(run / "lost.csv").rows) == lost
    summary = json.loads((run / "summary.json").read_text())
    assert summary["lost"]["wire_bytes"] == sum(row.wire_bytes for row in lost) > 0
    assert summary["attempts"] == 2
    assert (run / "communication.csv").read_bytes() == (whole / "communication.csv").read_bytes()


@pytest.mark.parametrize("method", ["fedavg", "fedsa"])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.6, 0.85])
def test_a_run_that_stops_at_a_step_of_its_writing_goes_on_from_there(
    method: str, share: float, tmp_path: Path
) -> None:
    expected, num_steps = _counted(tmp_path / "whole", method)
    _check_crash_point(tmp_path / "stopped", method, int(share * num_steps), expected)


def steps_of(method: str, num_steps: int) -> range:
    """Every sixth step, another sixth for each method; all of them where ``EVERY_STEP`` is set (an hour)."""
    stride = 1 if os.environ.get("EVERY_STEP") else 6
    return range(list(METHODS).index(method) % stride, num_steps, stride)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_may_stop_at_every_step_of_its_writing(method: str, tmp_path: Path) -> None:
    expected, num_steps = _counted(tmp_path / "whole", method)
    assert num_steps > 60
    for step in steps_of(method, num_steps):
        _check_crash_point(tmp_path / str(step), method, step, expected)
        shutil.rmtree(tmp_path / str(step))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_process_may_be_killed_at_every_step_of_its_writing(method: str, tmp_path: Path) -> None:
    expected, num_steps = _counted(tmp_path / "whole", method)
    for step in steps_of(method, num_steps):
        config = tiny_config(tmp_path / str(step), method)
        child = os.fork()
        if child == 0:
            with failing_at(step, lambda step: os._exit(77)):
                run_experiment(config)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77, step
        assert results_of(continued(config)) == expected, step
        shutil.rmtree(tmp_path / str(step))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedsa"])
def test_going_on_may_itself_stop_at_every_step(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _counted(tmp_path / "whole", method)
    run = stopped_after(tiny_config(tmp_path / "stopped", method), 3, monkeypatch)
    for step in range(1000):
        copy = tmp_path / str(step) / "quickstart"
        shutil.copytree(run, copy)
        try:
            with failing_at(step, stop):
                resume_experiment(copy)
        except Stopped:
            resume_experiment(copy) if not (copy / "summary.json").is_file() else None
            assert results_of(copy) == expected, step
            shutil.rmtree(copy.parent)
        else:
            break
    assert step > 40


def _counted(root: Path, method: str) -> tuple[object, int]:
    """The results of a run without a stop, and its number of steps once model and data are there."""
    config = tiny_config(root, method)
    simulation.build_run(config)
    with failing_at(10**9, stop) as made:
        run = run_experiment(config)
    return results_of(run), len(made)


def _check_crash_point(root: Path, method: str, step: int, expected: object) -> None:
    config = tiny_config(root, method)
    with pytest.raises(Stopped), failing_at(step, stop):
        run_experiment(config)
    assert results_of(continued(config)) == expected, step


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ["engine.workers=2"]),
        (["engine.workers=2"], ["engine.workers=1"]),
        (["engine.batched_clients=2"], ["engine.batched_clients=2"]),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    before: list[str], after: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment(tiny_config(tmp_path / "whole", "fedsa", *before))
    run = stopped_after(tiny_config(tmp_path, "fedsa", *before), 2, monkeypatch)
    assert results_of(resume_experiment(run, after)) == results_of(whole)


@pytest.mark.parametrize(("before", "after"), [("2", "off"), ("off", "2")])
def test_a_run_goes_on_with_batched_clients_or_without_to_rounding(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = results_of(run_experiment(tiny_config(tmp_path / "whole", "fedsa")))
    run = stopped_after(tiny_config(tmp_path, "fedsa", f"engine.batched_clients={before}"), 2, monkeypatch)
    found = results_of(resume_experiment(run, [f"engine.batched_clients={after}"]))
    assert found["ledger"] == whole["ledger"]
    assert found["versions"] == whole["versions"]
    for line, other in zip(found["metrics"], whole["metrics"], strict=True):
        assert line["failed"] == other["failed"] == []
        for client, metrics in other["clients"].items():
            assert line["clients"][client] == pytest.approx(metrics, rel=1e-4)
    expected = whole["clients"]
    assert found["clients"].keys() == expected.keys()
    for client, records in found["clients"].items():
        for key, record in records.items():
            for name, values in record.items():
                other = expected[client][key][name]
                torch.testing.assert_close(torch.tensor(values), torch.tensor(other), rtol=1e-4, atol=1e-5)


def test_more_rounds_follow_a_complete_run(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(whole, run)
    with pytest.raises(UserError, match=r"complete: all 3 rounds.*federation.rounds=6"):
        resume_experiment(run)
    resume_experiment(run, ["federation.rounds=4"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["server_round"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[:4] == before
    assert json.loads((run / "summary.json").read_text())["rounds"] == 4
    with pytest.raises(UserError, match=r"federation\.rounds=2, but 4 rounds"):
        resume_experiment(run, ["federation.rounds=2"])


def test_a_run_that_ended_early_and_stopped_before_its_results_only_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = (
        "federation.early_stopping.patience=1",
        "federation.early_stopping.minimum_change=0.9",
        "data.validation_fraction=0.3",
        "federation.rounds=5",
    )
    expected = results_of(run_experiment(tiny_config(tmp_path / "whole", "fedavg", *early)))
    assert expected["summary"]["rounds"] == 1
    with monkeypatch.context() as patched:
        patched.setattr(server, "save_results", stop)
        with pytest.raises(Stopped):
            run_experiment(tiny_config(tmp_path / "stopped", "fedavg", *early))
    run = tmp_path / "stopped" / "quickstart"
    assert results_of(resume_experiment(run)) == expected
    with pytest.raises(UserError, match=r"complete: stopped after round 1.*early_stopping\.patience=2"):
        resume_experiment(run)
    assert results_of(run) == expected
    resume_experiment(run, ["federation.early_stopping.patience=9"])
    assert json.loads((run / "summary.json").read_text())["rounds"] == 5


def test_python_goes_on_with_a_run_too(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped_after(tiny_config(tmp_path, "fedavg"), 2, monkeypatch)
    assert federated.resume(run, show_progress=False).folder == run
    assert results_of(run) == results_of(whole)


@pytest.mark.parametrize(
    "override", ["client.learning_rate=1.0", "seed=1", "aggregation.name=ffa", "partition.options.alpha=9"]
)
def test_a_key_that_would_make_the_past_untrue_is_refused_by_name(whole: Path, override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", r"\.")):
        resume_experiment(whole, [override, "federation.rounds=9"])
    assert (whole / "summary.json").is_file()


def test_a_branch_of_a_round_to_come_or_of_no_run_says_so(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run has not come to it"):
        fork_experiment(whole, 99, "later", [])
    with pytest.raises(UserError, match="not a run folder"):
        fork_experiment(tmp_path / "nothing", 1, "other", [])


def test_a_branch_that_could_not_learn_is_refused_before_it_has_a_folder(whole: Path) -> None:
    with pytest.raises(UserError, match="fp16"):
        fork_experiment(whole, 2, "half", ["client.precision=fp16"])
    assert not (whole.parent / "half").exists()


def test_a_branch_shares_the_past_and_says_what_differs_from_there(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(whole, run)
    branch = fork_experiment(run, 2, "slower", ["client.learning_rate=1e-5"])
    lines, before = ((r / "metrics.jsonl").read_text().splitlines() for r in (branch, run))
    assert lines[:3] == before[:3]
    assert lines[3] != before[3]
    summary = json.loads((branch / "summary.json").read_text())
    changes = {"client.learning_rate": [2e-3, 1e-5]}
    assert summary["forks"] == [{"run": str(run), "round": 2, "changes": changes}]
    same = results_of(fork_experiment(run, 2, "same"))
    expected = results_of(run)
    assert same["summary"].pop("forks")[0]["changes"] == {}
    assert same == expected
    with pytest.raises(UserError, match="same already exists: give the branch another --name"):
        fork_experiment(run, 2, "same")
    with pytest.raises(UserError, match=r"of round 2, 3"):
        fork_experiment(run, 1, "older")
    with pytest.raises(UserError, match=r"no round is left after 3; set federation\.rounds=6"):
        fork_experiment(run, 3, "none_left")
    with pytest.raises(UserError, match="seed cannot change"):
        fork_experiment(run, 2, "other", ["seed=3"])


def test_other_rows_and_other_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(whole, run)
    for key, words in (("rows", "train rows are not those"), ("base_weights", "weights are not those")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                server, "fingerprints", lambda r, k=key: {**fingerprints(r), k: {"train": "other"}}
            )
            with pytest.raises(UserError, match=words):
                resume_experiment(run, ["federation.rounds=4"])
    assert results_of(run) == results_of(whole)


def test_an_image_counts_with_all_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    rows = Dataset.from_dict({"image": [{"path": str(path), "bytes": None}], "label": [0]})
    digests = []
    for middle in (b"one", b"two"):
        path.write_bytes(bytes(2000) + middle + bytes(2000))
        digests.append(_rows_digest(rows, "image"))
        embedded = {"image": [{"path": "image", "bytes": path.read_bytes()}], "label": [0]}
        assert _rows_digest(Dataset.from_dict(embedded), "image") == digests[-1]
    assert digests[0] != digests[1]
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        _rows_digest(rows, "image")


def test_a_run_goes_on_from_the_adapter_that_it_started_from_or_not_at_all(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "build_run", build_run)
    start, moved = tmp_path / "start", tmp_path / "moved"
    shutil.copytree(whole / "adapter", start)
    config = tiny_config(tmp_path, "fedsa", f"model.adapter={start}")
    expected = results_of(run_experiment(tiny_config(tmp_path / "w", "fedsa", f"model.adapter={start}")))
    run = stopped_after(config, 2, monkeypatch)
    start.rename(moved)
    with pytest.raises(UserError, match=str(start)):
        resume_experiment(run)
    shutil.copytree(whole / "adapter_best", start)
    assert (start / "adapter_model.safetensors").read_bytes() != (
        moved / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match=r"model\.adapter has other values"):
        resume_experiment(run)
    assert results_of(resume_experiment(run, [f"model.adapter={moved}"])) == expected


def test_a_complete_run_that_cannot_go_on_keeps_its_end(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "quickstart"
    shutil.copytree(whole, run)
    kept = {name: (run / name).read_bytes() for name in ("summary.json", "config.yaml")}
    lines = (run / "metrics.jsonl").read_bytes()
    for damaged in (lines[:-10], b"{" + lines[1:].replace(b'"', b"'")):
        (run / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            resume_experiment(run, ["federation.rounds=4"])
        assert {name: (run / name).read_bytes() for name in kept} == kept


def test_what_was_lost_stays_counted_where_the_run_goes_on_from_an_older_commit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(tiny_config(tmp_path, "fedavg", "output.keep_checkpoints=4"), 2, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(server, "save_results", stop)
        with pytest.raises(Stopped):
            resume_experiment(run)
    once = Ledger.read_csv(run / "lost.csv").rows
    again = Ledger.read_csv(run / "communication.csv").rows
    for commit in commits_of(run / "checkpoint"):
        if commit.name.startswith("commit_002"):
            (commit / "manifest.json").unlink()
    resume_experiment(run)
    sent_after_round_1 = [row for row in again if row.server_round > 1]
    assert list(Ledger.read_csv(run / "lost.csv").rows) == [*once, *sent_after_round_1]
    assert (run / "communication.csv").read_bytes() == (whole / "communication.csv").read_bytes()


def test_a_run_folder_that_can_be_resumed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, "fedavg")
    run = stopped_after(config, 2, monkeypatch)
    with pytest.raises(UserError, match=f"already exists: continue it with: fedlora resume {run}"):
        run_experiment(config)


def test_a_full_disk_names_the_folder_and_the_bytes_and_leaves_a_run_that_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "fedavg")

    def full(step: str) -> None:
        if step not in ("unlink", "replace", "truncate"):
            raise OSError(28, "No space left on device")

    with failing_at(10**9, stop) as made:
        run_experiment(
            config.model_copy(update={"output": config.output.model_copy(update={"name": "count"})})
        )
    late = max(number for number, name in enumerate(made) if "server.safetensors" in name)
    words = r"commit_001_000003.* has no room for server.safetensors .*\d+ bytes were wanted"
    with pytest.raises(NoRoomError, match=words), failing_at(late, full):
        run_experiment(config)
    assert results_of(continued(config)) == results_of(whole)


def test_damaged_commits_give_the_one_before_or_an_error_that_names_the_file(
    whole: Path, tmp_path: Path
) -> None:
    _check_mutations(whole, tmp_path, 200)


@pytest.mark.slow
def test_ten_thousand_damaged_commits(tmp_path: Path) -> None:
    _check_mutations(run_experiment(tiny_config(tmp_path, "fedsa")), tmp_path, 10_000)


def _check_mutations(run: Path, tmp_path: Path, number: int) -> None:
    contents = {}
    for commit in commits_of(run / "checkpoint"):
        content, _, states = read_commit(commit)
        contents[round_of(commit)] = _values(content, states)
    named, outcomes = 0, {"refused": 0, **dict.fromkeys(contents, 0)}
    files = sorted(path.relative_to(run) for path in (run / "checkpoint").rglob("*") if path.is_file())
    originals = {name: (run / name).read_bytes() for name in files}
    copy = tmp_path / "mutated"
    shutil.copytree(run / "checkpoint", copy / "checkpoint")
    for seed in range(number):
        rng = random.Random(seed)
        changed = _mutate(rng, copy, originals)
        try:
            content, _, states = read_latest(copy / "checkpoint")
        except UserError as refusal:
            named += str(copy / "checkpoint") in str(refusal)
            outcomes["refused"] += 1
        else:
            assert _values(content, states) == contents[content.server.server_round], seed
            outcomes[content.server.server_round] += 1
        for name in changed:
            (copy / name).write_bytes(originals[name])
    assert named == outcomes["refused"]
    assert all(outcomes.values()), outcomes


def _mutate(rng, folder: Path, originals: dict[Path, bytes]) -> list[Path]:
    names = rng.sample(sorted(originals), rng.choice((1, 1, 2)))
    kind = rng.randrange(4)
    for name in names:
        if kind == 0:
            (folder / name).unlink()
        elif kind == 1:
            (folder / name).write_bytes(originals[name][: rng.randrange(len(originals[name]))])
        else:
            (folder / name).write_bytes(mutated_bytes(rng, originals[name]))
    if kind == 3 and len(names) == 2:
        for name, other in zip(names, names[::-1], strict=True):
            (folder / name).write_bytes(originals[other])
    return names


def _values(content: ServerCheckpoint, states: object) -> object:
    return (
        plain(content.server.state),
        content.versions,
        content.ranks,
        content.parts,
        content.progress,
        plain(states),
    )

"""Claims about where a run writes: refused at the door, alone in its folder, and never over other files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from federated.cli import main
from federated.engines.simulation import run_experiment
from federated.results.run_folder import RunFolder
from federated.results.run_place import LOCK_FILE, beside, check_replaceable, claim
from federated.tools.central import train_centrally
from federated.tools.evaluation import evaluate_source
from models.errors import UserError
from tests.command import fedlora
from tests.crash_points import Stopped, failing_at, stop
from tests.fake_run import FakeRun
from tests.small_run import small_config

LONG = "n" * 300
PLACES = [
    ("output.root={tmp}/file", "no folder"),
    ("output.root=/proc/x", "/proc/x"),
    ("output.root=", "output.root"),
    ("output.name=''", "output.name"),
    ("output.name=.", "output.name"),
    ("output.name=../elsewhere", "output.name"),
    ("output.name=a/../../b", "output.name"),
    ("output.name=/elsewhere", "output.name"),
    (f"output.name={LONG}", "255"),
    (f"output.root={LONG}", "255"),
    ('output.name="a\\0b"', "no text"),
    ('output.name="\\udc80"', "output.name"),
]


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("data was loaded before the output was looked at")

    for module in ("rounds.run", "tools.evaluation", "tools.central"):
        name = "build_run" if module == "tools.central" else "load_run_data"
        monkeypatch.setattr(f"federated.{module}.{name}", fail)


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize(("override", "words"), PLACES, ids=[words for _, words in PLACES])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_place_that_cannot_be_written_is_one_message_and_nothing_is_left(
    command: str, override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    override = override.format(tmp=tmp_path)
    root = [] if override.startswith("output.root") else [f"output.root={tmp_path / 'runs'}"]
    code, out, err = fedlora(capsys, command, "quickstart", *root, override)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize("arguments", [
    ["evaluate", "quickstart", "--output"],
    ["predict", "tiny", "{tmp}", "--format", "csv", "--output"],
    ["encode", "tiny", "{tmp}", "--output"],
    ["compare", "{tmp}/fake", "--output"],
    ["data", "prepare", "--classes", "a,b"],
])  # fmt: skip
@pytest.mark.parametrize("place", ["{tmp}/file/out.npy", "/proc/x.npy", f"{LONG}.npy"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_every_commands_output_is_looked_at_first(
    arguments: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    FakeRun().write(tmp_path / "fake")
    before = sorted(os.listdir(tmp_path))
    code, _, err = fedlora(capsys, *(part.format(tmp=tmp_path) for part in [*arguments, place]))
    assert code == 2
    assert err.startswith("error:")
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_noticed_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_loaded: None
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("federated.results.run_place.sync", full)
    with pytest.raises(UserError, match="No space left"):
        run_experiment(small_config(tmp_path / "runs"))
    assert os.listdir(tmp_path) == []


def test_a_device_is_not_replaced_by_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = fedlora(
        capsys, "predict", "tiny", ".", "--format", "csv", "--output", "/dev/null", "--overwrite"
    )
    assert code == 2
    assert "device" in err
    assert Path("/dev/null").is_char_device()


def finished(path: Path) -> Path:
    return FakeRun().write(path)


@pytest.mark.parametrize(
    "foreign", ["thesis.txt", "plots/mine.png", "adapter/notes.md", "data/x.csv", "empty/"]
)
def test_overwriting_refuses_what_no_run_wrote_and_names_it(foreign: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "quickstart")
    if foreign.endswith("/"):
        (run / foreign).mkdir()
    else:
        (run / foreign).parent.mkdir(exist_ok=True)
        (run / foreign).write_text("years of work")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match=foreign.rstrip("/")):
        run_experiment(small_config(tmp_path), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_folder_with_a_configuration_is_not_yet_a_run(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "config.yaml").write_text("of another program")
    with pytest.raises(UserError, match="not a run folder"):
        train_centrally(small_config(tmp_path), overwrite=True)


def test_a_record_of_the_environment_that_is_nested_too_deep_is_no_runs(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "environment.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a run folder"):
        run_experiment(small_config(tmp_path), overwrite=True)


def test_overwriting_follows_no_link(tmp_path: Path) -> None:
    precious = finished(tmp_path / "elsewhere")
    root = tmp_path / "runs"
    root.mkdir()
    (root / "quickstart").symlink_to(precious)
    with pytest.raises(UserError, match="is a link"):
        run_experiment(small_config(root), overwrite=True)
    (root / "above").symlink_to(tmp_path)
    with pytest.raises(UserError, match="above is a link"):
        run_experiment(small_config(root, overrides=["output.name=above/elsewhere"]), overwrite=True)
    (root / "quickstart").unlink()
    (finished(root / "quickstart") / "adapter").symlink_to(precious)
    with pytest.raises(UserError, match="adapter"):
        run_experiment(small_config(root), overwrite=True)
    assert (precious / "metrics.jsonl").is_file()


def test_a_folder_that_a_run_is_writing_to_is_refused_with_the_process(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    first = RunFolder(tmp_path / "run", config)
    for overwrite in (True, False):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            RunFolder(tmp_path / "run", config, overwrite=overwrite)
    first.append_metrics({"server_round": 0})
    first.close()
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    RunFolder(tmp_path / "run", config, overwrite=True).close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(("run", "place"), [(".", "/a"), ("..", "/"), ("b", "."), ("/a/b", "/a")])
def test_a_branch_goes_beside_a_run_however_that_is_named(
    run: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/a/b")
    assert beside(Path(run)) == Path(place)


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        claim(tmp_path / "run", overwrite=False)
        (tmp_path / "claimed").touch()
        signal.pause()
    while not (tmp_path / "claimed").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"process {child}"):
        claim(tmp_path / "run", overwrite=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / LOCK_FILE).read_text() == f"{child}\n"
    os.close(claim(tmp_path / "run", overwrite=True))


@pytest.mark.parametrize("left", ["run.lock", ".environment.json.part"])
def test_a_folder_of_a_run_that_was_killed_before_it_said_so_can_be_replaced(
    left: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("{")
    os.close(claim(tmp_path / "run", overwrite=True))
    assert os.listdir(tmp_path / "run") == ["run.lock"]


def test_a_folder_may_be_left_at_any_step_of_its_making(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with failing_at(10**9, stop) as made:
        RunFolder(tmp_path / "run", config).close()
    assert len(made) > 5
    for step in range(len(made)):
        folder = tmp_path / str(step)
        with contextlib.suppress(Stopped), failing_at(step, stop):
            RunFolder(folder, config).close()
        os.close(claim(folder, overwrite=folder.exists()))


def test_results_come_first_and_pictures_are_best_effort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr("federated.results.report.write_report", broken)
    monkeypatch.setattr("federated.results.run_folder.SummaryWriter", broken)
    monkeypatch.setattr("federated.tools.evaluation.save_figure", broken)
    config = small_config(tmp_path, overrides=["federation.rounds=1"])
    run = run_experiment(config)
    assert "TensorBoard" in caplog.text
    assert "fedlora report" in caplog.text
    summary = json.loads((run / "summary.json").read_text())
    assert not (run / LOCK_FILE).exists()
    folder, _ = evaluate_source(run)
    results = json.loads((folder / "evaluation_results.json").read_text())
    assert results["accuracy"] == pytest.approx(summary["final"])
    check_replaceable(run)


def test_the_best_round_is_kept_beside_the_last(tmp_path: Path) -> None:
    overrides = ["client.learning_rate=0.3", "federation.rounds=3", "output.report=false"]  # it gets worse
    run = run_experiment(small_config(tmp_path, overrides=overrides))
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["accuracy"])
    assert best["server_round"] < lines[-1]["server_round"]
    assert (summary["best"], summary["best_round"]) == (best["accuracy"], best["server_round"])
    for name, expected in (("adapter_best", summary["best"]), ("adapter", summary["final"])):
        folder, _ = evaluate_source(run, adapter=run / name, output=tmp_path / name)
        found = json.loads((folder / "evaluation_results.json").read_text())["accuracy"]
        assert found == pytest.approx(expected, abs=1e-9)
    off = run_experiment(small_config(tmp_path, overrides=["federation.keep_best=false", "output.name=last"]))
    assert not (off / "adapter_best").exists()
    check_replaceable(run)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_terminal_cannot_show_ends_no_command(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "läuft → 好")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for arguments in (["compare", str(run)], ["compare", str(tmp_path / "→")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == (2 if arguments[-1].endswith("→") else 0)
    for stream in streams.values():
        stream.flush()
    assert b"?" in streams["stdout"].buffer.getvalue()
    assert b"error:" in streams["stderr"].buffer.getvalue()
    monkeypatch.undo()


@pytest.mark.parametrize("command", ["run", "train"])
@pytest.mark.parametrize("end", ["full disk", "closed pipe"])
def test_a_terminal_that_takes_no_more_ends_no_run(
    command: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if end == "full disk":
        stdout = open("/dev/full", "w")  # noqa: SIM115 -- Python holds its own as long
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stdout = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    text = yaml.safe_dump(small_config(tmp_path, overrides=["output.report=false"]).model_dump(mode="json"))
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([command, str(tmp_path / "a.yaml"), "output.name=run"])
    assert ended.value.code == 0
    assert (tmp_path / "run" / "summary.json").is_file()
    assert [r.message for r in caplog.records if "takes no more" in r.message] != []
    stdout.close()


def test_cleaning_keeps_results() -> None:
    recipe = (Path(__file__).parents[1] / "Makefile").read_text().partition("\nclean:")[2]
    assert "runs" not in recipe.partition("\n")[2].split()

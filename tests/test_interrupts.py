"""Claims about signals: the first ends a program in good order, the second at once."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.crashes import TINY, results_of, tiny_config
from federated.cli import main
from federated.engines.simulation import run_experiment
from federated.results.run_log import logged
from federated.rounds import server
from models.interrupts import StopRequested, stoppable, unstoppable
from tests.crash_points import built_once


@pytest.fixture(scope="module", autouse=True)
def _one_build() -> Iterator[None]:
    with built_once():
        yield


def status_of(work: Callable[[], object]) -> int:
    """Do some work in a process of its own; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_signal_waits_for_the_end_of_what_is_not_to_be_stopped() -> None:
    done = []

    def work() -> None:
        with unstoppable():
            with unstoppable():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with stoppable(), pytest.raises(StopRequested) as stopped:
        work()
    assert done == ["inner", "outer"]
    assert (stopped.value.exit_code, stopped.value.name) == (143, "SIGTERM")


def test_the_handlers_of_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    with unstoppable(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_ends_the_process_at_once() -> None:
    def work() -> None:
        with stoppable(), unstoppable():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)

    assert status_of(work) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_it_goes_on_and_does(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    original = server.commit
    done: list[int] = []

    def commit(served: server.Served) -> None:
        if len(done) == 1:
            os.kill(os.getpid(), number)  # in the middle of what is written of round 1
        original(served)
        done.append(served.strategy.record.server_round)

    overrides = [f"{key}" for key in TINY]
    with monkeypatch.context() as patched:
        patched.setattr(server, "commit", commit)
        with pytest.raises(SystemExit) as ended:
            main(["run", "quickstart", *overrides, "partition.num_clients=3"])
    assert ended.value.code == 128 + number
    assert done == [0, 1]
    shown = capsys.readouterr().out
    command = "fedlora resume runs/quickstart"
    assert f"stopped by {number.name}; continue with: {command}" in shown
    assert command in Path("runs/quickstart/run.log").read_text()
    assert not Path("runs/quickstart/run.lock").exists()
    with pytest.raises(SystemExit) as ended:
        main(command.split()[1:])
    assert ended.value.code == 0
    expected = results_of(run_experiment(tiny_config(tmp_path / "whole", "fedavg")))
    assert results_of(Path("runs/quickstart")) == expected


def test_the_log_of_a_run_holds_what_the_terminal_showed_with_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["run", "quickstart", *TINY, "partition.num_clients=3", "client.learning_rate=1e30"])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    logged = Path("runs/quickstart/run.log").read_text(encoding="utf-8").splitlines()
    assert all(line[4] == line[7] == "-" and line[10] == "T" and line[19] == "Z" for line in logged)
    texts = [line[21:] for line in logged]
    assert set(shown) <= set(texts)
    assert not any(text.startswith("WARNING ") for text in texts)  # the lines of the rounds name the clients


def test_the_log_holds_warnings_too_and_no_more_once_the_run_has_ended(tmp_path: Path) -> None:
    log = logging.getLogger("federated.rounds.checkpoint")
    with logged(tmp_path):
        log.warning("one\ntwo")
    log.warning("three")
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert [line[21:] for line in lines] == [f"WARNING {log.name}: {text}" for text in ("one", "two")]

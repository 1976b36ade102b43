"""Runs in processes of their own, some at a time: each ends with this process and fails for itself alone.

A process is forked, so that libraries and plugins are imported once. What it prints goes to its log.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Protocol

from federated.engines.workers import end_with
from federated.results.records import RunRecord, read_run
from federated.tools.study_plan import PlannedRun
from models.errors import UserError, shortened

Do = Callable[[PlannedRun], None]
"""Does a run, in the process that is made for it."""

_FORK = multiprocessing.get_context("fork")
_TICK_SECONDS = 0.5
_PATIENCE_SECONDS = 5.0
_BAD_INPUT = 2


class Watcher(Protocol):
    """What a study tells whoever watches; ``federated.commands.sweep`` has one."""

    def runs_planned(self, num_runs: int, what: str) -> None:
        """So many runs come next; ``what`` says what for."""

    def tick(self, running: Sequence[str]) -> None:
        """Time passes; these runs are on their way."""

    def run_done(self, run: PlannedRun, record: RunRecord, *, kept: bool) -> None:
        """A run is finished; ``kept``: by an earlier start of the study."""

    def run_failed(self, run: PlannedRun, reason: str) -> None:
        """A run failed; the study goes on."""

    def value_chosen(self, variant: str, key: str, value: Any) -> None:
        """A variant's value was chosen on the validation split."""


@dataclass(frozen=True)
class Pool:
    """How runs are done.

    Attributes:
        jobs: Processes at a time, each with its share of the processor's cores.
        logs: Folder of a log a run.
        watcher: Told what happens.
    """

    jobs: int
    logs: Path
    watcher: Watcher

    def run_all(
        self, runs: Sequence[PlannedRun], what: str, do: Do, is_done: Callable[[PlannedRun], bool]
    ) -> dict[str, str]:
        """Do all runs that are not done; return name -> reason of those that failed.

        Args:
            runs: In the order in which they start.
            what: What they are for, for the watcher.
            do: Does one.
            is_done: Whether one needs nothing more.
        """
        self.watcher.runs_planned(len(runs), what)
        failures: dict[str, str] = {}
        waiting: list[PlannedRun] = []
        for run in runs:
            if is_done(run):
                self.watcher.run_done(run, read_run(run.folder), kept=True)
            else:
                waiting.append(run)
        running: dict[ForkProcess, PlannedRun] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    run = waiting.pop(0)
                    running[self._start(run, do)] = run
                self.watcher.tick([run.name for run in running.values()])
                wait([process.sentinel for process in running], timeout=_TICK_SECONDS)
                for process in [process for process in running if not process.is_alive()]:
                    run = running.pop(process)
                    if reason := self._fault(run, process, is_done):
                        failures[run.name] = reason
                        self.watcher.run_failed(run, reason)
                    else:
                        self.watcher.run_done(run, read_run(run.folder), kept=False)
        finally:
            _end(running)
        return failures

    def log_of(self, run: PlannedRun) -> Path:
        """Return the file that has what a run's process printed."""
        return self.logs / f"{run.name}.log"

    def _start(self, run: PlannedRun, do: Do) -> ForkProcess:
        share = max(1, (os.cpu_count() or 1) // self.jobs)
        engine = run.config.engine
        cut = {"threads": min(engine.threads, share), "workers": min(engine.workers, share)}
        config = run.config.model_copy(update={"engine": engine.model_copy(update=cut)})
        arguments = (replace(run, config=config), self.log_of(run), do, os.getpid())
        process = _FORK.Process(target=_child, args=arguments)
        process.start()
        return process

    def _fault(
        self, run: PlannedRun, process: ForkProcess, is_done: Callable[[PlannedRun], bool]
    ) -> str | None:
        """Return why a run that ended is not done, in one line; None where it is."""
        process.join()
        code, log_file = process.exitcode or 0, self.log_of(run)
        if code == 0 and is_done(run):
            return None
        return f"{_reason(code, log_file)} (log: {log_file})"


def _reason(code: int, log_file: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = log_file.read_text(encoding="utf-8", errors="replace").strip() if log_file.is_file() else ""
    if code == _BAD_INPUT and "error: " in text:
        return shortened(" ".join(text.rpartition("error: ")[2].split()))
    return shortened(text.splitlines()[-1]) if text else "it left no result"


def _child(run: PlannedRun, log_file: Path, do: Do, parent: int) -> None:
    end_with(parent)
    gc.freeze()  # collecting what was inherited would copy its pages
    output = log_file.open("w", encoding="utf-8", errors="replace", buffering=1)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout = sys.stderr = output
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(output)
    try:
        do(run)
    except (UserError, OSError) as error:
        output.write(f"error: {error}\n")
        sys.exit(_BAD_INPUT)


def _end(running: Mapping[ForkProcess, PlannedRun]) -> None:
    """End the processes that still run."""
    for process in running:
        process.terminate()
    for process in running:
        process.join(_PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()

"""Runs that stop at a chosen step of their writing, and the bytes that must come out all the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from federated.config.schema import ExperimentConfig
from federated.engines import simulation
from federated.rounds import server
from federated.rounds.run import Run, build_run

STEPS = ("fsync", "replace", "truncate", "mkdir", "unlink")
"""Calls of ``os`` through which a run changes its folder, beside the opening of files for writing."""


@contextmanager
def built_once() -> Iterator[None]:
    """Let every run of one configuration share model and data; ``serve`` puts them back to their start."""
    known: dict[str, Run] = {}

    def build(config: ExperimentConfig) -> Run:
        key = config.model_copy(update={"output": None, "federation": None}).model_dump_json(warnings=False)
        if key not in known:
            known[key] = build_run(config)
        object.__setattr__(known[key], "config", config)
        return known[key]

    with patch.object(simulation, "build_run", build):
        yield


class Stopped(KeyboardInterrupt):
    """The machine went away; no client of it is to take that for its own failure."""


@contextmanager
def failing_at(step: int, fail: Callable[[str], Any]) -> Iterator[list[str]]:
    """Fail at the n-th change of the file system inside the block, and at every later one."""
    made: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) > step:
                fail(made[-1])
            return original(*arguments, **options)

        return call

    plain_open = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode[0] in "wa":
            made.append(f"open {path.name}")
            if len(made) > step:
                fail(made[-1])
        return plain_open(path, mode, *arguments, **options)

    patches = [patch.object(os, name, counted(name, getattr(os, name))) for name in STEPS]
    patches.append(patch.object(Path, "open", opened))
    for each in patches:
        each.start()
    try:
        yield made
    finally:
        for each in patches:
            each.stop()


def stop(step: object) -> None:
    raise Stopped


def stopped_after(config: ExperimentConfig, num_commits: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is gone when it has committed so often."""
    original, done = server.commit, 0

    def commit(served: server.Served) -> None:
        nonlocal done
        if done == num_commits:
            raise Stopped
        original(served)
        done += 1

    with monkeypatch.context() as patched:
        patched.setattr(server, "commit", commit)
        with pytest.raises(Stopped):
            simulation.run_experiment(config)
    return Path(config.output.root) / "quickstart"

"""Runs that stop at a chosen step of their writing, and the bytes that must come out all the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from federated.config.schema import ExperimentConfig
from federated.engines import simulation
from federated.engines.simulation import resume_experiment, run_experiment
from federated.results.run_place import can_be_resumed
from federated.rounds.checkpoint import latest_checkpoint, read_commit
from federated.rounds.run import Run, build_run
from tests.small_run import small_config

METHODS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedsa": ("aggregation.name=fedsa",),
    "fedex": ("aggregation.name=fedex",),
    "fed_sb": ("aggregation.name=fed_sb",),
    "scaffold": ("client.scaffold=true",),
    "error feedback": ("communication.uplink=topk:0.25:ef+int8",),
    "mixed ranks": ("aggregation.name=hetlora", "client.ranks=[2,4]"),
    "fedadam": ("aggregation.server_optimizer={name: fedadam, eta: 0.002}",),
    "lossy downlink": ("aggregation.name=ffa", "communication.downlink=int8"),
}
TINY = (
    "lora.r=4",
    "lora.layers=[3]",
    "federation.rounds=3",
    "federation.cohort_size=2",
    "client.local_steps=1",
    "client.batch_size=4",
    "data.max_train_samples=60",
    "data.max_test_samples=20",
    "evaluation.clients_every=2",
    "output.report=false",
)
STEPS = ("fsync", "replace", "truncate", "mkdir", "unlink")
"""Calls of ``os`` through which a run changes its folder, beside the opening of files for writing."""
_KEPT = ("adapter", "adapter_best")


def tiny_config(root: Path, method: str, *overrides: str) -> ExperimentConfig:
    return small_config(root, overrides=[*TINY, *METHODS[method], *overrides])


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


def stop(step: str) -> None:
    raise Stopped


def continued(config: ExperimentConfig) -> Path:
    """Bring a run to its end that stopped anywhere: resume it, or start it again before its first commit."""
    path = Path(config.output.root) / str(config.output.name)
    if can_be_resumed(path):
        return resume_experiment(path)
    if (path / "summary.json").is_file():
        return path
    return run_experiment(config, overwrite=True)


def results_of(run: Path) -> dict[str, Any]:
    """What a run left that may not depend on where it stopped: bytes by file, and its clients' states."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for key in ("seconds", "peak_memory_bytes", "attempts", "lost"):
        summary.pop(key, None)
    results: dict[str, Any] = {"summary": summary, "ledger": (run / "communication.csv").read_bytes()}
    results["metrics"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    for folder in _KEPT:
        for path in sorted((run / folder).glob("*")):
            results[f"{folder}/{path.name}"] = path.read_bytes()
    content, _, states = read_commit(latest_checkpoint(run))
    results["versions"], results["ranks"] = content.versions, content.ranks
    results["clients"] = {
        client: {
            key: {
                name: getattr(value, "tolist", lambda value=value: value)() for name, value in record.items()
            }
            for key, record in records.items()
        }
        for client, records in states.items()
    }
    return results

"""A run that is over in seconds, for the tests that need a whole one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig

SMALL = (
    "federation.rounds=2",
    "partition.num_clients=3",
    "client.local_steps=2",
    "client.batch_size=8",
    "data.max_train_samples=300",
    "data.max_test_samples=100",
)


def small_config(folder: Path, name: str = "quickstart", overrides: Sequence[str] = ()) -> ExperimentConfig:
    return load_config(name, [*SMALL, f"output.root={folder}", *overrides])


def lines_without_times(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines

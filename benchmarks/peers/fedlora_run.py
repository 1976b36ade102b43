"""This project, by its public entry point: messages, ledger and run folder included, the report left out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.prepared import CONFIG
from benchmarks.peers.timing import Timings
from benchmarks.silent import SilentDisplay
from federated.config.config_files import parse_config
from federated.engines.simulation import run_experiment


class Watch(SilentDisplay):
    """A display that notes when rounds end and shows nothing."""

    def __init__(self, timings: Timings) -> None:
        self._timings, self._started = timings, time.perf_counter()

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """Enter a round; round 0 only starts the clock."""
        if "train_loss" in metrics:
            self._timings.add(self._started, float(metrics["train_loss"]))
        self._started = time.perf_counter()


def fedlora_run(folder: Path, sections: Mapping[str, Mapping[str, Any]]) -> Timings:
    """Run the workload's configuration with these settings, by section."""
    logging.getLogger("federated").setLevel(logging.ERROR)
    tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for section, settings in sections.items():
        tree[section] = {**tree.get(section, {}), **settings}
    tree["output"] = {"root": str(folder), "name": "run", "report": False}
    timings = Timings()
    run_experiment(parse_config(tree, source=CONFIG), overwrite=True, display=Watch(timings))  # type: ignore[arg-type]
    return timings

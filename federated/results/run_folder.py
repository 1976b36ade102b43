"""The folder of a run: everything it leaves behind, written as it happens.

``config.yaml``, ``environment.json``, ``plugins.json`` (where the run needs plugins) and ``partition.json``
are written before the first round; a line of
``metrics.jsonl``, the rows of ``communication.csv`` and TensorBoard events after each round; ``checkpoint/``
holds the latest global state, ``adapter_best/`` that of the best round; ``adapter/`` and ``summary.json``
come at the end. Files appear whole or not at all. Pictures and events are best effort: no run ends for them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from federated.config.config_files import dump_config
from federated.config.plugins import PLUGINS_FILE, used_plugins
from federated.config.schema import ExperimentConfig
from federated.results.run_place import ENVIRONMENT_FILE, claim, release
from lora.start_adapter import adapter_identity
from models.files import BestEffort, errors_named, json_text, write_json, write_text

_PACKAGES = ("fedlora", "torch", "transformers", "peft", "flwr", "flwr-datasets", "datasets", "numpy")


class RunFolder:
    """Writes a run's files under ``path``, which is locked until ``close``.

    Args:
        path: The folder; it must not exist unless ``overwrite``.
        config: The resolved configuration.
        overwrite: Replace an earlier run's files. What no run wrote is never removed.

    Raises:
        UserError: The folder exists and may not be replaced, is in use, or cannot be written.
    """

    def __init__(self, path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        self.path = path
        self._lock: int | None = claim(path, overwrite=overwrite)
        write_json(path / ENVIRONMENT_FILE, describe_environment(config))
        write_text(path / "config.yaml", dump_config(config))
        if plugins := used_plugins(config):
            write_json(path / PLUGINS_FILE, plugins)
        write_text(path / "metrics.jsonl", "")
        self._writer: SummaryWriter | None = None
        self._has_events = "tensorboard" in config.output.trackers

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one round to ``metrics.jsonl`` and to the TensorBoard events."""
        path = self.path / "metrics.jsonl"
        with errors_named(path), path.open("a", encoding="utf-8") as file:
            file.write(json_text(line, sort_keys=True) + "\n")
        if self._has_events:
            with BestEffort("writing TensorBoard events", "; metrics.jsonl has every value") as attempt:
                self._append_events(line)
            self._has_events = not attempt.failed

    def _append_events(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        for key, value in line.items():
            if key != "server_round" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["server_round"])
        self._writer.flush()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Finish the TensorBoard events and give up the folder; a second call does nothing."""
        if self._writer is not None and self._has_events:
            with BestEffort("closing TensorBoard events"):
                self._writer.close()
        if self._lock is not None:
            release(self.path, self._lock)
        self._writer = self._lock = None

    def write_report(self) -> None:
        """Draw the report, best effort: the results are there without it."""
        with BestEffort("drawing the report", f"; the run is complete, try: fedlora report {self.path}"):
            from federated.results.report import write_report  # here: it imports the plotting library

            write_report(self.path)


def describe_environment(config: ExperimentConfig) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run: when, by what, versions, machine, seed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions | {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": config.engine.threads,
        "commit": _commit(),
        "seed": config.seed,
        **({} if config.model.adapter is None else {"adapter": adapter_identity(config.model.adapter)}),
    }


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_memory_bytes() -> int:
    """Return the most memory that this process or one of its workers has held (Linux, which counts in kB)."""
    ended = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return 1024 * max([ended, *_kilobytes_of_living_children()])


def _kilobytes_of_living_children() -> Iterator[int]:
    """Yield the most, in units of 1,024 B, that each process held that this one started and has not ended."""
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # it has ended meanwhile
            continue
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        if "VmHWM" in values and int(values["PPid"]) == os.getpid():
            yield int(values["VmHWM"].split()[0])


def _commit() -> str:
    """Return the commit of the source tree, or ``not a checkout``."""
    git = shutil.which("git")
    root = Path(__file__).parents[2]
    if git is None or not (root / ".git").exists():
        return "not a checkout"
    result = subprocess.run(
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "no commit"

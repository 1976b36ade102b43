"""The folder of a run: everything it leaves behind, written as it happens.

``config.yaml``, ``environment.json`` and ``partition.json`` are written before the first round; a line of
``metrics.jsonl``, the rows of ``communication.csv`` and TensorBoard events after each round; ``checkpoint/``
holds the latest global state; ``summary.json`` and ``adapter/`` come at the end. Files appear whole or not
at all.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from federated.config import ExperimentConfig, dump_config
from models.errors import UserError
from models.files import json_text, write_json, write_text
from models.state import State, save_state

_MARKER = "config.yaml"
_PACKAGES = ("fedlora", "torch", "transformers", "peft", "flwr", "flwr-datasets", "datasets", "numpy")


class RunFolder:
    """Writes a run's files under ``path``.

    Args:
        path: The folder; it must not exist unless ``overwrite``.
        config: The resolved configuration.
        overwrite: Replace an earlier run's folder. A folder that is not a run's is never removed.

    Raises:
        UserError: The folder exists and may not be replaced.
    """

    def __init__(self, path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        self.path = path
        check_free(path, overwrite=overwrite)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        write_text(path / _MARKER, dump_config(config))
        write_json(path / "environment.json", describe_environment(config))
        (path / "metrics.jsonl").touch()
        self._writer: SummaryWriter | None = None

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one round to ``metrics.jsonl`` and to the TensorBoard events."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text(line, sort_keys=True) + "\n")
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        for key, value in line.items():
            if key != "server_round" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["server_round"])
        self._writer.flush()

    def save_checkpoint(self, state: State, *, server_round: int) -> None:
        """Replace the checkpoint by the global state after ``server_round``."""
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        save_state(state, folder / "state.safetensors", {"server_round": str(server_round)})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Finish the TensorBoard events."""
        if self._writer is not None:
            self._writer.close()


def describe_environment(config: ExperimentConfig) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run: versions, machine, threads, commit, seed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": config.engine.threads,
        "commit": _commit(),
        "seed": config.seed,
    }


def check_free(path: Path, *, overwrite: bool) -> None:
    """Make sure that a run may be written to ``path``, without touching it.

    Raises:
        UserError: It exists and may not be replaced, or is not a run folder.
    """
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} already exists: pass --overwrite to replace it, or set output.name=OTHER")
    if not path.is_dir() or (any(path.iterdir()) and not (path / _MARKER).is_file()):
        raise UserError(f"{path} is not a run folder (it has no {_MARKER}): it is not overwritten")


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
    root = Path(__file__).parents[1]
    if git is None or not (root / ".git").exists():
        return "not a checkout"
    result = subprocess.run(
        [git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "no commit"

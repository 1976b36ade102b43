"""The folder of a run: everything it leaves behind, written as it happens.

``config.yaml``, ``environment.json``, ``plugins.json`` (where the run needs plugins) and ``partition.json``
are written before the first round; a line of
``metrics.jsonl``, the rows of ``communication.csv`` and TensorBoard events after each round; ``checkpoint/``
holds the last rounds' commits, ``adapter_best/`` that of the best round; ``adapter/`` and ``summary.json``
come at the end. Files appear whole or not at all. Pictures and events are best effort: no run ends for them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
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
from typing import Any, cast

import torch
from torch.utils.tensorboard import SummaryWriter

from federated.config.config_files import dump_config
from federated.config.plugins import PLUGINS_FILE, used_plugins
from federated.config.schema import ExperimentConfig
from federated.results.event_tags import scalars, settings_events
from federated.results.round_record import wire_bytes
from federated.results.run_log import logged
from federated.results.run_place import ENVIRONMENT_FILE, claim, reclaim, release
from lora.start_adapter import adapter_identity
from models.files import BestEffort, append_whole, errors_named, json_text, sync, write_json, write_text

METRICS_FILE, LEDGER_FILE, LOST_FILE = "metrics.jsonl", "communication.csv", "lost.csv"
GROWING = (METRICS_FILE, LEDGER_FILE, LOST_FILE)
"""Files that rounds add to; the last holds what was sent in rounds that were lost."""
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

    _sent_bytes = 0  # in the rounds that have their events
    _settings_end: Any = None  # the event that ends those of the settings

    def __init__(self, path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> None:
        self._begin(path, claim(path, overwrite=overwrite))
        with self._closed_on_error():
            write_json(path / ENVIRONMENT_FILE, describe_environment(config))
            self._log.enter_context(logged(path))
            self.write_config(config)
            write_text(path / METRICS_FILE, "")

    @classmethod
    def reopened(cls, path: Path) -> RunFolder:
        """Return the folder of a run that goes on: locked, with all that it left.

        Raises:
            UserError: No run made it, it is in use, or cannot be written.
        """
        folder = cls.__new__(cls)
        folder._begin(path, reclaim(path))
        folder._log.enter_context(logged(path))
        return folder

    def _begin(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock
        self._log = contextlib.ExitStack()
        self._writer: SummaryWriter | None = None
        self._has_events = True
        self.purge_step: int | None = None
        """TensorBoard step from which on the events of an earlier attempt do not count."""

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def write_config(self, config: ExperimentConfig) -> None:
        """Write ``config.yaml``, which says whether events are written from now on, and which plugins."""
        self._has_events = "tensorboard" in config.output.trackers
        write_text(self.path / "config.yaml", dump_config(config))
        if plugins := used_plugins(config):
            write_json(self.path / PLUGINS_FILE, plugins)

    def reopen_files(self, config: ExperimentConfig, *, first_step: int) -> None:
        """Prepare a run to go on: with its configuration from here on, and without the end that it had.

        Args:
            config: Of all rounds.
            first_step: The next round; TensorBoard events of an earlier attempt at it do not count.
        """
        (self.path / "summary.json").unlink(missing_ok=True)
        self.write_config(config)
        self.purge_step = first_step

    def lengths_on_disk(self) -> dict[str, int]:
        """Return the bytes of each file that grows; they are on the disk."""
        lengths = {}
        for name in GROWING:
            path = self.path / name
            if path.is_file():
                sync(path)
                lengths[name] = path.stat().st_size
        return lengths

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one round to ``metrics.jsonl`` and to the TensorBoard events."""
        path = self.path / METRICS_FILE
        text = json_text(line, sort_keys=True) + "\n"
        with errors_named(path, len(text)):
            append_whole(path, text)
        if self._has_events:
            with BestEffort("writing TensorBoard events", "; metrics.jsonl has every value") as attempt:
                self._append_events(line)
            self._has_events = not attempt.failed

    def _append_events(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path), purge_step=self.purge_step)
            self._sent_bytes = sum(wire_bytes(each) for each in self._lines_before(line["server_round"]))
        values = scalars(line, self._sent_bytes)
        self._sent_bytes += wire_bytes(line)
        if self._settings_end is None:
            *beginning, self._settings_end = settings_events(self.path / "config.yaml", values)
            for event in beginning:
                cast(Any, self._writer.file_writer).add_summary(event)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, line["server_round"])
        self._writer.flush()

    def _lines_before(self, server_round: int) -> Iterator[dict[str, Any]]:
        """Yield the rounds that an earlier process wrote down."""
        for text in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line["server_round"] < server_round:
                yield line

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.path / "summary.json", summary)
        if self._writer is not None and self._has_events and self._settings_end is not None:
            with BestEffort("writing TensorBoard events"):
                cast(Any, self._writer.file_writer).add_summary(self._settings_end)

    def close(self) -> None:
        """Finish the TensorBoard events and give up the folder; a second call does nothing."""
        self._log.close()
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
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return package_versions() | {
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": config.engine.threads,
        "commit": _commit(),
        "seed": config.seed,
        **({} if config.model.adapter is None else {"adapter": adapter_identity(config.model.adapter)}),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


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

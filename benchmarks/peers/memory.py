"""Peak memory of a process and everything it starts, shared pages counted once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_INTERVAL_SECONDS = 0.25
_IDLE_FACTOR = 20
"""A reading takes 30 ms a GB; until the next one pass at least this many times as long as it took."""


class PeakMemory(threading.Thread):
    """Samples the proportional set size of a process tree (Linux) until ``stop``."""

    def __init__(self, root_pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._root_pid = root_pid
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample."""
        pause = _INTERVAL_SECONDS
        while not self._stopped.wait(pause):
            started = time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, sum(_own_bytes(pid) for pid in _tree(self._root_pid)))
            pause = max(_INTERVAL_SECONDS, _IDLE_FACTOR * (time.perf_counter() - started))

    def stop(self) -> int:
        """Return the highest sum seen."""
        self._stopped.set()
        self.join()
        return self.peak_bytes


def _tree(root_pid: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    tree = [root_pid]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _own_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))

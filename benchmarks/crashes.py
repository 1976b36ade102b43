"""Runs that are killed: ``python -m benchmarks.crashes --kills 200``; what commits cost: ``--overhead``.

``--kills``: whole processes are ended by ``kill -9`` at random moments of a run or of its resumption, up to
three times a run; then the run is brought to its end and held against one that nobody killed. Methods take
turns. ``--overhead``: seconds and bytes of the commits of the quick start, and the seconds of a round and the
memory at the start and at the end of 200 rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.machine import describe_machine
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.engines.simulation import resume_experiment, run_experiment
from federated.results.run_place import can_be_resumed
from federated.rounds import server
from federated.rounds.checkpoint import latest_checkpoint, read_commit

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
    "partition.num_clients=3",
    "client.local_steps=1",
    "client.batch_size=4",
    "data.max_train_samples=60",
    "data.max_test_samples=20",
    "evaluation.clients_every=2",
    "output.report=false",
)
"""Three rounds with two of three clients, in a second."""

MOST_KILLS_A_RUN = 3


def tiny_config(root: Path, method: str, *overrides: str) -> ExperimentConfig:
    """Return a run of a method that is over in a second."""
    return load_config("quickstart", [*TINY, *METHODS[method], f"output.root={root}", *overrides])


def continued(config: ExperimentConfig) -> Path:
    """Bring a run to its end that stopped anywhere: resume it, or start it again before its first commit."""
    path = Path(config.output.root) / str(config.output.name)
    if can_be_resumed(path):
        return resume_experiment(path)
    if (path / "summary.json").is_file():
        return path
    return run_experiment(config, overwrite=True)


def results_of(run: Path) -> dict[str, Any]:
    """Return what may not depend on where a run stopped: its results by file, and its clients' states."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for key in ("seconds", "peak_memory_bytes", "attempts", "lost"):
        summary.pop(key, None)
    results: dict[str, Any] = {"summary": summary, "ledger": (run / "communication.csv").read_bytes()}
    results["metrics"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    for folder in ("adapter", "adapter_best"):
        for path in sorted((run / folder).glob("*")):
            results[f"{folder}/{path.name}"] = path.read_bytes()
    content, _, states = read_commit(latest_checkpoint(run))
    results["versions"], results["ranks"] = content.versions, content.ranks
    results["clients"] = plain(states)
    return results


def plain(value: Any) -> Any:
    """Return nested mappings with lists in place of tensors, which compare as a whole."""
    if hasattr(value, "items"):
        return {key: plain(inner) for key, inner in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


# ---- kills


def process(work: Callable[[], object]) -> int:
    """Start some work in a process of its own; return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def is_killed(child: int, seconds: float) -> bool:
    """Kill a process after so many seconds; whether it was still there.

    Raises:
        RuntimeError: It had failed by itself.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if status:
                raise RuntimeError(f"process {child} failed by itself")
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill_runs(num_kills: int, seed: int) -> None:
    """Kill runs until so many kills have hit one, and print how many runs ended identical."""
    rng, done, identical, runs = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        expected, seconds = {}, {}
        for method in METHODS:
            config = tiny_config(Path(folder) / "whole" / method, method)
            run_experiment(config)  # the first of a process is slower
            started = time.perf_counter()
            expected[method] = results_of(run_experiment(config, overwrite=True))
            seconds[method] = time.perf_counter() - started
        while done < num_kills:
            method = list(METHODS)[runs % len(METHODS)]
            config = tiny_config(Path(folder) / f"{runs}", method)
            kills = 0
            for _ in range(min(rng.randint(1, MOST_KILLS_A_RUN), num_kills - done)):
                child = process(lambda config=config: continued(config))  # type: ignore[misc]
                kills += is_killed(child, rng.uniform(0, seconds[method]))
            same = results_of(continued(config)) == expected[method]
            runs, done, identical = runs + 1, done + kills, identical + (kills if same else 0)
            print(
                f"{method}: {kills} kills, {'identical' if same else 'DIFFERENT'}; {done} kills so far",
                flush=True,
            )
    print(f"{identical} of {done} kills were followed by the bytes of a run that nobody killed ({runs} runs)")
    if identical != done:
        raise SystemExit(1)


# ---- what commits cost


def measure_overhead() -> None:
    """Print the share of a round that its commit takes, in seconds, and the bytes that commits take."""
    commits: list[float] = []
    original = server.commit

    def timed(served: server.Served) -> None:
        started = time.perf_counter()
        original(served)
        commits.append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder, patch.object(server, "commit", timed):
        print(describe_machine())
        for method in ("fedavg", "fedsa", "error feedback", "scaffold"):
            commits.clear()
            place = [f"output.root={folder}/{method}", "output.report=false"]
            run = run_experiment(load_config("quickstart", [*place, *METHODS[method]]))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
            round_seconds = statistics.median(line["seconds"] for line in lines)
            seconds = statistics.median(commits[1:])
            held = bytes_of(run / "adapter") + client_bytes(run)
            disk = bytes_of(run / "checkpoint")
            print(
                f"quickstart, {method}: a commit {seconds * 1000:.1f} ms of a round of {round_seconds:.2f} s "
                f"({seconds / round_seconds:.2%}); checkpoint/ {disk / 1e6:.2f} MB, {disk / held:.2f} × "
                f"(adapter + client states)"
            )


def measure_growth() -> None:
    """Print whether rounds take longer, or the process more memory, at the end of 200 rounds."""
    with tempfile.TemporaryDirectory() as folder:
        for method in ("fedavg", "fedsa"):
            watch = Watch()
            config = tiny_config(Path(folder) / method, method, "federation.rounds=200")
            run_experiment(config, display=watch)  # type: ignore[arg-type]
            spent = [1000 * (after - before) for before, after in itertools.pairwise(watch.seconds)]
            early, late = statistics.median(spent[:50]), statistics.median(spent[-50:])
            before, after = watch.memory[50] / 1e6, watch.memory[-1] / 1e6
            print(
                f"200 rounds, {method}: {early:.0f} ms of the processor a round in the first 50, "
                f"{late:.0f} ms in the last 50; memory {before:.0f} MB after round 50, {after:.0f} MB at the "
                "end"
            )


class Watch:
    """A display that shows nothing and notes, after each round, the process's memory and processor time."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.seconds: list[float] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is shown."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None

    def round_done(self, metrics: object) -> None:
        """Note the resident memory, and the seconds of the processor so far."""
        self.seconds.append(time.process_time())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))


def bytes_of(folder: Path) -> int:
    """Return the bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def client_bytes(run: Path) -> int:
    """Return the bytes of what all clients keep, each for itself."""
    states = read_commit(latest_checkpoint(run))[2]
    tensors = (t for records in states.values() for record in records.values() for t in record.values())
    return sum(getattr(tensor, "nbytes", 8) for tensor in tensors)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overhead", action="store_true")
    arguments = parser.parse_args()
    if arguments.overhead:
        measure_overhead()
        measure_growth()
    if arguments.kills or not arguments.overhead:
        kill_runs(arguments.kills or 200, arguments.seed)


if __name__ == "__main__":
    main()

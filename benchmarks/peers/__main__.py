"""Whole simulations against other simulators: ``python -m benchmarks.peers [workload ...]``.

Every contender runs in a process of its own, from start to exit, on the same model, rows, clients and steps;
peak memory is that of the process and all it starts. Files are prepared outside the timings, images are
decoded within them, and only this project writes a run folder with ledger, checkpoints and adapter (no peer
draws a report, and here it is left out, too). Needs, beside the project,
``pip install '.[peers]'`` in an environment of its own; a peer that is not installed is left out and named.
Workloads that are not named keep the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Row, with_earlier, write_results
from benchmarks.peers.memory import PeakMemory
from federated.commands.importing import modules_that_stay

_TINY = (
    "partition.name=iid",
    "partition.options={}",
    "partition.local_test_fraction=0",
    "data.max_test_samples=20",
    "evaluation.every=1000",
    "evaluation.max_samples=2",
    "evaluation.clients=false",
    "federation.cohort_size=null",
)
WORKLOADS = {
    "quickstart": ("tiny, 10 clients x 5 rounds x 12 steps of 32", (
        "data.max_train_samples=2560", "partition.num_clients=10", "federation.rounds=5",
        "client.local_steps=12", "client.batch_size=32",
    )),
    "one-step": ("tiny, 100 clients x 5 rounds x 1 step of 16", (
        "data.max_train_samples=3200", "partition.num_clients=100", "federation.rounds=5",
        "client.local_steps=1", "client.batch_size=16",
    )),
    "many-clients": ("tiny, 50 of 1,000 clients x 5 rounds x 1 step of 4", (
        "data.max_train_samples=4000", "partition.num_clients=1000", "federation.rounds=5",
        "federation.cohort_size=50", "client.local_steps=1", "client.batch_size=16",
    )),
    "vit": ("ViT-B/32 shape, 4 clients x 2 rounds x 2 steps of 16", (
        "data.max_train_samples=128", "partition.num_clients=4", "federation.rounds=2",
        "client.local_steps=2", "client.batch_size=16", "lora.target_modules=[q_proj,v_proj]",
        "model.model_name=openai/clip-vit-base-patch32", "model.pretrained=false",
    )),
}  # fmt: skip
"""Key -> what it is, and overrides of the shipped quick start."""


@dataclass(frozen=True)
class Contender:
    """A way to run a workload.

    Attributes:
        way: "plain", "copies", "fedlora", "pfl" or "flower".
        threads: Torch threads of each of its processes.
        cores: How many of the machine's cores it can keep busy.
        sections: Settings by section, where it is this project.
        needs: A module that must be installed.
    """

    way: str
    threads: int = 1
    cores: int = 1
    sections: Mapping[str, Mapping[str, Any]] | None = None
    needs: str | None = None


CONTENDERS = {
    "plain loop": Contender("plain"),
    "model per client": Contender("copies"),
    "pfl": Contender("pfl", needs="pfl"),
    "fedlora": Contender("fedlora", sections={"engine": {"threads": 1}}),
    "fedlora, 8 clients at once": Contender(
        "fedlora", sections={"engine": {"threads": 1, "batched_clients": 8}}
    ),
    "plain loop, 2 threads": Contender("plain", threads=2, cores=2),
    "pfl, 2 threads": Contender("pfl", threads=2, cores=2, needs="pfl"),
    "Flower simulation, 2 actors": Contender("flower", cores=2, needs="ray"),
    "fedlora, 2 workers": Contender("fedlora", cores=2, sections={"engine": {"threads": 1, "workers": 2}}),
    "fedlora, 2 workers, 8 clients at once each": Contender(
        "fedlora", cores=2, sections={"engine": {"threads": 1, "workers": 2, "batched_clients": 8}}
    ),
    "fedlora, 2 threads, little memory": Contender(
        "fedlora",
        threads=2,
        cores=2,
        sections={
            "engine": {"threads": 2},
            "client": {"micro_batch_size": 8},
            "cache": {"folder": tempfile.gettempdir()},
        },
    ),
    "fedlora, 2 threads, 8 clients at once": Contender(
        "fedlora", threads=2, cores=2, sections={"engine": {"threads": 2, "batched_clients": 8}}
    ),
}


def run_contender(name: str, folder: Path) -> dict[str, list[float]]:
    """Run one contender in this process."""
    contender = CONTENDERS[name]
    if contender.way == "fedlora":
        with modules_that_stay():  # as in every command of this project
            from benchmarks.peers.fedlora_run import fedlora_run

        timings = fedlora_run(folder, contender.sections or {})
        return {"seconds": timings.seconds, "losses": timings.losses}
    import torch

    from benchmarks.peers.prepared import read_prepared

    torch.set_num_threads(contender.threads)
    ways: dict[str, Callable[[], Any]] = {}
    if contender.way in ("plain", "copies"):
        from benchmarks.peers.loops import model_per_client, plain_loop

        ways = {"plain": lambda: plain_loop(read_prepared(folder))}
        ways["copies"] = lambda: model_per_client(read_prepared(folder))
    elif contender.way == "pfl":
        from benchmarks.peers.pfl_research import pfl_simulation

        ways = {"pfl": lambda: pfl_simulation(read_prepared(folder))}
    else:
        from benchmarks.peers.flower import flower_simulation

        ways = {"flower": lambda: flower_simulation(read_prepared(folder))}
    timings = ways[contender.way]()
    return {"seconds": timings.seconds, "losses": timings.losses}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in a process of its own; seconds from start to exit, and peak memory."""
    command = [sys.executable, "-m", "benchmarks.peers", "--contender", name, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(CONTENDERS[name].threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        memory = PeakMemory(process.pid)
        memory.start()
        code = process.wait()
        wall_seconds, peak_bytes = time.perf_counter() - started, memory.stop()
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    found = next((json.loads(line) for line in reversed(lines) if line.startswith('{"seconds"')), None)
    if code or found is None:
        raise RuntimeError(f"{name} failed:\n" + "\n".join(lines[-30:]))
    return {"wall_seconds": wall_seconds, "peak_bytes": peak_bytes, **found}


def rows_of(title: str, measured: Mapping[str, dict[str, Any]]) -> list[Row]:
    """Return the table's rows of one workload; a ratio above 1: this project is faster on as many cores."""
    ours = {name: result for name, result in measured.items() if CONTENDERS[name].way == "fedlora"}
    best: dict[int, float] = {}
    for name, result in ours.items():
        cores = CONTENDERS[name].cores
        best[cores] = min(best.get(cores, result["wall_seconds"]), result["wall_seconds"])
    rows = []
    for name, result in measured.items():
        cores = CONTENDERS[name].cores
        rows.append(
            {
                "workload": title,
                "contender": name,
                "time": f"{result['wall_seconds']:.1f} s",
                "ratio": f"{result['wall_seconds'] / best[cores]:.2f}" if cores in best else "",
                "against": f"fedlora's best on {cores} core{'s' if cores > 1 else ''}",
                "first round": f"{result['seconds'][0]:.2f} s",
                "steady round": f"{_steady(result):.2f} s",
                "peak memory": f"{result['peak_bytes'] / 1e9:.2f} GB",
                "last loss": f"{result['losses'][-1]:.4f}",
            }
        )
    return rows


def _median_run(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return sorted(results, key=lambda result: float(result["wall_seconds"]))[len(results) // 2]


def _steady(result: Mapping[str, Any]) -> float:
    later = sorted(result["seconds"][1:] or result["seconds"])
    return later[len(later) // 2]


def main() -> None:
    """Measure every contender on the workloads named, all by default, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--turns", type=int, default=1, help="runs of each, in turn; the median is shown")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(run_contender(arguments.contender, arguments.folder)), flush=True)
        return
    from benchmarks.peers.prepared import prepare

    names = [n for n in arguments.only if CONTENDERS[n].needs is None or _installed(CONTENDERS[n].needs)]
    missing = sorted(set(arguments.only) - set(names))
    table: list[Row] = []
    for key in arguments.workloads or WORKLOADS:
        title, overrides = WORKLOADS[key]
        with tempfile.TemporaryDirectory() as folder:
            prepare("quickstart", [*_TINY, *overrides], Path(folder))
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for _ in range(arguments.turns):
                for name in names:
                    runs[name].append(measure(name, Path(folder)))
                    print(title, "|", name, runs[name][-1], flush=True)
        table += rows_of(title, {name: _median_run(results) for name, results in runs.items()})
    notes = f"Not installed, so left out: {', '.join(missing)}." if missing else ""
    print(write_results("peers", "python -m benchmarks.peers", with_earlier("peers", table), notes=notes))


def _installed(module: str | None) -> bool:
    return module is not None and importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    main()

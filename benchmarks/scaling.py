"""How a simulation grows: ``python -m benchmarks.scaling``.

Time with the size of the cohort, start-up and peak memory with the number of clients, bytes with the rank.
All on the bundled CLIP with the quick start's adapters and one local step; each number of clients is measured
in a process of its own, on 10,000 images drawn for the purpose, with a cohort of 10.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.limit import FAST, ONE_STEP, Engine, Workload
from benchmarks.machine import Row, write_results
from federated.communication.byte_counts import payload_bytes, wire_bytes
from federated.communication.codec import codec_from_name
from federated.communication.messages import SERVER_ROUND, write_state
from federated.config.config_files import load_config
from federated.rounds.run import build_run
from federated.rounds.saving import model_sizes

COHORTS = (2, 8, 32, 128, 256)
CLIENTS = (4, 100, 1_000, 10_000)
RANKS = (1, 4, 16, 64)
NUM_IMAGES = 10_000
NUM_CLASSES = 10


def cohort_rows(repeats: int = 3) -> Iterable[Row]:
    """Time rounds of growing cohorts out of 256 clients."""
    first = None
    for size in COHORTS:
        overrides = (
            "data.max_train_samples=3000",
            "partition.num_clients=256",
            f"federation.cohort_size={size}",
        )
        one_round = Engine(Workload("", "quickstart", (*FAST, *ONE_STEP, *overrides), 0))
        one_round()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            one_round()
            seconds.append(time.perf_counter() - started)
        per_client = statistics.median(seconds) / size
        first = first or per_client
        yield {
            "workload": f"cohort of {size} of 256 clients",
            "contender": "engine",
            "time": f"{statistics.median(seconds):.3f} s a round, {1e3 * per_client:.1f} ms a client",
            "ratio": f"{per_client / first:.2f}",
            "against": "a client's time in a cohort of 2",
        }


def draw_images(folder: Path) -> None:
    """Write small one-coloured images into class folders, a fifth of the last ones for testing."""
    colours = np.random.default_rng(0).integers(256, size=(NUM_IMAGES + 100, 3), dtype=np.uint8)
    for index, colour in enumerate(colours):
        split = "train" if index < NUM_IMAGES else "test"
        place = folder / split / f"class_{index % NUM_CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(int(level) for level in colour)).save(place / f"{index}.png")


def start_with(num_clients: int, folder: Path) -> dict[str, float]:
    """Start a run of this many clients in this process and take two rounds."""
    overrides = (
        "data.source=imagefolder",
        f"data.path={folder}",
        "partition.name=iid",
        "partition.options={}",
        "partition.local_test_fraction=0",
        f"partition.num_clients={num_clients}",
        f"federation.cohort_size={min(10, num_clients)}",
        *ONE_STEP,
    )
    config = load_config("quickstart", list(overrides))
    started = time.perf_counter()
    build_run(config)
    start_seconds = time.perf_counter() - started
    one_round = Engine(Workload("", "quickstart", overrides, 0))
    for _ in range(2):
        one_round()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"start_seconds": start_seconds, "peak_bytes": peak_bytes}


def client_rows() -> Iterable[Row]:
    """Measure start-up and memory for growing numbers of clients."""
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder))
        measured = {}
        for num_clients in CLIENTS:
            command = [sys.executable, "-m", "benchmarks.scaling", "--clients", str(num_clients)]
            output = subprocess.run(
                [*command, "--folder", folder], check=True, capture_output=True, text=True
            ).stdout
            measured[num_clients] = json.loads(output.splitlines()[-1])
    base = measured[100]
    for num_clients, found in measured.items():
        yield {
            "workload": f"{num_clients:,} clients, cohort of {min(10, num_clients)}",
            "contender": "engine",
            "time": f"start-up {found['start_seconds']:.2f} s, peak {found['peak_bytes'] / 1e9:.3f} GB",
            "ratio": f"memory {found['peak_bytes'] / base['peak_bytes']:.2f}, "
            f"start-up {found['start_seconds'] - base['start_seconds']:+.2f} s",
            "against": "100 clients",
        }


def rank_rows() -> Iterable[Row]:
    """Count the bytes of one client's update by rank and codec, from real messages."""
    full = None
    for rank in RANKS:
        experiment = build_run(load_config("quickstart", [*FAST, f"lora.r={rank}"]))
        full = full or model_sizes(experiment).full_model_bytes
        for codec in ("fp32", "int8"):
            content = write_state(
                experiment.initial_state, codec_from_name(codec), np.random.default_rng(0), {SERVER_ROUND: 1}
            )
            yield {
                "workload": f"r={rank}, {codec}",
                "contender": "an update",
                "time": f"{payload_bytes(content):,} B of tensors, {wire_bytes(content):,} B on the wire",
                "ratio": f"{wire_bytes(content) / full:.4f}",
                "against": "the full model in fp32",
            }


def main() -> None:
    """Measure all three and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.clients:
        print(json.dumps(start_with(arguments.clients, arguments.folder)))
        return
    rows: list[Row] = []
    for part in (cohort_rows(), client_rows(), rank_rows()):
        for row in part:
            rows.append(row)
            print(row, flush=True)
    print(write_results("scaling", "python -m benchmarks.scaling", rows))


if __name__ == "__main__":
    main()

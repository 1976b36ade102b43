"""What ``torch.compile`` would bring to a local step: ``python -m benchmarks.compiled``.

One step of the quick start (the loss of a batch, its gradient, AdamW) as it is taken, and with the loss
compiled; compiled once, then timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor

from benchmarks.limit import FAST
from benchmarks.machine import Row, write_results
from federated.config.config_files import load_config
from federated.rounds.batches import local_batches
from federated.rounds.run import build_run
from lora.adapters import unwrap
from models.training import Batch

NUM_STEPS = 25


def main() -> None:
    """Time both ways and write the table."""
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # as on the first run of a machine
    experiment = build_run(load_config("quickstart", [*FAST, "partition.num_clients=4"]))
    model: Any = unwrap(experiment.model)
    batch = next(iter(local_batches(experiment, 0, 1, np.random.default_rng(0), server_round=1)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def seconds(loss_of: Callable[[Any, Batch], Tensor]) -> float:
        started = time.perf_counter()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    def as_taken(model: Any, batch: Batch) -> Tensor:
        with model.lean():
            return model.task.loss(model, batch)

    compiled = torch.compile(model.task.loss)
    compile_seconds = seconds(compiled)
    ways = {"as it is taken": as_taken, "compiled": compiled}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_STEPS):
        for name, way in ways.items():
            times[name].append(seconds(way))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows: list[Row] = [
        {
            "step": name,
            "time": f"{1e3 * median:.1f} ms",
            "ratio": f"{median / medians['as it is taken']:.2f}",
            "first step": f"{compile_seconds:.0f} s" if name == "compiled" else "",
        }
        for name, median in medians.items()
    ]
    print(write_results("compiled", "python -m benchmarks.compiled", rows))


if __name__ == "__main__":
    main()

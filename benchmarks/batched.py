"""Batched clients against the sequential engine and against a plain PyTorch loop without federation.

Run with ``python -m benchmarks.batched``. The workload is the one on which overhead weighs most: many clients
that take one small local step a round, on the bundled tiny CLIP with rank-8 adapters on the vision tower's q
and v projections and a 10-class head.

All ways train the same clients on the same images from the same start, and the table says how far their
results are apart. The plain loop is what one would write without a framework: transformers, PEFT's adapters,
one fused AdamW whose state is cleared for each client, values copied in and out, an average; no messages, no
bytes counted, nothing written. The engine's rounds hold all of that. Start-up, decoding of images and the
server's evaluation are left out on all sides. The ways take turns, one run each, and the medians over the
repeats of the time of a whole run's rounds are compared, by the clock and by the process's CPU time.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from benchmarks.machine import Row, write_results
from benchmarks.silent import SilentDisplay
from federated.config.config_files import load_config
from federated.config.schema import ExperimentConfig
from federated.config.seeding import generator, scoped_torch_rng
from federated.data.batch_order import local_index_batches
from federated.engines.simulation import run_experiment
from federated.rounds.checkpoint import latest_checkpoint, load_server_checkpoint
from federated.rounds.run import Run, build_run
from models.clip_loading import TINY_FOLDER

State = dict[str, Tensor]


@dataclass(frozen=True)
class Timing:
    """One way to do all rounds.

    Attributes:
        name: The way.
        cpu_seconds: CPU time of all rounds, one value a repeat.
        wall_seconds: Likewise by the clock.
        difference: Relative L2 distance of the result from the plain loop's.
    """

    name: str
    cpu_seconds: list[float]
    wall_seconds: list[float]
    difference: float


class Stopwatch(SilentDisplay):
    """A display that notes when round 0 and the last round were done; shows nothing."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def round_done(self, metrics: Mapping[str, Any]) -> None:
        """Note the time."""
        self.times.append((time.process_time(), time.perf_counter()))

    def seconds(self) -> tuple[float, float]:
        """CPU and wall seconds of all rounds after round 0."""
        (cpu, wall), (last_cpu, last_wall) = self.times[0], self.times[-1]
        return last_cpu - cpu, last_wall - wall


@functools.cache
def workload(num_clients: int, num_rounds: int) -> ExperimentConfig:
    """Return the workload; read once, so that all ways have the same even while configs/ is edited."""
    return load_config(
        "quickstart",
        [
            "lora.target_modules=[q_proj,v_proj]",
            f"partition={{name: iid, num_clients: {num_clients}, local_test_fraction: 0}}",
            f"federation.rounds={num_rounds}",
            "client={local_steps: 1, batch_size: 16, learning_rate: 2.0e-3}",
            "data={max_train_samples: 3200, max_test_samples: 10}",
            "evaluation={every: 1000, clients: false}",
            "engine.threads=1",
        ],
    )


def configuration(folder: str, num_clients: int, num_rounds: int, batched: int | str) -> ExperimentConfig:
    """Return the workload with ``engine.batched_clients`` and a run folder of its own."""
    base = workload(num_clients, num_rounds)
    engine = base.engine.model_copy(update={"batched_clients": batched})
    output = base.output.model_copy(update={"root": folder, "name": f"batched-{batched}"})
    return base.model_copy(update={"engine": engine, "output": output})


def engine_run(config: ExperimentConfig) -> tuple[float, float, State]:
    """Run on the in-process engine; CPU and wall seconds of its rounds, and the last global state."""
    experiment = build_run(config)
    experiment.reader.train_images.pixel_values(np.arange(len(experiment.reader.train_images)))
    stopwatch = Stopwatch()
    path = run_experiment(config, overwrite=True, display=stopwatch)  # type: ignore[arg-type]
    return *stopwatch.seconds(), dict(load_server_checkpoint(latest_checkpoint(path)).server.state)


def plain_run(experiment: Run) -> tuple[float, float, State]:
    """Do the same local steps in a plain loop; CPU and wall seconds, and the last global state."""
    clip = CLIPModel.from_pretrained(TINY_FOLDER, local_files_only=True).eval().requires_grad_(False)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=r"vision_model\..*\.(q_proj|v_proj)")
    inject_adapter_in_model(lora, clip)
    head = nn.Linear(experiment.model.embedding_dim, 10)
    wanted = {f"clip.{n}".replace(".default", ""): p for n, p in clip.named_parameters() if "lora_" in n}
    live = {**wanted, "head.weight": head.weight, "head.bias": head.bias}
    state = {name: experiment.initial_state[name].clone() for name in live}
    optimizer = torch.optim.AdamW(list(live.values()), lr=2e-3, weight_decay=0.0, fused=True)
    images = experiment.reader.train_images.pixel_values(np.arange(len(experiment.reader.train_images)))
    labels = experiment.reader.train_images.batch(np.arange(len(experiment.reader.train_images)))["labels"]
    scale = clip.logit_scale.exp()
    started = time.process_time(), time.perf_counter()
    for server_round in range(1, experiment.config.federation.rounds + 1):
        total = {name: torch.zeros_like(value) for name, value in state.items()}
        for client_id, shard in enumerate(experiment.shards):
            with torch.no_grad():
                for name, parameter in live.items():
                    parameter.copy_(state[name])
            optimizer.state.clear()
            rng = generator(experiment.config.seed, "client", server_round, client_id)
            with scoped_torch_rng(rng):
                for rows in local_index_batches(shard.train, 16, 1, rng):
                    features = clip.get_image_features(pixel_values=images[rows]).pooler_output
                    loss = F.cross_entropy(head(scale * F.normalize(features, dim=-1)), labels[rows])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    loss.item()
            with torch.no_grad():
                for name, parameter in live.items():
                    total[name] += parameter * (
                        len(shard.train) / sum(len(s.train) for s in experiment.shards)
                    )
        state = total
    return time.process_time() - started[0], time.perf_counter() - started[1], state


def compare(num_clients: int, num_rounds: int, group_sizes: Sequence[int], *, repeats: int) -> list[Timing]:
    """Time the plain loop, the sequential engine and the engine with each group size, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        plain_config = configuration(folder, num_clients, num_rounds, "off")

        def engine(batched: int | str) -> Callable[[], tuple[float, float, State]]:
            return lambda: engine_run(configuration(folder, num_clients, num_rounds, batched))

        ways = {
            "plain loop": lambda: plain_run(build_run(plain_config)),
            "engine, one by one": engine("off"),
            **{f"engine, {size} clients at once": engine(size) for size in group_sizes},
        }
        runs: dict[str, list[tuple[float, float, State]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                runs[name].append(way())
    reference = runs["plain loop"][0][2]
    return [
        Timing(name, [r[0] for r in done], [r[1] for r in done], _relative(done[0][2], reference))
        for name, done in runs.items()
    ]


def _relative(state: State, reference: State) -> float:
    ours = torch.cat([state[name].flatten() for name in sorted(reference)])
    theirs = torch.cat([reference[name].flatten() for name in sorted(reference)])
    return float((ours - theirs).norm() / theirs.norm())


def rows_of(title: str, timings: Sequence[Timing]) -> list[Row]:
    """Return the table's rows: medians, and ratios to the plain loop and to one by one."""
    medians = [
        [statistics.median(values) for values in (timing.wall_seconds, timing.cpu_seconds)]
        for timing in timings
    ]
    (plain_wall, plain_cpu), (alone_wall, _) = medians[:2]
    return [
        {
            "workload": title,
            "contender": timing.name,
            "time": f"{wall:.2f} s",
            "ratio": f"{wall / plain_wall:.2f}",
            "against": "plain loop",
            "by CPU time": f"{cpu / plain_cpu:.2f}",
            "to one by one": f"{wall / alone_wall:.2f}",
            "result differs by": f"{timing.difference:.1e}",
        }
        for timing, (wall, cpu) in zip(timings, medians, strict=True)
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, nargs="+", default=[8], help="clients at once, some values")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("federated").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    timings = compare(arguments.clients, arguments.rounds, arguments.groups, repeats=arguments.repeats)
    title = f"tiny, {arguments.clients} clients x {arguments.rounds} rounds x 1 step of 16, rounds alone"
    print(write_results("batched", "python -m benchmarks.batched", rows_of(title, timings)))


if __name__ == "__main__":
    main()

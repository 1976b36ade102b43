"""How close a simulation comes to the same local steps in a plain PyTorch loop: `python -m benchmarks.limit`.

Each workload is run by a loop that knows nothing of federation (copy the global values in, a new AdamW, local
steps through transformers and PEFT's own layers on tensors already in memory, copy out, weighted mean), by
the sequential engine with its caches off, by the engine with its caches, and by two forked workers. All of
them take turns, round by round, in one process; figures are medians of rounds, and ratios are medians of the
ratios within a turn: by the clock, and by CPU time of the process and its workers, which other programs on
the machine disturb less. Models start from the same values and see batches of the same rows' number;
evaluation is left out everywhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from peft.tuners.lora.layer import Linear as PeftLinear

import federated.client
from benchmarks.machine import Row, with_earlier, write_results
from federated.client import app
from federated.config import dump_config, load_config
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.metered import MeteredGrid
from federated.experiment import CONFIG_KEY, Experiment, build_experiment
from federated.ledger import Ledger
from federated.server import build_strategy
from lora.linear import LinearLoRA
from models.training import Batch


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        name: In the table.
        config: A shipped configuration.
        overrides: Its changes.
        num_turns: Timed rounds of each contender.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    num_turns: int


ONE_STEP = ("client.local_steps=1", "client.batch_size=16")
VIT = (
    "model.model_name=openai/clip-vit-base-patch32",
    "model.pretrained=false",
    "lora.target_modules=[q_proj, v_proj]",
    "client.batch_size=8",
    "data.max_train_samples=200",
    "data.max_test_samples=20",
)
IID = ("partition.name=iid", "partition.options={}")
FAST = (
    "data.max_train_samples=1500",
    "data.max_test_samples=20",
    "partition.name=iid",
    "partition.options={}",
)
WORKLOADS = {
    "tiny-one-step": Workload(
        "tiny, 25 clients x 1 step of 14",
        "quickstart",
        (*FAST, *ONE_STEP, "partition.num_clients=25"),
        15,
    ),
    "tiny-many-steps": Workload(
        "tiny, 4 clients x 10 steps of 32",
        "quickstart",
        (*FAST, "client.local_steps=10", "partition.num_clients=4"),
        9,
    ),
    "vit": Workload(
        "ViT-B/32 shape, 2 clients x 1 step of 8",
        "quickstart",
        (*FAST, *VIT, "client.local_steps=1", "partition.num_clients=2"),
        5,
    ),
    "retrieval": Workload(
        "tiny retrieval, text adapters, 4 clients x 4 steps of 64",
        "retrieval_vi",
        ("client.local_steps=4", "partition.num_clients=4", "data.max_train_samples=1500"),
        7,
    ),
}
CACHES_OFF = tuple(
    f"cache.{key}=false"
    for key in (
        "image_features",
        "text_features",
        "class_embeddings",
        "activations",
        "deduplicate_captions",
        "trim_prompts",
    )
)


EXPERIMENTS: dict[str, Experiment] = {}
"""Configuration text -> experiment."""


def engine(workload: Workload, overrides: Sequence[str] = (), num_workers: int = 1) -> Callable[[], None]:
    """Return a function that runs one round on the in-process engine."""
    config = load_config(workload.config, [*workload.overrides, *overrides])
    text = dump_config(config)
    experiment = EXPERIMENTS[text] = build_experiment(config)
    experiment.train_images.pixel_values(np.arange(len(experiment.train_images)))  # decoded, as in the loop
    clients = {client_id: node_id_of(client_id) for client_id in range(experiment.num_clients)}
    inner = InProcessGrid(app, len(clients), run_config={CONFIG_KEY: text}, num_workers=num_workers)
    client_of = {node_id: client_id for client_id, node_id in clients.items()}
    grid = MeteredGrid(inner, Ledger(), client_of.__getitem__)
    strategy = build_strategy(experiment, clients)
    server_round = 0

    def one_round() -> None:
        nonlocal server_round
        server_round += 1
        messages = list(strategy.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid))
        strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        if strategy.record.failed:
            raise RuntimeError(str(strategy.record.failed[0]))

    return one_round


def plain_loop(workload: Workload, *, takes_steps: bool = True) -> Callable[[], None]:
    """Return a function that takes the same local steps with no federation.

    Args:
        workload: What to run.
        takes_steps: False draws each step's batch, as the engine does, and leaves the step itself out.
    """
    experiment = build_experiment(load_config(workload.config, [*workload.overrides, *CACHES_OFF]))
    client, model = experiment.config.client, experiment.model
    loss_of = model.task.loss
    inner = getattr(model, "federated_model", model)
    for layer in model.modules():
        if isinstance(layer, LinearLoRA):
            layer.forward = partial(PeftLinear.forward, layer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    shards: list[list[Batch]] = [
        list(experiment.local_batches(i, 8, np.random.default_rng(i), server_round=0))
        for i in range(experiment.num_clients)
    ]
    total = sum(experiment.num_examples(i) for i in range(experiment.num_clients))
    step = 0

    def one_round() -> None:
        nonlocal step
        start = [p.detach().clone() for p in trainable]
        mean = [torch.zeros_like(p) for p in start]
        for client_id, batches in enumerate(shards):
            with torch.no_grad():
                for parameter, value in zip(trainable, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(trainable, lr=client.learning_rate, weight_decay=0.0, fused=True)
            if not takes_steps:
                rng = np.random.default_rng(client_id)
                for _ in experiment.local_batches(client_id, client.local_steps, rng, server_round=0):
                    step += 1
            for _ in range(client.local_steps if takes_steps else 0):
                step += 1
                loss = loss_of(inner, batches[step % len(batches)])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss.item()
            weight = experiment.num_examples(client_id) / total
            with torch.no_grad():
                for value, parameter in zip(mean, trainable, strict=True):
                    value.add_(parameter, alpha=weight)
        with torch.no_grad():
            for parameter, value in zip(trainable, mean, strict=True):
                parameter.copy_(value)

    return one_round


def measure(workload: Workload) -> list[Row]:
    """Run all contenders in turn; medians of a round's seconds and of the ratios within a turn."""
    contenders = {
        "plain loop": plain_loop(workload),
        "engine, caches off": engine(workload, CACHES_OFF),
        "engine": engine(workload),
        "engine, 2 workers": engine(workload, num_workers=2),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(-2, workload.num_turns):
        for name, one_round in contenders.items():
            before = clocks()
            one_round()
            if turn >= 0:  # two rounds to warm up
                times[name].append((clocks()[0] - before[0], clocks()[1] - before[1]))
    return [row_of(workload.name, name, values, times["plain loop"]) for name, values in times.items()]


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and of CPU time of this process and the workers it has waited for."""
    return time.perf_counter(), sum(os.times()[:4])


def row_of(
    title: str, name: str, values: Sequence[tuple[float, float]], base: Sequence[tuple[float, float]]
) -> Row:
    """Return a row of the table: medians of seconds and of the ratios to the plain loop in the same turn."""
    seconds = statistics.median(wall for wall, _ in values)
    ratios = [statistics.median(a[i] / b[i] for a, b in zip(values, base, strict=True)) for i in (0, 1)]
    return {
        "workload": title,
        "contender": name,
        "time": f"{seconds:.3f} s a round",
        "ratio": f"{ratios[0]:.2f}",
        "against": "plain loop",
        "by CPU time": f"{ratios[1]:.2f}",
    }


def added_row(workload: Workload, *overrides: str) -> Row:
    """Return what one more client costs beside its local steps: rounds that draw batches and do not step."""
    one_round = engine(workload, (*CACHES_OFF, *overrides))
    experiment = next(reversed(EXPERIMENTS.values()))
    inner = getattr(experiment.model, "federated_model", experiment.model)
    inner.train_step = lambda batch, labels=None: 0.5
    ways = {"engine": one_round, "plain loop": plain_loop(workload, takes_steps=False)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, 4 * workload.num_turns):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    del inner.train_step
    engine_ms, loop_ms = (
        1e3 * statistics.median(values) / experiment.num_clients for values in times.values()
    )
    return {
        "workload": ", ".join((f"{workload.name}, steps left out", *overrides)),
        "contender": "engine, caches off",
        "time": f"{engine_ms:.2f} ms a client",
        "ratio": f"{engine_ms - loop_ms:.2f} ms more",
        "against": f"plain loop ({loop_ms:.2f} ms: copies, batch, optimizer, mean)",
        "by CPU time": "",
    }


def main() -> None:
    """Run the workloads named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    chosen = parser.parse_args().workloads or list(WORKLOADS)
    torch.set_num_threads(1)
    # The ClientApp remembers one experiment a process; here several take turns.
    federated.client.experiment_of = lambda run_config: EXPERIMENTS[str(run_config[CONFIG_KEY])]
    rows: list[Row] = []
    for key in chosen:
        rows += measure(WORKLOADS[key])
        print(rows[-4:], flush=True)
        EXPERIMENTS.clear()
    if "tiny-one-step" in chosen:
        one_step = WORKLOADS["tiny-one-step"]
        rows += [added_row(one_step), added_row(one_step, "evaluation.aggregation_error_every=0")]
    print(write_results("limit", "python -m benchmarks.limit", with_earlier("limit", rows)))


if __name__ == "__main__":
    main()

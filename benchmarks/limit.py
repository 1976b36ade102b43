"""How close a simulation comes to the same local steps in a plain PyTorch loop: `python -m benchmarks.limit`.

Each workload is run by a loop that knows nothing of federation (copy the global values in, a new AdamW, local
steps through transformers and PEFT's own layers on tensors already in memory, copy out, weighted mean), by
the sequential engine with its caches off, by the engine with its caches, and by two forked workers. All of
them take turns, round by round, in one process; figures are medians of rounds, and ratios are medians of the
ratios within a turn: by the clock, and by CPU time of the process, which other programs disturb less. Models
start from the same values and see batches of the same rows' number; evaluation is left out everywhere.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from peft.tuners.lora.layer import Linear as PeftLinear

from benchmarks.machine import Row, with_earlier, write_results
from federated.communication.ledger import Ledger
from federated.communication.metered_grid import MeteredGrid
from federated.config.config_files import load_config
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.rounds.batches import local_batches
from federated.rounds.client import client_app
from federated.rounds.run import build_run
from federated.rounds.run_strategy import build_strategy
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


class Engine:
    """A workload on the in-process engine; every call runs a round.

    Args:
        workload: What to run.
        overrides: Further changes of its configuration.
        num_workers: Processes.
    """

    def __init__(self, workload: Workload, overrides: Sequence[str] = (), num_workers: int = 1) -> None:
        config = load_config(workload.config, [*workload.overrides, *overrides])
        self.experiment = build_run(config)
        images = self.experiment.reader.train_images
        images.pixel_values(np.arange(len(images)))  # decoded, as in the loop
        clients = {client_id: node_id_of(client_id) for client_id in range(self.experiment.num_clients)}
        client_of = {node_id: client_id for client_id, node_id in clients.items()}
        self._inner = InProcessGrid(client_app(self.experiment), len(clients), num_workers=num_workers)
        self._grid = MeteredGrid(self._inner, Ledger(), client_of.__getitem__)
        self._strategy = build_strategy(self.experiment, clients)
        self._server_round = 0

    def __call__(self) -> None:
        """Run a round."""
        self._server_round += 1
        messages = self._strategy.configure_train(
            self._server_round, ArrayRecord(), ConfigRecord(), self._grid
        )
        self._strategy.aggregate_train(self._server_round, self._grid.send_and_receive(messages))
        if self._strategy.record.failed:
            raise RuntimeError(str(self._strategy.record.failed[0]))

    def close(self) -> None:
        """End its processes."""
        self._inner.close()


def plain_loop(workload: Workload, *, takes_steps: bool = True) -> Callable[[], None]:
    """Return a function that takes the same local steps with no federation.

    Args:
        workload: What to run.
        takes_steps: False draws each step's batch, as the engine does, and leaves the step itself out.
    """
    experiment = build_run(load_config(workload.config, [*workload.overrides, *CACHES_OFF]))
    client, model = experiment.config.client, experiment.model
    loss_of = model.task.loss
    inner = getattr(model, "federated_model", model)
    for layer in model.modules():
        if isinstance(layer, LinearLoRA):
            layer.forward = partial(PeftLinear.forward, layer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    clients = range(experiment.num_clients)
    total = sum(experiment.num_examples(i) for i in clients)

    def drawn(client_id: int, num_steps: int) -> Iterable[Batch]:
        rng = np.random.default_rng(client_id)
        return local_batches(experiment, client_id, num_steps, rng, server_round=0)

    ready = [itertools.cycle(list(drawn(client_id, 8))) for client_id in clients]

    def one_round() -> None:
        start = [p.detach().clone() for p in trainable]
        mean = [torch.zeros_like(p) for p in start]
        for client_id in clients:
            with torch.no_grad():
                for parameter, value in zip(trainable, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(trainable, lr=client.learning_rate, weight_decay=0.0, fused=True)
            num_steps = client.local_steps
            in_memory = itertools.islice(ready[client_id], num_steps)
            for batch in in_memory if takes_steps else drawn(client_id, num_steps):
                if takes_steps:
                    loss = loss_of(inner, batch)
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
    engines = {
        "engine, caches off": Engine(workload, CACHES_OFF),
        "engine": Engine(workload),
        "engine, 2 workers": Engine(workload, num_workers=2),
    }
    contenders: dict[str, Callable[[], None]] = {"plain loop": plain_loop(workload), **engines}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(-2, workload.num_turns):
        for name, one_round in contenders.items():
            before = clocks()
            one_round()
            if turn >= 0:  # two rounds to warm up
                times[name].append((clocks()[0] - before[0], clocks()[1] - before[1]))
    for each in engines.values():
        each.close()
    return [row_of(workload.name, name, values, times["plain loop"]) for name, values in times.items()]


def clocks() -> tuple[float, float]:
    """Seconds by the clock, and of this process's CPU time."""
    return time.perf_counter(), time.process_time()


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
        "by CPU time": "" if "workers" in name else f"{ratios[1]:.2f}",  # theirs is not this process's
    }


def added_row(workload: Workload, *overrides: str) -> Row:
    """Return what one more client costs beside its local steps: rounds that draw batches and do not step."""
    engine = Engine(workload, (*CACHES_OFF, *overrides))
    experiment = engine.experiment
    inner = getattr(experiment.model, "federated_model", experiment.model)
    inner.train_step = lambda batch, labels=None: 0.5
    ways = {"engine": engine, "plain loop": plain_loop(workload, takes_steps=False)}
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
    gc.freeze()  # as every command does with what it imported (federated.commands.importing)
    rows: list[Row] = []
    for key in chosen:
        rows += measure(WORKLOADS[key])
        print(rows[-4:], flush=True)
    if "tiny-one-step" in chosen:
        one_step = WORKLOADS["tiny-one-step"]
        rows += [added_row(one_step), added_row(one_step, "evaluation.aggregation_error_every=0")]
    print(write_results("limit", "python -m benchmarks.limit", with_earlier("limit", rows)))


if __name__ == "__main__":
    main()

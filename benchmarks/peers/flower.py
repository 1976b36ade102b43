"""Flower's simulation runtime (``flwr[simulation]``, on Ray) with a straightforward PEFT client.

Kind to it: an actor builds the model once and keeps it, the state travels as named arrays of what trains
alone, two actors share the two cores, and nothing is evaluated.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.plain import PlainClassifier, train
from benchmarks.peers.prepared import Prepared, read_prepared
from benchmarks.peers.timing import Timings

FOLDER = "FEDLORA_BENCHMARK_FOLDER"

client_app = ClientApp()


@functools.cache
def _of_this_actor() -> tuple[Prepared, PlainClassifier]:
    torch.set_num_threads(1)
    prepared = read_prepared(Path(os.environ[FOLDER]))
    return prepared, PlainClassifier(prepared)


@client_app.train()
def train_client(message: Message, context: Context) -> Message:
    """Take the global values in, train, send the new ones."""
    prepared, model = _of_this_actor()
    model.put(message.content["arrays"].to_torch_state_dict())
    of_client = prepared.rounds[int(message.content["config"]["server-round"]) - 1]
    client_id = int(context.node_config["partition-id"])
    steps = of_client.get(client_id) or next(iter(of_client.values()))  # Flower draws cohorts of its own
    loss = train(model, prepared, steps)
    content = {"arrays": ArrayRecord(model.get()), "metrics": MetricRecord({"loss": loss, "num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when a round's messages are made and when its replies are averaged."""

    def __init__(self, timings: Timings, fraction: float, num_clients: int) -> None:
        least = max(1, round(fraction * num_clients))
        super().__init__(
            fraction_train=fraction,
            fraction_evaluate=0.0,
            min_train_nodes=least,
            min_available_nodes=num_clients,
        )
        self._timings, self._started = timings, 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg's."""
        self._started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg's."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is None:
            raise RuntimeError("Flower's clients failed: see the log above")
        self._timings.add(self._started, float(metrics["loss"]))
        return arrays, metrics


def flower_simulation(prepared: Prepared) -> Timings:
    """Run all rounds with two actors."""
    os.environ[FOLDER] = str(prepared.folder)
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    num_clients = int(prepared.settings["num_clients"])
    timings, server_app = Timings(), ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = TimedFedAvg(timings, len(prepared.rounds[0]) / num_clients, num_clients)
        strategy.start(
            grid, initial_arrays=ArrayRecord(prepared.start), num_rounds=len(prepared.rounds), timeout=3600
        )

    run_simulation(
        server_app,
        client_app,
        num_supernodes=num_clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}},
    )
    return timings

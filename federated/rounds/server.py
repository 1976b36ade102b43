"""The ServerApp: build the strategy, let Flower run the rounds, write the run folder.

``serve`` is the server's whole part of a run on any engine. The in-process engine calls it with its own grid
(``federated.engines.simulation``); on Flower's engines a ``server_app`` calls it with theirs, after asking
each node which client it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from federated.communication.foreign_text import shown
from federated.communication.ledger import Ledger
from federated.communication.messages import CLIENT_ID, SERVER_ROUND
from federated.communication.metered_grid import enter, wire_sizes
from federated.communication.payload import CONFIG, METRICS
from federated.communication.savings import Bandwidth, communication_summary
from federated.config.seeding import generator
from federated.methods import Limits
from federated.results.callbacks import Display, Followers
from federated.results.round_record import SCORED_BY, RoundRecord, best_value, curve_lines
from federated.results.run_folder import RunFolder, peak_memory_bytes
from federated.results.trackers import check_trackers, tracked
from federated.rounds.batches import accuracy_by_class
from federated.rounds.checkpoint import Part, ServerCheckpoint, save_checkpoint
from federated.rounds.client_ranks import mixed_ranks, rank_of, scaling_at
from federated.rounds.conditions import Conditions, EarlyEnd, conditions_of
from federated.rounds.global_model import (
    bring_base_up_to_date,
    global_metrics,
    load_global_state,
    smallest_form,
)
from federated.rounds.learnable import check_can_learn
from federated.rounds.replies import ShardSizes
from federated.rounds.run import Run
from federated.rounds.saving import model_sizes, parameter_counts, save_adapter, save_clients_rows
from federated.rounds.strategy import LoRAStrategy, Ranks
from models.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Served:
    """A run in progress: what closing a round needs; ``parts`` (by name) go into every commit."""

    run: Run
    strategy: LoRAStrategy
    folder: RunFolder
    ledger: Ledger
    display: Display | None
    conditions: Conditions
    started: float = field(default_factory=time.perf_counter)
    round_started: float = field(default_factory=time.perf_counter)
    lines: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[int, float] | None = None
    parts: dict[str, Part] = field(default_factory=dict)


def serve(
    grid: Grid,
    run: Run,
    clients: Mapping[int, int],
    folder: RunFolder,
    display: Display | None = None,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Run all rounds of a run and write its folder.

    Args:
        grid: Carries the messages.
        run: Model, data and settings.
        clients: Node id of each client id.
        folder: Where results go.
        display: Told what happens.
        ledger: Holds what was sent before; None: nothing was.

    Returns:
        The content of ``summary.json``.
    """
    config, ledger = run.config, Ledger() if ledger is None else ledger
    client_of = {node_id: client_id for client_id, node_id in clients.items()}
    run.reset()
    conditions = conditions_of(run)
    strategy = build_strategy(run, clients, display, conditions)
    served = Served(run, strategy, folder, ledger, display, conditions, parts=conditions.parts())
    if display is not None:
        display.run_started(
            config.federation.rounds,
            headline_metric=run.headline_metric,
            notes=run.reader.notes,
        )
    with contextlib.suppress(EarlyEnd):
        strategy.start(
            conditions.metered(grid, ledger, client_of.__getitem__, strategy.num_values),
            initial_arrays=strategy.packed_state(),
            num_rounds=config.federation.rounds,
            timeout=config.federation.timeout_seconds,
            evaluate_fn=lambda server_round, _: close_round(served, server_round),
        )
    return finish(served)


def build_strategy(
    run: Run,
    clients: Mapping[int, int],
    display: Display | None = None,
    conditions: Conditions | None = None,
) -> LoRAStrategy:
    """Return the strategy of a run, before round 1.

    Args:
        run: Model, data and settings.
        clients: Node id of each client id.
        display: Told when messages go out.
        conditions: That the run is under; None: those of its configuration.
    """
    config, under = run.config, conditions or conditions_of(run)

    def before_broadcast(server_round: int, num_clients: int, phase: str) -> None:
        # clients simulated in this process then find the base as it is sent to them, whatever their order
        bring_base_up_to_date(run, strategy.server_state)
        if display is not None:
            display.round_started(server_round, num_clients, phase)

    def evaluates(server_round: int) -> list[int]:
        is_last = under.reason_to_end(strategy.server_state, server_round) is not None
        return evaluating_clients(run, server_round, is_last=is_last)

    strategy = LoRAStrategy(
        aggregator=run.aggregator,
        server_state=run.initial_server_state,
        clients=clients,
        seed=config.seed,
        cohort_size=config.cohort_size,
        uplink=run.clients.uplink,
        downlink=run.clients.downlink,
        ranks=Ranks(partial(rank_of, run), partial(scaling_at, run)) if mixed_ranks(run) else Ranks(),
        limits=Limits(config.aggregation.max_update_ratio, config.aggregation.max_examples_ratio),
        shard_sizes=ShardSizes(run.num_examples, lambda client_id: len(run.shards[client_id].test)),
        error_every=config.evaluation.aggregation_error_every,
        fault_of=under.faults.of,
        reachable=under.is_reachable,
        evaluates=evaluates,
        on_broadcast=before_broadcast,
    )
    return strategy


def evaluating_clients(run: Run, server_round: int, *, is_last: bool = False) -> list[int]:
    """Return the clients that evaluate after a round: all of them, or a seeded sample of ``max_clients``.

    Args:
        run: The run.
        server_round: The round.
        is_last: Whether the run ends early, after this round.
    """
    settings, rounds = run.config.evaluation, run.config.federation.rounds
    is_last = is_last or server_round == rounds
    due = is_last or (settings.clients_every and server_round % settings.clients_every == 0)
    if not settings.clients or not due:
        return []
    clients = [i for i in range(run.num_clients) if len(run.shards[i].test)]
    if len(clients) <= settings.max_clients:
        return clients
    rng = generator(run.config.seed, "evaluation", server_round)
    return sorted(int(i) for i in rng.choice(clients, size=settings.max_clients, replace=False))


def close_round(served: Served, server_round: int) -> MetricRecord | None:
    """Evaluate the global state where due, and write the round down; round 0 is before training."""
    run, record = served.run, served.strategy.record
    line = round_line(record, served.ledger)
    line |= global_metrics(run, served.strategy.server_state, record)
    line |= served.conditions.end_round(served.strategy.server_state, server_round)
    now = time.perf_counter()
    line["seconds"] = round(now - served.round_started, 3)
    served.round_started = now
    served.lines.append(line)
    served.folder.append_metrics(line)
    served.ledger.write_csv(served.folder.path / "communication.csv")
    strategy = served.strategy
    save_checkpoint(
        served.folder.path / "checkpoint",
        strategy.server_state.state,
        server_round=server_round,
        server=ServerCheckpoint(
            strategy.server_state,
            strategy.versions,
            strategy.current_ranks,
            {name: part.state() for name, part in served.parts.items()},
        ),
        notes=run.notes,
    )
    keep_best(served, line)
    if served.display is not None:
        served.display.round_done(line)
    if served.conditions.reason_to_end(strategy.server_state, server_round) is not None:
        raise EarlyEnd
    return None


def round_line(record: RoundRecord, ledger: Ledger) -> dict[str, Any]:
    """Return a round's line of ``metrics.jsonl`` before the server's evaluation."""
    line: dict[str, Any] = {"server_round": record.server_round, "cohort": record.cohort, **record.metrics}
    line["clients"] = {str(client_id): metrics for client_id, metrics in record.clients.items()}
    line["failed"] = [failure.entry() for failure in record.failed]
    if record.skipped:
        line["skipped"] = True
    for direction in ("uplink", "downlink"):
        total = ledger.total(server_round=record.server_round, direction=direction)
        line[f"{direction}_payload_bytes"] = total.payload_bytes
        line[f"{direction}_wire_bytes"] = total.wire_bytes
    return line


def keep_best(served: Served, line: Mapping[str, Any]) -> None:
    """Keep the weights of a round that is better than all before it, by the server's own evaluation.

    Round 0, before training, counts as it does in the summary.
    """
    run = served.run
    value = line.get(run.headline_metric)
    if not run.config.federation.keep_best or SCORED_BY in line or value is None or math.isnan(value):
        return
    if not run.aggregator.has_global_model or not (served.best is None or value > served.best[1]):
        return
    served.best = (line["server_round"], value)
    save_global(served, "adapter_best", server_round=line["server_round"], metric=value)


def save_global(served: Served, name: str, *, server_round: int, metric: float) -> None:
    """Write the global model's trained part into a folder of the run."""
    run, server_state = served.run, served.strategy.server_state
    load_global_state(run, server_state)
    save_adapter(
        run,
        served.folder.path / name,
        server_round=server_round,
        final=metric,
        products={module: smallest_form(delta) for module, delta in server_state.base_delta.items()},
    )


def finish(served: Served) -> dict[str, Any]:
    """Write what comes at the end: the adapter, ``summary.json`` and, where that can be done, the report."""
    run, folder = served.run, served.folder
    metric = run.headline_metric
    first, last = served.lines[0], served.lines[-1]
    final = last.get(metric, math.nan)  # clients that score themselves may all have failed to
    save_global(served, "adapter", server_round=last["server_round"], metric=final)
    bandwidth = Bandwidth(run.config.communication.uplink_mbps, run.config.communication.downlink_mbps)
    summary = {
        "headline_metric": metric,
        "zero_shot": first[metric],
        "final": final,
        "best": best_value(curve_lines(served.lines), metric, default=final),
        "rounds": last["server_round"],
        "seconds": round(time.perf_counter() - served.started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "caches": list(run.reader.notes),
        "parameters": parameter_counts(run),
        "communication": communication_summary(served.ledger, model_sizes(run), bandwidth),
    }
    summary |= served.conditions.summary(served.strategy.server_state, served.lines)
    if served.best is not None:
        summary["best_round"] = served.best[0]
    if run.config.output.report and run.aggregator.has_global_model and (by_class := accuracy_by_class(run)):
        summary["per_class"] = by_class
    folder.write_summary(summary)
    if run.config.output.report:
        folder.write_report()
    return summary


def server_app(run: Run) -> ServerApp:
    """Return the app of a run's server, for Flower's own engines."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        check_can_learn(run)
        config = run.config
        check_trackers(config.output.trackers)
        timeout, ledger = config.federation.timeout_seconds, Ledger()
        clients = ask_client_ids(grid, run.num_clients, ledger, timeout=timeout)
        name = str(context.run_config.get("run-dir") or "")
        path = Path(name) if name else Path(config.output.root) / f"{config.output.name}-{context.run_id}"
        with (
            contextlib.closing(RunFolder(path, config)) as folder,
            tracked(config.output.trackers, path, config.model_dump(mode="json")) as trackers,
        ):
            save_clients_rows(run, folder.path / "partition.json")
            followers = Followers(None, trackers)
            followers.run_done(serve(grid, run, clients, folder, followers, ledger=ledger))

    return app


def ask_client_ids(grid: Grid, num_clients: int, ledger: Ledger, *, timeout: float) -> dict[int, int]:
    """Ask every node which client it is, so that cohorts are the same on every engine.

    Question and answers are the phase ``setup`` of the ledger.

    Raises:
        UserError: Too few nodes came, or two nodes are the same client.
    """
    deadline = time.monotonic() + timeout
    while len(node_ids := list(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(node_ids)} nodes connected within {timeout:.0f} s for {num_clients} clients: "
                "start one SuperNode a client, or set partition.num_clients"
            )
        time.sleep(1.0)
    question = RecordDict({CONFIG: ConfigRecord({SERVER_ROUND: 0})})
    messages = [
        Message(question, dst_node_id=node_id, message_type=MessageType.QUERY) for node_id in node_ids
    ]
    sizes = wire_sizes(messages)
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    clients = _clients_that_answered(replies)
    client_of = {node_id: client_id for client_id, node_id in clients.items()}
    sent = [(m, size) for m, size in zip(messages, sizes, strict=True) if m.metadata.dst_node_id in client_of]
    sent.sort(key=lambda pair: client_of[pair[0].metadata.dst_node_id])
    enter(ledger, sent, replies, client_of.__getitem__)
    missing = [client_id for client_id in range(num_clients) if client_id not in clients]
    if missing:
        raise UserError(f"no node answered for client {missing[0]}: give one the partition-id {missing[0]}")
    return clients


def _clients_that_answered(replies: Iterable[Message]) -> dict[int, int]:
    """Return the node of each client, from the answers of the nodes.

    Raises:
        UserError: A node failed or gave no client id, or two nodes are the same client.
    """
    clients: dict[int, int] = {}
    for reply in replies:
        node_id = reply.metadata.src_node_id
        if not reply.has_content():
            reason = shown(str(reply.error.reason)) if reply.has_error() else "its reply is empty"
            raise UserError(f"node {node_id} failed at start: {reason}")
        metrics = reply.content.get(METRICS)
        client_id = metrics.get(CLIENT_ID) if isinstance(metrics, MetricRecord) else None
        if not isinstance(client_id, int):
            raise UserError(f"node {node_id} did not say which client it is: install the same fedlora on it")
        if client_id in clients:
            raise UserError(f"two nodes say they are client {client_id}: give each its own partition-id")
        clients[client_id] = node_id
    return clients

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from federated.communication.ledger import Ledger
from federated.communication.savings import Bandwidth, communication_summary
from federated.results.callbacks import Display, Followers
from federated.results.round_record import SCORED_BY, RoundRecord, best_value, curve_lines
from federated.results.run_folder import RunFolder, peak_memory_bytes
from federated.results.trackers import check_trackers, tracked
from federated.rounds.batches import accuracy_by_class
from federated.rounds.checkpoint import Origin
from federated.rounds.client_identities import ask_client_ids
from federated.rounds.client_store import ClientStates
from federated.rounds.conditions import EarlyEnd, conditions_of
from federated.rounds.fingerprints import fingerprints
from federated.rounds.global_model import (
    global_metrics,
)
from federated.rounds.learnable import check_can_learn
from federated.rounds.resumption import Resumption, lost_transfers
from federated.rounds.run import Run
from federated.rounds.run_in_progress import Served, commit, go_on, save_global, write_ledger
from federated.rounds.run_strategy import build_strategy
from federated.rounds.saving import model_sizes, parameter_counts, save_clients_rows
from models.errors import UserError
from models.interrupts import unstoppable

log = logging.getLogger(__name__)


def serve(
    grid: Grid,
    run: Run,
    clients: Mapping[int, int],
    folder: RunFolder,
    *,
    display: Display | None = None,
    ledger: Ledger | None = None,
    states: ClientStates | None = None,
    resumption: Resumption | None = None,
) -> dict[str, Any]:
    """Run all rounds of a run, or those that are left, and write its folder.

    Args:
        grid: Carries the messages.
        run: Model, data and settings.
        clients: Node id of each client id.
        folder: Where results go.
        display: Told what happens.
        ledger: Holds what was sent before; None: nothing was.
        states: Where the engine keeps the clients' states; None: out of reach; no run goes on then.
        resumption: How the run goes on; None: it begins.

    Returns:
        The content of ``summary.json``.
    """
    config = run.config
    client_of = {node_id: client_id for client_id, node_id in clients.items()}
    run.reset()
    conditions = conditions_of(run)
    on_broadcast = None if display is None else display.round_started
    strategy = build_strategy(run, clients, on_broadcast, conditions)
    origin = Origin(config.model_dump(mode="json"), fingerprints(run))
    ledger = Ledger() if ledger is None else ledger
    served = Served(run, strategy, folder, ledger, display, conditions, origin, states)
    if resumption is not None:
        go_on(served, resumption)
    if display is not None:
        display.run_started(
            config.federation.rounds,
            headline_metric=run.headline_metric,
            notes=run.reader.notes,
        )
        if served.lines:
            display.rounds_before(served.lines)
    with contextlib.suppress(EarlyEnd):
        play_rounds(served, grid, client_of.__getitem__)
    return finish(served)


def play_rounds(served: Served, grid: Grid, client_of: Callable[[int], int]) -> None:
    """Let Flower's loop run the rounds that are left.

    Raises:
        EarlyEnd: The run is to end before its last round; the round is closed.
    """
    strategy, federation = served.strategy, served.run.config.federation
    under, done = served.conditions, served.strategy.rounds_before
    if done and under.reason_to_end(strategy.server_state, done) is not None:
        return  # the attempt before had only its results to write
    try:
        strategy.start(
            under.metered(grid, served.ledger, client_of, strategy.num_values),
            initial_arrays=strategy.packed_state(),
            num_rounds=federation.rounds - done,
            timeout=federation.timeout_seconds,
            evaluate_fn=lambda server_round, _: close_round(served, server_round),
        )
    except EarlyEnd:
        raise
    except BaseException:
        with contextlib.suppress(UserError):
            write_ledger(served)  # what was sent in a round that did not end was paid for
        raise


def close_round(served: Served, server_round: int) -> MetricRecord | None:
    """Evaluate the global state where due, and write the round down; round 0 is before training."""
    run, record = served.run, served.strategy.record
    if server_round == 0 and served.lines:
        return None  # closed by an earlier attempt
    line = round_line(record, served.ledger)
    line |= global_metrics(run, served.strategy.server_state, record)
    line |= served.conditions.end_round(served.strategy.server_state, record.server_round)
    now = time.perf_counter()
    line["seconds"] = round(now - served.round_started, 3)
    served.round_started = now
    served.lines.append(line)
    is_best = is_best_so_far(served, line)
    with unstoppable():
        served.folder.append_metrics(line)
        write_ledger(served)
        commit(served)
        if is_best:
            save_global(
                served, "adapter_best", server_round=line["server_round"], metric=line[run.headline_metric]
            )
    if served.display is not None:
        served.display.round_done(line)
    if served.conditions.reason_to_end(served.strategy.server_state, record.server_round) is not None:
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


def is_best_so_far(served: Served, line: Mapping[str, Any]) -> bool:
    """Note a round that is better than all before it, by the server's own evaluation; its weights are kept.

    Round 0, before training, counts as it does in the summary.
    """
    run = served.run
    value = line.get(run.headline_metric)
    if not run.config.federation.keep_best or SCORED_BY in line or value is None or math.isnan(value):
        return False
    if not run.aggregator.has_global_model or not (served.best is None or value > served.best[1]):
        return False
    served.best = (line["server_round"], value)
    return True


def finish(served: Served) -> dict[str, Any]:
    """Write what comes at the end: the adapter, ``summary.json`` and, where that can be done, the report."""
    with unstoppable():
        summary = save_results(served)
    if served.run.config.output.report:
        served.folder.write_report()
    return summary


def save_results(served: Served) -> dict[str, Any]:
    """Write the adapter and ``summary.json``."""
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
    if served.attempt > 1:
        summary |= {"attempts": served.attempt, "lost": lost_transfers(folder.path)}
    if served.origin.forks:
        summary["forks"] = list(served.origin.forks)
    folder.write_summary(summary)
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
            followers.run_done(serve(grid, run, clients, folder, display=followers, ledger=ledger))

    return app

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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from federated.communication.ledger import Ledger
from federated.communication.savings import Bandwidth, communication_summary
from federated.results.callbacks import Display, Followers
from federated.results.round_record import SCORED_BY, RoundRecord, best_value, curve_lines
from federated.results.run_folder import LEDGER_FILE, RunFolder, peak_memory_bytes
from federated.results.trackers import check_trackers, tracked
from federated.rounds.batches import accuracy_by_class
from federated.rounds.checkpoint import (
    Origin,
    Part,
    Progress,
    ServerCheckpoint,
    client_file_name,
    write_commit,
)
from federated.rounds.client_identities import ask_client_ids
from federated.rounds.client_store import ClientStates, ClientStore, Records, records_of, state_from
from federated.rounds.conditions import Conditions, EarlyEnd, conditions_of
from federated.rounds.fingerprints import check_fingerprints, fingerprints
from federated.rounds.global_model import (
    global_metrics,
    load_global_state,
    smallest_form,
)
from federated.rounds.learnable import check_can_learn
from federated.rounds.resumption import HELD_BY_SERVER, Resumption, cut_back, lost_transfers, read_lines
from federated.rounds.run import Run
from federated.rounds.run_strategy import build_strategy
from federated.rounds.saving import model_sizes, parameter_counts, save_adapter, save_clients_rows
from federated.rounds.strategy import LoRAStrategy
from models.errors import UserError
from models.files import errors_named
from models.interrupts import unstoppable

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
    origin: Origin
    store: ClientStore
    states: ClientStates | None = None
    attempt: int = 1
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
    *,
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
        states: Where the engine keeps the clients' states; None: out of reach, so that no run can be resumed.
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
    served = Served(
        run,
        strategy,
        folder,
        Ledger() if ledger is None else ledger,
        display,
        conditions,
        origin=Origin(config.model_dump(mode="json"), fingerprints(run)),
        store=ClientStore(folder.path / "checkpoint"),
        states=states,
        parts=conditions.parts(),
    )
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
    try:
        strategy.start(
            served.conditions.metered(grid, served.ledger, client_of, strategy.num_values),
            initial_arrays=strategy.packed_state(),
            num_rounds=federation.rounds - strategy.rounds_before,
            timeout=federation.timeout_seconds,
            evaluate_fn=lambda server_round, _: close_round(served, server_round),
        )
    except EarlyEnd:
        raise
    except BaseException:
        with contextlib.suppress(UserError):
            write_ledger(served)  # what was sent in a round that did not end was paid for
        raise


def go_on(served: Served, resumption: Resumption) -> None:
    """Put a run back to where it was at a commit, and commit that as the beginning of another attempt.

    Raises:
        UserError: Data or base weights are not what the run was made with.
    """
    strategy, folder, checkpoint = served.strategy, served.folder, resumption.checkpoint
    if served.states is None:
        raise UserError("this engine does not keep the clients' states: the run cannot go on here")
    check_fingerprints(resumption.origin.fingerprints, served.origin.fingerprints, folder.path)
    strategy.server_state = checkpoint.server
    strategy.versions, strategy.current_ranks = dict(checkpoint.versions), dict(checkpoint.ranks)
    strategy.rounds_before = resumption.server_round
    for client_id, records in resumption.states.items():
        own = {key: record for key, record in records.items() if key != HELD_BY_SERVER}
        served.states.context(client_id).state = state_from(own)
    if strategy.held is not None:
        held = {i: records.get(HELD_BY_SERVER, {}) for i, records in resumption.states.items()}
        strategy.held.restore({client_id: state for client_id, state in held.items() if state})
    for name, part in served.parts.items():
        if name in checkpoint.parts:
            part.restore(checkpoint.parts[name])
    served.store, served.attempt = resumption.store, resumption.attempt
    served.origin = replace(served.origin, forks=resumption.origin.forks)
    served.started -= resumption.progress.elapsed_seconds
    served.best = resumption.progress.best
    folder.reopen_files(served.run.config, first_step=resumption.server_round + 1)
    cut_back(folder.path, resumption.progress)
    served.ledger, served.lines = Ledger.continued(folder.path / LEDGER_FILE), read_lines(folder.path)
    commit(served)
    if served.best is not None and served.best[0] == resumption.server_round:
        save_global(served, "adapter_best", server_round=served.best[0], metric=served.best[1])


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


def write_ledger(served: Served) -> None:
    """Bring ``communication.csv`` up to date."""
    path = served.folder.path / LEDGER_FILE
    with errors_named(path):
        served.ledger.write_csv(path)


def commit(served: Served) -> None:
    """Write down everything that crosses to the next round: the one place that names it."""
    strategy, states = served.strategy, served.states
    checkpoint = served.folder.path / "checkpoint"
    if states is not None:
        failed = {failure.client_id for failure in strategy.record.failed}
        name = client_file_name(served.attempt, strategy.server_state.server_round)
        served.store.write(
            name, states.changed_clients() | failed, partial(records_of_client, strategy, states)
        )
    content = ServerCheckpoint(
        server=strategy.server_state,
        versions=strategy.versions,
        ranks=strategy.current_ranks,
        parts={name: part.state() for name, part in served.parts.items()},
        clients=served.store.index,
        progress=Progress(
            attempt=served.attempt,
            elapsed_seconds=round(time.perf_counter() - served.started, 3),
            best=served.best,
            lengths=served.folder.lengths_on_disk(),
        ),
        origin=None if states is None else served.origin,
    )
    write_commit(checkpoint, content, keep=served.run.config.output.keep_checkpoints, notes=served.run.notes)


def records_of_client(strategy: LoRAStrategy, states: ClientStates, client_id: int) -> Records:
    """Return what a client keeps, and what the server follows of it."""
    records = records_of(states.context(client_id).state)
    if strategy.held is not None and (held := strategy.held.kept(client_id)):
        records[HELD_BY_SERVER] = held
    return records


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
            followers.run_done(serve(grid, run, clients, folder, followers, ledger=ledger))

    return app

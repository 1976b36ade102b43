"""The global model of a server's state: put into the process's one model, evaluated, in its smallest form.

At its end, and before messages go out. The adapter alone is not the model where an aggregator merges into the
base, and where a method has no global model its clients speak for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from federated.methods import BaseDelta, ServerState
from federated.methods.lowrank import stack
from federated.results.round_record import CLIENTS, SCORED_BY, RoundRecord
from federated.rounds.batches import evaluate_server
from federated.rounds.local_training import load_into_model
from federated.rounds.run import Run


def global_metrics(run: Run, server_state: ServerState, record: RoundRecord) -> dict[str, Any]:
    """Evaluate the global model where due.

    A method without a global model is scored by its clients, each on its own test rows with its own private
    part, weighted by rows, and the line says so; before training all of them hold the pre-trained model,
    which is evaluated on the server's test rows.
    """
    settings, server_round = run.config.evaluation, record.server_round
    if server_round and not run.aggregator.has_global_model:
        return {SCORED_BY: CLIENTS, **clients_mean(record, run.headline_metric)}
    if server_round % settings.every and server_round != run.config.federation.rounds:
        return {}
    load_global_state(run, server_state)
    return {key: value for key, value in evaluate_server(run).items() if key != "num_examples"}


def clients_mean(record: RoundRecord, metric: str) -> dict[str, float]:
    """Return the mean of the clients' own metric and loss over the rows that they tested on."""
    entries = [entry for entry in record.clients.values() if {metric, "eval_loss"} <= entry.keys()]
    num_rows = sum(entry["eval_examples"] for entry in entries)
    if not num_rows:
        return {}
    names = {metric: metric, "loss": "eval_loss"}
    return {
        name: sum(entry[key] * entry["eval_examples"] for entry in entries) / num_rows
        for name, key in names.items()
    }


def load_global_state(run: Run, server_state: ServerState) -> None:
    """Put the global adapter, head and base into the model."""
    bring_base_up_to_date(run, server_state)
    load_into_model(run, {**run.wire_state(), **server_state.state})


def bring_base_up_to_date(run: Run, server_state: ServerState) -> None:
    """Make the base weights of this process those of the global model."""
    run.base.bring_to(server_state.base_delta, server_state.server_round)


def smallest_form(delta: BaseDelta) -> tuple[Tensor, ...]:
    """Return what was merged into one base weight as (left, right), or (dense,) where that is fewer."""
    num_values = sum(term.num_values for _, term in delta.terms)
    if delta.dense is None and num_values <= delta.total().numel():
        whole = stack([term for _, term in delta.terms])
        return whole.left, whole.right
    return (delta.total(),)

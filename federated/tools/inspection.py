"""What a configuration will train and send, without training: parameter counts and the bytes of every round.

The model is built without weights, so nothing is downloaded. Expected bytes are the codecs' exact formulas,
for one client in round 1 and for all rounds; a run's own figures come from its ledger.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from federated.communication.codec import codec_from_name
from federated.config.schema import ExperimentConfig
from federated.methods import ClientProfile, join_auxiliary
from federated.results.tables import TextTable
from federated.results.wording import format_bytes, format_percent, format_rounds, saving
from federated.rounds.build import build_model, load_run_data
from federated.rounds.compatibility import build_aggregator, check_client_ranks
from federated.rounds.saving import BYTES_PER_FP32
from federated.tools.planned_bytes import Plan, PlannedRound, any_values, evaluating, planned_rounds, zeros
from lora.adapters import scalings, unwrap
from lora.verify import count_parameters
from models.exchange import find_parameters
from models.state import layout_of, num_values


@dataclass(frozen=True)
class RunDescription:
    """What ``fedlora info`` prints.

    Attributes:
        config: The configuration.
        counts: As ``lora.verify.count_parameters`` returns them.
        uplink_values: Numbers in one client's update in round 1.
        downlink_values: Numbers that one client receives in round 1.
        uplink_bytes: Payload of that update, encoded.
        downlink_bytes: Payload of that downlink, encoded.
        full_model_bytes: Payload of the whole model in fp32, one way.
        method: The aggregator with its options, and what is added to it.
        ranks_may_fall: Whether clients may go on with lower ranks, which rounds do not foresee.
        rounds: What each round will send.
    """

    config: ExperimentConfig
    counts: dict[str, Any]
    uplink_values: int
    downlink_values: int
    uplink_bytes: int
    downlink_bytes: int
    full_model_bytes: int
    method: str
    ranks_may_fall: bool
    rounds: tuple[PlannedRound, ...]

    @property
    def total_bytes(self) -> int:
        """Payload of the whole run, both ways."""
        return sum(each.total_bytes for each in self.rounds)

    @property
    def full_run_bytes(self) -> int:
        """Payload of the same run if the whole model travelled in fp32."""
        evaluations = len(evaluating(self.config, self.config.federation.rounds))
        transfers = sum(
            2 * each.clients + (evaluations if each.evaluation_bytes else 0) for each in self.rounds
        )
        return transfers * self.full_model_bytes

    @property
    def record(self) -> dict[str, Any]:
        """The description as one mapping, for JSON."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "config"}
        rounds = [asdict(each) | {"total_bytes": each.total_bytes} for each in self.rounds]
        return own | {
            "config": self.config.model_dump(mode="json"),
            "rounds": rounds,
            "total_bytes": self.total_bytes,
            "full_run_bytes": self.full_run_bytes,
        }


def describe_run(config: ExperimentConfig) -> RunDescription:
    """Build the configuration's model without weights and count.

    Raises:
        UserError: The model's architecture or the data's number of classes cannot be had offline.
    """
    model = build_model(*_without_weights(config), weights=False)
    counts: dict[str, Any] = {**count_parameters(model)}
    exchanged = find_parameters(unwrap(model), model.exchanged_names)
    # B is 0 at the start, unless a run starts from an adapter
    start = any_values if config.model.adapter else zeros
    state = start(exchanged)
    aggregator = build_aggregator(config)
    server = aggregator.init(state, scalings(model))
    check_client_ranks(config, aggregator, server)
    auxiliary = aggregator.auxiliary(server)
    received = join_auxiliary(aggregator.downlink(server, ClientProfile()).state, auxiliary)
    changed = {name: server.state[name] for name in aggregator.uplink(server.state, 1)}
    sent = join_auxiliary(changed, auxiliary)
    down, up = layout_of(received), layout_of(sent)
    return RunDescription(
        config=config,
        counts=counts,
        uplink_values=num_values(up),
        downlink_values=num_values(down),
        uplink_bytes=codec_from_name(config.communication.uplink).num_bytes(up),
        downlink_bytes=codec_from_name(config.communication.downlink).num_bytes(down),
        full_model_bytes=counts["base"] * BYTES_PER_FP32,
        method=_method(config, aggregator.name),
        ranks_may_fall=aggregator.client.changes_ranks,
        rounds=tuple(planned_rounds(Plan(config, aggregator, state, scalings(model)))),
    )


def _method(config: ExperimentConfig, name: str) -> str:
    """Name the aggregator and all that is added to it."""
    client = config.client
    parts = [
        name.replace("+", " + "),
        "SCAFFOLD" if client.scaffold else "",
        f"FedProx mu={client.proximal_mu:g}" if client.proximal_mu else "",
        f"client ranks {', '.join(map(str, client.ranks))}" if client.ranks else "",
    ]
    return " + ".join(part for part in parts if part)


def _without_weights(config: ExperimentConfig) -> tuple[ExperimentConfig, tuple[str, ...] | None]:
    class_names = None if config.model.num_classes else load_run_data(config).class_names
    changes = {
        "pretrained": False,
        "num_classes": config.model.num_classes or len(class_names or ()),
    }
    return config.model_copy(update={"model": config.model.model_copy(update=changes)}), None


def description_tables(description: RunDescription) -> list[tuple[str, TextTable]]:
    """Return titled tables: parameters, and bytes a round."""
    counts, config = description.counts, description.config
    rows = [("total", counts["total"]), ("trainable", counts["trainable"]), ("adapter", counts["adapter"])]
    rows += [(f"adapter, {tower}", number) for tower, number in counts["by_tower"].items() if number]
    rows += [(kind, number) for kind, number in counts["by_kind"].items() if number]
    parameters = tuple(
        (name, f"{number:,}", format_percent(number / counts["total"], 3)) for name, number in rows
    )
    cohort = config.cohort_size
    full = description.full_model_bytes
    transfers = (
        ("uplink", config.communication.uplink, description.uplink_values, description.uplink_bytes),
        ("downlink", config.communication.downlink, description.downlink_values, description.downlink_bytes),
    )
    traffic = tuple(
        (
            direction,
            codec,
            f"{values:,}",
            format_bytes(num_bytes),
            format_bytes(num_bytes * cohort),
            format_percent(1 - num_bytes / full, 2),
        )
        for direction, codec, values, num_bytes in transfers
    )
    full_row = (
        "full model",
        "fp32",
        f"{full // BYTES_PER_FP32:,}",
        format_bytes(full),
        format_bytes(full * cohort),
        "",
    )
    columns = ("direction", "codec", "values", "a client", f"cohort of {cohort}", "saved")
    return [
        ("Parameters", TextTable(("parameters", "number", "of total"), parameters, frozenset({0}))),
        (
            "Expected payload of round 1 (saved: against the full model)",
            TextTable(columns, (*traffic, full_row), frozenset({0, 1})),
        ),
        (f"Expected payload of all rounds: {description.method}", rounds_table(description.rounds)),
    ]


def rounds_table(rounds: Sequence[PlannedRound]) -> TextTable:
    """Return what rounds will send; neighbours that send the same share a row, with the sum so far."""
    rows, so_far = [], 0
    for _, alike in itertools.groupby(rounds, key=lambda each: replace(each, server_round=0)):
        group = list(alike)
        each = group[0]
        so_far += sum(one.total_bytes for one in group)
        rows.append(
            (
                format_rounds(one.server_round for one in group),
                str(each.clients),
                str(each.newcomers),
                format_bytes(each.downlink_bytes),
                format_bytes(each.uplink_bytes),
                format_bytes(each.evaluation_bytes),
                format_bytes(each.total_bytes),
                format_bytes(so_far),
            )
        )
    columns = ("rounds", "clients", "new", "down", "up", "evaluation", "a round", "so far")
    return TextTable(columns, tuple(rows), frozenset({0}))


def closing_note(description: RunDescription) -> str:
    """Say what the whole run will send, and on what terms."""
    total, full = description.total_bytes, description.full_run_bytes
    saved, more = saving(1 - total / full)
    against = f"{saved} {'more than' if more else 'less than'} the full model ({format_bytes(full)})"
    shrinking = " Ranks that fall in training make it less." if description.ranks_may_fall else ""
    return (
        f"{description.method}: {format_bytes(total)} of payload in {len(description.rounds)} rounds, "
        f"{against}. Exact if no client fails and each has rows to evaluate on; messages add about 1 kB "
        f"each, and clients need the base model once.{shrinking}"
    )

"""What a configuration will train and send, without training: parameter counts and expected bytes a round.

The model is built without weights, so nothing is downloaded. Expected bytes are the codecs' exact formulas
for round 1; a run's own figures come from its ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from federated.communication.codec import codec_from_name
from federated.config.schema import ExperimentConfig
from federated.methods import ClientProfile, join_auxiliary
from federated.results.tables import TextTable
from federated.results.wording import format_bytes, format_percent
from federated.rounds.build import build_model, load_run_data
from federated.rounds.compatibility import build_aggregator, check_client_ranks
from federated.rounds.saving import BYTES_PER_FP32
from lora.adapters import scalings, unwrap
from lora.verify import count_parameters
from models.exchange import find_parameters
from models.state import State, layout_of, num_values


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
    """

    config: ExperimentConfig
    counts: dict[str, Any]
    uplink_values: int
    downlink_values: int
    uplink_bytes: int
    downlink_bytes: int
    full_model_bytes: int


def describe_run(config: ExperimentConfig) -> RunDescription:
    """Build the configuration's model without weights and count.

    Raises:
        UserError: The model's architecture or the data's number of classes cannot be had offline.
    """
    model = build_model(*_without_weights(config), weights=False)
    counts: dict[str, Any] = {**count_parameters(model)}
    exchanged = find_parameters(unwrap(model), model.exchanged_names)
    state: State = {name: torch.zeros(parameter.shape) for name, parameter in exchanged.items()}
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
    )


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
    ]

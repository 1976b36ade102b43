"""What a run writes for TensorBoard: scalars in groups, the bytes sent so far, and the run's settings.

A tag's part before the slash is its group: evaluation, validation, training, communication, aggregation,
clients, time. Bytes are megabytes on the wire where the tag does not say payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.summary import hparams

from federated.config.config_files import dotted
from federated.results.round_record import WIRE, wire_bytes
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text

TOTAL = "communication/total_megabytes"
_NAMED = {
    "train_loss": "training/loss",
    "steps": "training/steps",
    "aggregation_error": "aggregation/error",
    "seconds": "time/seconds",
    "skipped": "clients/round_skipped",
}
_BYTES = {
    "uplink_wire_bytes": "communication/uplink_megabytes",
    "downlink_wire_bytes": "communication/downlink_megabytes",
    "uplink_payload_bytes": "communication/uplink_payload_megabytes",
    "downlink_payload_bytes": "communication/downlink_payload_megabytes",
}
_LISTS = {"cohort": "clients/cohort", "failed": "clients/failed"}


def scalars(line: Mapping[str, Any], sent_before: int) -> dict[str, float]:
    """Return tag -> value of a line of ``metrics.jsonl``.

    Args:
        line: The line.
        sent_before: Wire bytes of all rounds before it.
    """
    found = {}
    for key, value in line.items():
        if key in _LISTS and isinstance(value, list):
            found[_LISTS[key]] = float(len(value))
        elif key in _BYTES:
            found[_BYTES[key]] = value / 1e6
        elif key != "server_round" and isinstance(value, int | float):
            found[tag_of(key)] = float(value)
    if WIRE.intersection(line):
        found[TOTAL] = (sent_before + wire_bytes(line)) / 1e6
    return found


def tag_of(key: str) -> str:
    """Return the tag of a metric: ``accuracy`` is ``evaluation/accuracy``."""
    if key in _NAMED:
        return _NAMED[key]
    if key.startswith("validation_"):
        return f"validation/{key.removeprefix('validation_')}"
    return f"evaluation/{key}"


def settings_events(config_file: Path, tags: Iterable[str]) -> tuple[Any, Any, Any]:
    """Return what tells TensorBoard a run's settings: before the first scalar two events, at the end one.

    Args:
        config_file: The run's ``config.yaml``.
        tags: Scalars to show beside the settings.

    Raises:
        UserError: The file cannot be read.
    """
    tree = parse_yaml(read_text(config_file, MOST_YAML_BYTES), config_file)
    settings = {key: _plain(value) for key, value in dotted(tree) if not key.startswith("output.")}
    shown = [tag for tag in tags if tag == TOTAL or tag.startswith("evaluation/")]
    first, second, last = hparams(settings, dict.fromkeys(shown, 0.0))
    return first, second, last


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)

"""What the files of a run folder hold, as far as their readers rely on it; what else stands there is kept.

A run folder may come from another version or another machine: its readers check what they read against these
kinds, so that a file which is damaged is refused with its name and the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from federated.communication.ledger import MAX_ROUND
from models.errors import UserError
from models.untrusted import check, checked_name, parse_json, read_json

MAX_COUNT = 10**15
"""Largest count of bytes, parameters or samples: a petabyte."""

Round = Annotated[int, Field(ge=0, le=MAX_ROUND)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
ClientKey = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
Number = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)] | Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class _Failed(_Part):
    client_id: Count
    reason: str = ""


class _ClientValues(_Part):
    __pydantic_extra__: dict[str, Number | None]
    eval_examples: Count | None = None
    num_examples: Count | None = None


class RoundLine(_Part):
    """A line of ``metrics.jsonl``."""

    server_round: Round
    seconds: Number | None = None
    simulated_seconds: Number | None = None
    simulated_seconds_total: Number | None = None
    cohort: list[Count] | None = None
    clients: dict[ClientKey, _ClientValues] | None = None
    failed: list[_Failed] | None = None
    uplink_wire_bytes: Count | None = None
    downlink_wire_bytes: Count | None = None


class _ComparisonRow(_Part):
    name: str
    payload_bytes_per_client_round: Count
    total_bytes: Count
    total_bytes_with_base: Count
    saving: Number | None
    saving_with_base: Number | None
    measured: bool


class _Link(_Part):
    uplink_seconds: Number
    uplink_mbps: Number
    downlink_seconds: Number
    downlink_mbps: Number


class _Communication(_Part):
    comparison: list[_ComparisonRow] | None = None
    seconds_at_bandwidth: _Link | None = None
    one_off_base_bytes: Count | None = None
    total_wire_bytes: Count | None = None


class _Training(_Part):
    kept_epoch: Round


class _Parameters(_Part):
    total: Count | None = None
    trainable: Count | None = None
    exchanged: Count | None = None


class _ClassResult(_Part):
    name: Annotated[str, AfterValidator(checked_name)]
    num_examples: Count
    accuracy: Annotated[float, Field(ge=0, le=1)]


class Summary(_Part):
    """``summary.json``; a run that did not finish has none."""

    headline_metric: str = "accuracy"
    zero_shot: Number | None = None
    final: Number | None = None
    best: Number | None = None
    rounds: Round | None = None
    seconds: Number | None = None
    simulated_seconds: Number | None = None
    stopped: str | None = None
    peak_memory_bytes: Count | None = None
    parameters: _Parameters | None = None
    communication: _Communication = _Communication()
    training: _Training | None = None
    per_class: list[_ClassResult] = []


class _Shard(_Part):
    client_id: Count
    num_examples: Count
    class_counts: list[Count] = []
    indices: list[Count] = []


class PartitionFile(_Part):
    """``partition.json``, as the report reads it."""

    class_names: list[Annotated[str, AfterValidator(checked_name)]] | None = None
    clients: list[_Shard] | None = None

    @model_validator(mode="after")
    def _same_classes(self) -> PartitionFile:
        if len({len(shard.class_counts) for shard in self.clients or () if shard.class_counts}) > 1:
            raise ValueError("the clients' class_counts have different lengths")
        return self


class _WholeShard(_Shard):
    indices: list[Count]


class WholePartition(_Part):
    """``partition.json``, as it is needed to make the same split again."""

    partitioner: str
    seed: int
    options: dict[str, Any] = {}
    clients: list[_WholeShard]


class _Split(_Part):
    options: dict[str, Any] | None = None


class ConfigFile(_Part):
    """``config.yaml`` of any version, as the report reads it."""

    model: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    partition: _Split | None = None
    aggregation: dict[str, Any] | None = None
    communication: dict[str, Any] | None = None


KINDS: dict[type[_Part], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (RoundLine, Summary, PartitionFile, WholePartition, ConfigFile)
}


def read_run_file(path: Path, kind: type[_Part] | None = None) -> dict[str, Any]:
    """Return an object in JSON as it stands there, if it is of a kind; None for what is not finite.

    Raises:
        UserError: The file cannot be read, is no JSON object, or a field is of another kind.
    """
    return checked(read_json(path), path, kind)


def checked(value: Any, source: object, kind: type[_Part] | None = None) -> dict[str, Any]:
    """Return an object that was read, as ``read_run_file`` does."""
    if not isinstance(value, dict):
        raise UserError(f"{source} holds a {type(value).__name__}, not an object")
    found = _finite(value)
    if kind is not None:
        check(KINDS[kind], found, source)
    return found


def checked_line(text: str, source: str) -> dict[str, Any]:
    """Return a line of ``metrics.jsonl``.

    Raises:
        UserError: It is none.
    """
    return checked(parse_json(text.encode(), source), source, RoundLine)


def check_series(lines: Sequence[Mapping[str, Any]], metric: str, source: Path) -> None:
    """Raise UserError where the headline metric, or what is a number in another line, is none."""
    numeric = {metric, "loss", "train_loss"}
    numeric |= {key for line in lines for key, value in line.items() if _is_number(value)}
    for line in lines:
        for key in sorted(numeric & line.keys()):
            value = line[key]
            if not (value is None or isinstance(value, bool) or _is_number(value)):
                raise UserError(f"{source}, round {line['server_round']}: {key} is no number")
            if isinstance(value, int) and abs(value) > MAX_COUNT:
                raise UserError(f"{source}, round {line['server_round']}: {key} is too large")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

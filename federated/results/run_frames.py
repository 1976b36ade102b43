"""Many run folders as one pandas frame: a row a run, or a row for each of its rounds."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from federated.config.config_files import dotted
from federated.results.records import RunRecord, read_run
from models.errors import UserError

_PLACE = ("output.", "engine.threads", "engine.workers")


def load_runs(runs: str | Path | Sequence[str | Path], *, by_round: bool = False) -> pd.DataFrame:
    """Return runs side by side, with the settings in which they differ.

    Args:
        runs: A pattern such as ``"runs/*"``, whose matches that are no run folders are left out; or folders.
        by_round: A row for each round of each run, with its metrics and the wire bytes sent until its end.

    Returns:
        Indexed by ``run``, the folder's path: whether it finished, the headline metric before, at the end and
        at its best, bytes and seconds; or, by round, indexed by ``run`` and ``server_round``. The settings
        that are not the same in all runs stand in front, by dotted key; a list is a tuple there.

    Raises:
        UserError: There is no run folder, or a file of one cannot be read.
    """
    records = [read_run(folder) for folder in _folders(runs)]
    if not records:
        raise UserError(f"no run folder is called {runs}: give a pattern such as 'runs/*'")
    settings = _differing([_settings(record) for record in records])
    rows = []
    for record, own in zip(records, settings, strict=True):
        first = {"run": str(record.directory), **own}
        if by_round:
            rows += [first | line for line in _round_rows(record)]
        else:
            rows.append(first | _run_row(record))
    return pd.DataFrame(rows).set_index(["run", "server_round"] if by_round else "run")


def _folders(runs: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(runs, str | Path):
        return [Path(run) for run in runs]
    return [
        Path(match)
        for match in sorted(glob.glob(str(runs)))
        if os.path.isfile(os.path.join(match, "metrics.jsonl"))
    ]


def _settings(record: RunRecord) -> dict[str, Any]:
    """Return dotted key -> value of what may set runs apart; lists as tuples, which frames can group by."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in dotted(record.config)
        if not key.startswith(_PLACE)
    }


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each run's settings those that are not the same in all runs."""
    keys = dict.fromkeys(key for own in settings for key in own)
    kept = [key for key in keys if len({repr(own.get(key)) for own in settings}) > 1]
    return [{key: own.get(key) for key in kept} for own in settings]


def _run_row(record: RunRecord) -> dict[str, Any]:
    headline = record.headline
    return {
        "finished": record.finished,
        "metric": record.metric,
        **{key: headline[key] for key in ("zero_shot", "final", "best", "rounds")},
        "uplink_wire_bytes": record.ledger.total(direction="uplink").wire_bytes,
        "downlink_wire_bytes": record.ledger.total(direction="downlink").wire_bytes,
        "seconds": headline["seconds"],
    }


def _round_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    sent = record.ledger.cumulative_wire_bytes()
    for line in record.metrics:
        values = {key: value for key, value in line.items() if not isinstance(value, list | dict)}
        server_round = line["server_round"]
        yield {
            **values,
            "cohort_size": len(line.get("cohort") or ()),
            "num_failed": len(line.get("failed") or ()),
            "sent_wire_bytes": sent[min(server_round, max(sent))],
        }

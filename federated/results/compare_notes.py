"""What a reader of a comparison must know: in what else the runs differ, and what MB stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from federated.config.config_files import dotted
from federated.results.records import RunRecord
from federated.results.run_kind import CENTRAL, PERSONAL

SETTINGS = (
    "seed",
    "task",
    "data",
    "partition",
    "model.model_name",
    "model.pretrained",
    "evaluation.max_samples",
)
"""Keys and sections that runs should share if what sets them apart is to be the method."""
_OF_THE_METHOD = frozenset({"data.cache_bytes", "task.train_head"})
MOST = 2  # runs of one value that are named; more of them are "the other runs"


def comparison_notes(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Return the sentences below a comparison.

    Args:
        runs: the runs.
        names: what the table calls them.
    """
    named = list(zip(names, runs, strict=True))
    notes = list(differences(named))
    if unknown := [name for name, run in named if not run.config]:
        notes.append(f"No config.yaml, so that data, split, model and seed are unknown: {_list(unknown)}.")
    if central := [name for name, run in named if run.kind is CENTRAL]:
        notes.append(f"Central training, one model on all the data, epochs for rounds: {_list(central)}.")
    if personal := [name for name, run in named if run.kind is PERSONAL]:
        notes.append(
            "Personal models, each scored on its own client's rows (before training: the pre-trained model "
            f"on the server's rows): {_list(personal)}."
        )
    return notes


def differences(named: Sequence[tuple[str, RunRecord]]) -> Iterator[str]:
    """Yield a sentence for each setting that is not the same in all runs, with its values.

    A central run has no clients to split the data over, so that its partition is left out.
    """
    settings = [(name, run.kind, dict(_settings(run.config))) for name, run in named if run.config]
    for key in dict.fromkeys(key for _, _, values in settings for key in values):
        holders: dict[str, list[str]] = {}
        for name, kind, values in settings:
            if not (kind is CENTRAL and key.startswith("partition.")):
                holders.setdefault(str(values.get(key, "not set")), []).append(name)
        if len(holders) > 1:
            yield f"{key} differs: {_by_value(holders)}."


def _by_value(holders: Mapping[str, list[str]]) -> str:
    *few, (most_common, most) = sorted(holders.items(), key=lambda item: len(item[1]))
    parts = [f"{value} in {_list(names)}" for value, names in few]
    return "; ".join([*parts, f"{most_common} in {_list(most) if len(most) <= MOST else 'the other runs'}"])


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what ``SETTINGS`` names."""
    for key, value in dotted(config):
        if value != {} and key not in _OF_THE_METHOD and any(f"{key}.".startswith(f"{n}.") for n in SETTINGS):
            yield key, value


def bytes_note(target: str | None) -> str:
    """Return what MB stand for.

    Args:
        target: the value of "MB to reach", as written in the table; None where no run reached one.
    """
    note = "MB are wire bytes without the base model. MB sent: the whole run, client evaluation included."
    if target is None:
        return note
    return (
        f"{note} MB to reach {target}: until the first round whose model has it, without that round's client "
        "evaluation, which comes after."
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)

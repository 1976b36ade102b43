"""What a run was set to, as a comparison names it: its method, its alpha, and what sets runs apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from federated.config.config_files import dotted
from federated.config.schema import ADAPTED
from federated.results.records import RunRecord
from federated.results.run_kind import CENTRAL

ALPHA = "partition.options.alpha"
_WITHOUT_CLIENTS = ("partition.", "federation.", "aggregation.", "communication.")
"""Sections that say nothing of a central run."""
_NOT_SETTINGS = ("output.",)
"""Sections that differ between any two runs."""
_IN_COLUMNS = frozenset({"seed", ALPHA, "aggregation.name"})
"""Keys that a comparison has a column for, whether runs differ in them or not."""


def settings_of(run: RunRecord) -> dict[str, Any]:
    """Return dotted key -> value of all that a run was set to; nothing without ``config.yaml``."""
    return {
        key: value
        for key, value in dotted(run.config)
        if not key.startswith(_NOT_SETTINGS)
        and not (run.kind is CENTRAL and key.startswith(_WITHOUT_CLIENTS))
    }


def method_of(run: RunRecord) -> str | None:
    """Name how a run learns: ``fedavg``, ``flora + fedadam``, ``fedavg, full``; None if that is not known."""
    settings = settings_of(run)
    if not settings:
        return None
    name = "central" if run.kind is CENTRAL else settings.get("aggregation.name")
    if name is None:
        return None
    parts = [str(name)]
    if optimizer := settings.get("aggregation.server_optimizer.name"):
        parts.append(str(optimizer))
    if settings.get("client.scaffold") and run.kind is not CENTRAL:
        parts.append("scaffold")
    if settings.get("client.proximal_mu") and run.kind is not CENTRAL:
        parts.append("fedprox")
    adapters = str(settings.get("model.type")).endswith(ADAPTED) and settings.get("lora.enabled", True)
    trained = "" if adapters else f", {settings.get('model.fine_tuning') or 'full'}"
    return " + ".join(parts) + trained


def differing_settings(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return, for each run, every key in which the runs differ with its value there.

    A run that does not have a key has None. Keys with a column of their own are left out.
    """
    settings = [settings_of(run) for run in runs]
    known = [values for values in settings if values]
    keys = dict.fromkeys(key for values in known for key in values if key not in _IN_COLUMNS)
    differing = [key for key in keys if len({repr(values.get(key)) for values in known}) > 1]
    return [{key: values.get(key) for key in differing} for values in settings]

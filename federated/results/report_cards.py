"""The words and headline figures at the top of a run's report.

Each figure carries what it needs to be read rightly: an accuracy its zero-shot value, a saving its
denominator and the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from federated.communication.savings import FULL_MODEL, THIS_RUN
from federated.config.schema import ADAPTED, MODEL_FAMILIES, ModelSection
from federated.results.records import RunRecord
from federated.results.run_kind import PERSONAL, count_steps
from federated.results.wording import (
    format_bytes,
    format_count,
    format_metric,
    format_percent,
    format_saving,
    format_seconds,
    is_share,
    metric_label,
    saving,
)


@dataclass(frozen=True)
class Card:
    """A headline figure: what it is, its value, and what it needs to be read rightly."""

    label: str
    value: str
    notes: tuple[str, ...]


def subtitle(run: RunRecord) -> str:
    """Say in a line what was run, as far as the configuration does."""
    config = run.config

    def of(section: str, key: str, form: str = "{}") -> str:
        value = (config.get(section) or {}).get(key)
        return form.format(value) if value is not None else ""

    adapters = (config.get("lora") or {}).get("enabled", True) and of("model", "type").endswith("_lora")
    alpha = ((config.get("partition") or {}).get("options") or {}).get("alpha")
    split = of("partition", "name") + (f" α={alpha}" if alpha is not None else "")
    federation = [
        of("partition", "num_clients", "{} clients"),
        split,
        of("aggregation", "name"),
        of("communication", "uplink", "uplink {}"),
    ]
    parts = (
        _model_words(config.get("model") or {}),
        of("lora", "r", "LoRA r={}") if adapters else of("model", "fine_tuning"),
        of("task", "name").replace("_", " "),
        of("data", "source"),
        *(federation if run.kind.has_clients else ["central training"]),
        f"seed {config['seed']}" if "seed" in config else "",
    )
    return " · ".join(part for part in parts if part)


def _model_words(section: Mapping[str, Any]) -> str:
    """Name the base model; of another family than CLIP the family, and its weights where they were chosen."""
    name, family = str(section.get("model_name") or ""), str(section.get("type", "")).removesuffix(ADAPTED)
    if family in ("", *MODEL_FAMILIES):
        return name
    return family if name == ModelSection.model_fields["model_name"].default else f"{family} {name}"


PROVENANCE = ("started", "command")
VERSIONS = ("fedlora", "python", "torch", "transformers", "peft", "flwr", "numpy")


def provenance(run: RunRecord) -> dict[str, list[str]]:
    """Return when the run was started, by what command, and with which versions; what is known of it."""
    recorded = {key: value for key, value in run.environment.items() if value is not None}
    versions = ", ".join(f"{key} {recorded[key]}" for key in VERSIONS if key in recorded)
    found = {key: [str(recorded[key])] for key in PROVENANCE if key in recorded}
    return found | ({"versions": [versions]} if versions else {})


def notices(run: RunRecord) -> list[str]:
    """Say what a reader must know before trusting the page."""
    found = []
    if not run.finished:
        found.append(
            "This run has no summary.json: it did not finish, or is still running. "
            "Figures are as far as it went."
        )
    if stopped := run.summary.get("stopped"):
        found.append(f"{stopped[0].upper()}{stopped[1:]}.")
    recorded = run.summary.get("communication", {}).get("total_wire_bytes")
    counted = run.ledger.total().wire_bytes
    if len(run.ledger) and recorded is not None and recorded != counted:
        found.append(
            f"summary.json says {format_count(recorded)} bytes on the wire, communication.csv adds up to "
            f"{format_count(counted)}: this page shows communication.csv."
        )
    if not len(run.ledger) and run.kind.has_clients:
        found.append("No transfers were recorded (communication.csv).")
    return found


def cards(run: RunRecord) -> list[Card]:
    """Return the headline figures; one whose numbers the run did not record is left out."""
    found = (_metric_card(run), _bytes_card(run), _saving_card(run), _time_card(run), _parameter_card(run))
    return [card for card in found if card is not None]


def _metric_card(run: RunRecord) -> Card:
    metric, headline = run.metric, run.headline
    final, zero_shot, best = headline["final"], headline["zero_shot"], headline["best"]
    notes = ["mean of personal models, each on its own client's rows"] if run.kind is PERSONAL else []
    if zero_shot is not None and run.kind is PERSONAL:
        notes.append(f"pre-trained model, on the server's rows: {format_metric(metric, zero_shot)}")
    elif zero_shot is not None:
        notes.append(
            f"zero-shot, before training: {format_metric(metric, zero_shot)}{_gain(metric, zero_shot, final)}"
        )
    if best is not None and best != final:
        at = [line["server_round"] for line in run.metrics if line.get(metric) == best]
        notes.append(
            f"best: {format_metric(metric, best)}" + (f" after {run.kind.step} {at[0]}" if at else "")
        )
    if "training" in run.summary:
        notes.append(f"weights of epoch {run.summary['training']['kept_epoch']}")
    return Card(f"Final {metric_label(metric)}", format_metric(metric, final), tuple(notes))


def _gain(metric: str, before: float, after: float | None) -> str:
    if after is None:
        return ""
    change = f"{100 * (after - before):+.1f} points" if is_share(metric) else f"{after - before:+.4g}"
    return f" ({change.replace('-', '−')})"


def _bytes_card(run: RunRecord) -> Card | None:
    if not len(run.ledger):
        return None
    total, uplink, downlink = (
        run.ledger.total(**d) for d in ({}, {"direction": "uplink"}, {"direction": "downlink"})
    )
    return Card(
        "Sent over the wire",
        format_bytes(total.wire_bytes),
        (
            f"up {format_bytes(uplink.wire_bytes)}, down {format_bytes(downlink.wire_bytes)}, "
            f"{format_count(total.transfers)} transfers",
            f"payload alone: {format_bytes(total.payload_bytes)}",
        ),
    )


def _saving_card(run: RunRecord) -> Card | None:
    rows = {row["name"]: row for row in run.summary.get("communication", {}).get("comparison") or []}
    if THIS_RUN not in rows or FULL_MODEL not in rows:
        return None
    ours, full = rows[THIS_RUN], rows[FULL_MODEL]
    source = (
        "measured in a run of its own" if full["measured"] else "computed for the same clients and rounds"
    )
    # a run of the full model itself sends what was computed, and its messages' overhead
    percent, sent_more = saving(ours["saving"])
    return Card(
        f"{'Sent more than' if sent_more else 'Saved against'} {FULL_MODEL}",
        percent,
        (
            f"with the base model counted: {format_saving(ours['saving_with_base'])}",
            f"{FULL_MODEL} would send {format_bytes(full['total_bytes'])} ({source})",
        ),
    )


def _time_card(run: RunRecord) -> Card:
    notes = [f"{count_steps(run.kind, run.headline['rounds'])} on this machine"]
    simulated = run.metrics[-1].get("simulated_seconds_total") if run.metrics else None
    link = run.summary.get("communication", {}).get("seconds_at_bandwidth")
    if simulated is not None:
        notes.append(f"simulated, on the clients' own links and devices: {format_seconds(simulated)}")
    elif link:
        notes.append(
            f"sending alone, clients in parallel: {format_seconds(link['uplink_seconds'])} up at "
            f"{link['uplink_mbps']:g} Mbit/s, {format_seconds(link['downlink_seconds'])} down at "
            f"{link['downlink_mbps']:g} Mbit/s"
        )
    if run.summary.get("peak_memory_bytes"):
        notes.append(f"peak memory {format_bytes(run.summary['peak_memory_bytes'])}")
    return Card("Time", format_seconds(run.headline["seconds"]), tuple(notes))


def _parameter_card(run: RunRecord) -> Card | None:
    parameters = run.summary.get("parameters") or {}
    trained, total = parameters.get("trainable"), parameters.get("total")
    travel = run.kind.has_clients
    shown = parameters.get("exchanged") if travel else trained
    if shown is None:
        return None
    notes = [f"{format_percent(shown / total, 2)} of the model's {format_count(total)}"] if total else []
    notes += [f"trained on a client: {format_count(trained)}"] if travel else []
    return Card(f"Parameters that {'travel' if travel else 'train'}", format_count(shown), tuple(notes))


def base_note(run: RunRecord) -> str:
    """Say what "with base" adds, or why it adds nothing."""
    if (run.config.get("communication") or {}).get("base_preinstalled"):
        return "The configuration declares that clients hold the base model already: it is not counted."
    communication = run.summary.get("communication", {})
    rows = communication.get("comparison") or []
    base = max((row["total_bytes_with_base"] - row["total_bytes"] for row in rows), default=0)
    if not base:
        return "Clients need no base model before round 1."
    ours = "" if communication.get("one_off_base_bytes") else " This run sends every weight and needs none."
    return (
        f"“With base” adds the frozen base model, once for each client that took part: {format_bytes(base)} "
        f"in all. {FULL_MODEL[0].upper()}{FULL_MODEL[1:]} ships it in its normal downlink.{ours}"
    )

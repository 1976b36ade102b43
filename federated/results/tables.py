"""The rounds and the comparison as tables of text, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from federated.communication.ledger import Ledger, Totals
from federated.results.run_kind import kind_of
from federated.results.wording import (
    MISSING,
    format_bytes,
    format_count,
    format_megabytes,
    format_metric,
    format_rounds,
    format_saving,
    is_share,
    metric_label,
)

MAX_EXTRA_METRICS = 6
ERROR = "aggregation_error"
_OF_CLIENTS = ("clients", "failed", "up MB", "down MB", "total MB")
SIMULATED = "simulated seconds"
_NOT_METRICS = frozenset({"server_round", "seconds", "loss", "train_loss"})


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        columns: their headings.
        rows: a cell a column.
        words: columns that hold words (left) rather than numbers (right).
        optional: headings of columns that a narrow terminal leaves out, the first one first.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()
    optional: tuple[str, ...] = ()

    def without(self, *left_out: str) -> TextTable:
        """Return the table without some columns."""
        kept = [place for place, head in enumerate(self.columns) if head not in left_out]
        return TextTable(
            tuple(self.columns[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            frozenset(new for new, place in enumerate(kept) if place in self.words),
            tuple(head for head in self.optional if head not in left_out),
        )


def to_markdown(table: TextTable) -> str:
    """Return a table in Markdown; columns of numbers are set right."""
    marks = ["---" if number in table.words else "---:" for number in range(len(table.columns))]
    lines: list[Sequence[str]] = [table.columns, marks, *table.rows]
    return "".join(f"| {' | '.join(map(escaped, cells))} |\n" for cells in lines)


def escaped(text: str) -> str:
    """Return a text as one line of Markdown, in a table or out of one."""
    return " ".join(text.splitlines()).replace("\\", "\\\\").replace("|", "\\|")


def round_table(metrics: Sequence[Mapping[str, Any]], metric: str, ledger: Ledger | None = None) -> TextTable:
    """Return one row a round (or epoch): metrics, losses, clients, MB up and down, seconds.

    Bytes are wire bytes, from the ledger when it is given and from the lines of ``metrics`` otherwise.
    """
    extra = _extra_metrics(metrics, metric)
    shown = [metric, *extra, *(key for key in ("loss", "train_loss") if key != metric)]
    shown += [ERROR] if any(line.get(ERROR) is not None for line in metrics) else []
    kind = kind_of(metrics)
    columns = (kind.step, *map(metric_label, shown), *_OF_CLIENTS, "seconds", SIMULATED)
    sent = _bytes_by_round(metrics, ledger)
    so_far, rows = 0, []
    for line in metrics:
        uplink, downlink = sent.get(line["server_round"], (None, None))
        so_far += (uplink or 0) + (downlink or 0)
        rows.append(
            (
                str(line["server_round"]),
                *(format_metric(key, line.get(key)) for key in shown),
                str(len(line["cohort"])) if line.get("cohort") else MISSING,
                str(len(line.get("failed") or [])),
                format_megabytes(uplink),
                format_megabytes(downlink),
                format_megabytes(so_far),
                _one_decimal(line.get("seconds")),
                _one_decimal(line.get("simulated_seconds")),
            )
        )
    table = TextTable(columns, tuple(rows), optional=tuple(map(metric_label, (ERROR, *reversed(extra)))))
    if not any("simulated_seconds" in line for line in metrics):
        table = table.without(SIMULATED)
    return table if kind.has_clients else table.without(*_OF_CLIENTS)


def _one_decimal(seconds: float | None) -> str:
    return MISSING if seconds is None else f"{seconds:.1f}"


def _extra_metrics(metrics: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Return the other metrics that are shares, such as further recalls, at most ``MAX_EXTRA_METRICS``."""
    found: dict[str, None] = {}
    for line in metrics:
        for key, value in line.items():
            if key != metric and key not in _NOT_METRICS and is_share(key) and isinstance(value, int | float):
                found[key] = None
    return list(found)[:MAX_EXTRA_METRICS]


def _bytes_by_round(
    metrics: Sequence[Mapping[str, Any]], ledger: Ledger | None
) -> dict[int, tuple[int | None, int | None]]:
    """Return the wire bytes (uplink, downlink) of each round."""
    if ledger is None or not len(ledger):
        return {
            line["server_round"]: (line.get("uplink_wire_bytes"), line.get("downlink_wire_bytes"))
            for line in metrics
        }
    totals = ledger.totals_by("server_round", "direction")
    return {
        line["server_round"]: (
            totals.get((line["server_round"], "uplink"), Totals()).wire_bytes,
            totals.get((line["server_round"], "downlink"), Totals()).wire_bytes,
        )
        for line in metrics
    }


def saving_table(comparison: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the rows of ``summary.json``'s comparison, savings being against full-model FedAvg."""
    rows = tuple(
        (
            row["name"],
            format_bytes(row["payload_bytes_per_client_round"]),
            format_bytes(row["total_bytes"]),
            format_saving(row["saving"]),
            format_bytes(row["total_bytes_with_base"]),
            format_saving(row["saving_with_base"]),
            "measured" if row["measured"] else "computed",
        )
        for row in comparison
    )
    columns = (
        "what travels",
        "client-round",
        "total",
        "saved",
        "total with base",
        "saved with base",
        "",
    )
    return TextTable(columns, rows, words=frozenset({0, 6}), optional=("client-round",))


def class_table(per_class: Sequence[Mapping[str, Any]]) -> TextTable:
    """Return the accuracy of each class of the final evaluation, as ``summary.json`` has it."""
    rows = tuple(
        (row["name"], format_count(row["num_examples"]), format_metric("accuracy", row["accuracy"]))
        for row in per_class
    )
    return TextTable(("class", "test rows", "accuracy"), rows, words=frozenset({0}))


def failure_table(metrics: Sequence[Mapping[str, Any]], ledger: Ledger | None = None) -> TextTable:
    """Return the clients that failed, with the reason and the rounds; those of the ledger included."""
    reasons: dict[tuple[int, str], list[int]] = {}
    explained = set()
    for line in metrics:
        for failure in line.get("failed") or []:
            client_id, server_round = int(failure["client_id"]), line["server_round"]
            explained.add((server_round, client_id))
            reasons.setdefault((client_id, str(failure.get("reason", "no reason given"))), []).append(
                server_round
            )
    for transfer in ledger.select(status="failed") if ledger is not None else ():
        if (transfer.server_round, transfer.client_id) not in explained:
            key = (transfer.client_id, f"no result in the phase {transfer.phase}; no reason recorded")
            reasons.setdefault(key, []).append(transfer.server_round)
    rows = tuple(
        (str(client_id), format_rounds(rounds), reason)
        for (client_id, reason), rounds in sorted(reasons.items())
    )
    return TextTable(("client", "rounds", "reason"), rows, words=frozenset({1, 2}))

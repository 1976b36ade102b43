"""The pictures of a run: metric, bytes, classes, each a function to a ``Figure``.

A function whose data the run did not record raises ``MissingData`` with the reason, which the report prints
in the picture's place.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from federated.communication.ledger import Ledger, Totals
from federated.results import plot_style as style
from federated.results.round_record import curve_lines
from federated.results.run_kind import kind_of
from federated.results.wording import format_bytes, format_metric, metric_label

MAX_BARS = 40  # clients or rounds that are drawn one by one
MAX_CLASS_LABELS = 24
MAX_LABEL = 18  # characters of a class name on an axis
MAX_LEGEND = 36  # characters of a run's name on a line of the legend
LEAST_ERROR = 1e-4  # below it an aggregation error is rounding
LOG_FACTOR = 20  # between two runs' bytes, from which on their axis is logarithmic
_STACK = (
    ("training, downlink", style.SKY, "", "train", "downlink"),
    ("training, uplink", style.BLUE, "", "train", "uplink"),
    ("evaluation, downlink", style.AMBER, "///", "evaluate", "downlink"),
    ("evaluation, uplink", style.ORANGE, "///", "evaluate", "uplink"),
    ("setup, downlink", style.GREY, "...", "setup", "downlink"),
    ("setup, uplink", style.GREEN, "...", "setup", "uplink"),
)

Metrics = Sequence[Mapping[str, Any]]
"""The lines of ``metrics.jsonl``."""


class MissingData(LookupError):  # noqa: N818 - it is an answer, not a fault
    """The run did not record what a plot needs; the message says what."""


@dataclass(frozen=True)
class Curve:
    """A run's headline metric, all on the same rows, against the wire bytes it had sent by then.

    Attributes:
        name: what a legend calls it.
        wire_bytes: sent when each value's model existed.
        values: the metric.
        total_wire_bytes: sent in all, what came after the last model included.
    """

    name: str
    wire_bytes: Sequence[int]
    values: Sequence[float]
    total_wire_bytes: int


def series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Return the rounds that recorded ``key``, and its values there.

    Raises:
        MissingData: no round has it.
    """
    points = [(line["server_round"], float(line[key])) for line in metrics if line.get(key) is not None]
    if not points:
        raise MissingData(f"no round recorded {metric_label(key)}")
    return [server_round for server_round, _ in points], [value for _, value in points]


def curve_of(name: str, metrics: Metrics, metric: str, ledger: Ledger) -> Curve:
    """Return a run's metric against the wire bytes sent, both ways, when each round's model existed.

    Client evaluation comes after the model that it measures: its traffic counts from the next round on.

    Raises:
        MissingData: there are no transfers, or the metric was never recorded.
    """
    if not len(ledger):
        raise MissingData("no transfers were recorded")
    rounds, values = series(curve_lines(metrics), metric)
    sent = ledger.cumulative_wire_bytes()
    evaluation = ledger.totals_by("server_round", "phase")
    wire_bytes = []
    for server_round in rounds:
        after_the_model = evaluation.get((server_round, "evaluate"), Totals()).wire_bytes
        wire_bytes.append(sent[min(server_round, max(sent))] - after_the_model)
    return Curve(name, wire_bytes, values, ledger.total().wire_bytes)


def metric_by_round(metrics: Metrics, metric: str, zero_shot: float | None = None) -> Figure:
    """Draw the headline metric by round and, below it, the losses that were recorded.

    A line joins only what was scored on the same rows; the value before training has a line of its own.
    """
    kind, lines = kind_of(metrics), curve_lines(metrics)
    rounds, values = series(lines, metric)
    losses = {}
    for key, label in (("loss", kind.model_loss), ("train_loss", kind.train_loss)):
        if key != metric and any(line.get(key) is not None for line in lines):
            losses[label] = series(lines, key)
    figure, axes = style.new_figure(rows=2 if losses else 1, ratios=(3, 2) if losses else None)
    style.draw_line(axes[0], rounds, values, 0, label=kind.model)
    if zero_shot is not None:
        label = f"{kind.before}: {format_metric(metric, zero_shot)}"
        axes[0].axhline(zero_shot, color=style.INK, linestyle=style.DASHED, linewidth=1, label=label)
        style.draw_legend(axes[0])
    style.name_metric_axis(axes[0], metric)
    for number, (label, (loss_rounds, loss_values)) in enumerate(losses.items(), start=1):
        style.draw_line(axes[1], loss_rounds, loss_values, number, label=label)
        axes[1].set_ylabel("loss")
        style.draw_legend(axes[1])
    style.name_round_axis(axes[-1], kind.step)
    return figure


def metric_by_bytes(metrics: Metrics, metric: str, ledger: Ledger) -> Figure:
    """Draw the headline metric against the wire bytes sent so far, both directions together."""
    curve = curve_of("", metrics, metric, ledger)
    figure, (axis,) = style.new_figure()
    total = f"from the last model to the end of the run: {format_bytes(curve.total_wire_bytes)} in all"
    _draw_curve(axis, curve, 0, from_bytes=0, total_label=total)
    axis.set_xlabel("sent so far, up and down (MB on the wire)")
    axis.set_xlim(left=0)
    style.draw_legend(axis, above=True)
    style.name_metric_axis(axis, metric)
    return figure


def metric_by_bytes_of_runs(curves: Sequence[Curve], metric: str) -> Figure:
    """Draw several runs' metric against the wire bytes they had sent, in one picture, up to their totals.

    The byte axis is logarithmic when the runs' totals differ by more than ``LOG_FACTOR``; what was measured
    at 0 bytes, before training, then has no place on it and is left out.
    """
    if not curves:
        raise MissingData("no run recorded both its metric and its transfers")
    names = [textwrap.fill(curve.name, MAX_LEGEND) for curve in curves]
    lines = sum(name.count("\n") + 1 for name in names)
    figure, (axis,) = style.new_figure(
        width=1.25 * style.WIDTH_INCHES + min(2.6, 0.5 + 0.07 * max(map(len, "\n".join(names).split("\n")))),
        height=max(1.2 * style.HEIGHT_INCHES, 0.3 + 0.175 * lines),
    )
    totals = [curve.total_wire_bytes for curve in curves]
    logarithmic = max(totals) > LOG_FACTOR * max(1, min(totals))
    for number, (curve, name) in enumerate(zip(curves, names, strict=True)):
        _draw_curve(axis, curve, number, from_bytes=1 if logarithmic else 0, label=name)
    if logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_xlim(left=0)
    axis.set_xlabel(f"sent so far, up and down (MB on the wire{', logarithmic' if logarithmic else ''})")
    style.name_metric_axis(axis, metric)
    style.draw_legend_beside(figure)
    return figure


def _draw_curve(
    axis: Axes,
    curve: Curve,
    number: int,
    *,
    from_bytes: int,
    label: str | None = None,
    total_label: str | None = None,
) -> None:
    """Draw a run's curve and, where it sent more after its last model, a faint line on to its total."""
    points = zip(curve.wire_bytes, curve.values, strict=True)
    shown = [(sent / 1e6, value) for sent, value in points if sent >= from_bytes]
    line = style.draw_line(axis, [x for x, _ in shown], [y for _, y in shown], number, label=label)
    if curve.total_wire_bytes > curve.wire_bytes[-1]:
        ends = [curve.wire_bytes[-1] / 1e6, curve.total_wire_bytes / 1e6]
        look: dict[str, Any] = {"linestyle": style.DOTTED, "linewidth": 1.2, "marker": "|", "markevery": [1]}
        axis.plot(ends, [curve.values[-1]] * 2, color=line.get_color(), label=total_label, **look)


def aggregation_error(metrics: Metrics) -> Figure:
    """Draw how far each round's global model is from the average of what its clients trained."""
    rounds, values = series(metrics, "aggregation_error")
    figure, (axis,) = style.new_figure()
    style.draw_line(axis, rounds, values, 0)
    axis.set_ylabel("aggregation error")
    axis.set_ylim(0, max(1.05 * max(values), LEAST_ERROR))
    style.percent_ticks(axis.yaxis)
    style.name_round_axis(axis)
    return figure


def bytes_by_round(ledger: Ledger) -> Figure:
    """Draw each round's wire bytes, stacked by phase and direction."""
    if not len(ledger):
        raise MissingData("no transfers were recorded")
    per_part = ledger.totals_by("server_round", "phase", "direction")
    numbers = [row.server_round for row in ledger.rows]
    rounds = np.array(sorted({1, *numbers}))
    figure, (axis,) = style.new_figure()
    below, dense = np.zeros(len(rounds)), len(rounds) > MAX_BARS
    for label, color, hatch, phase, direction in _STACK:
        parts = [per_part.get((int(t), phase, direction), Totals()).wire_bytes for t in rounds]
        heights = np.array(parts) / 1e6
        if heights.any():
            look = {"width": 1.0} if dense else {"hatch": hatch, "edgecolor": style.PAPER, "linewidth": 0.6}
            axis.bar(rounds, heights, bottom=below, label=label, color=color, **look)
            below = below + heights
    axis.set_ylabel("sent (MB on the wire)")
    axis.set_xlim(rounds[0] - 0.75, rounds[-1] + 0.75)
    axis.set_ylim(0, max(1.05 * float(below.max()), 1e-9))
    axis.grid(visible=False, axis="x")
    style.name_round_axis(axis)
    style.draw_legend(axis, above=True, columns=2)
    return figure


def bytes_by_method(comparison: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what each row of ``summary.json``'s comparison sends in all, and the one-off base model."""
    if not comparison:
        raise MissingData("summary.json has no comparison")
    names = [row["name"] if row["measured"] else f"{row['name']}\n(computed)" for row in comparison]
    totals = np.array([row["total_bytes"] for row in comparison]) / 1e6
    bases = np.array([row["total_bytes_with_base"] for row in comparison]) / 1e6 - totals
    places = np.arange(len(names))[::-1]
    figure, (axis,) = style.new_figure(height=max(2.4, 0.55 * len(names) + 1.1))
    axis.barh(places, totals, color=style.BLUE, label="sent in the rounds")
    if bases.any():
        look: dict[str, Any] = {
            "color": style.SKY,
            "hatch": "///",
            "edgecolor": style.PAPER,
            "linewidth": 0.6,
        }
        axis.barh(places, bases, left=totals, label="base model, once a client", **look)
        style.draw_legend(axis, above=True, columns=2)
    for place, total, base in zip(places, totals, bases, strict=True):
        text = format_bytes(1e6 * total) + (f" + {format_bytes(1e6 * base)}" if base else "")
        axis.annotate(
            text,
            (total + base, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=9,
            color=style.INK,
        )
    axis.set_yticks(places, names, parse_math=False)
    axis.set_xlim(0, 1.22 * max(float((totals + bases).max()), 1e-9))
    axis.set_xlabel("sent in all, up and down (MB)")
    axis.grid(visible=False, axis="y")
    return figure


def class_accuracy(per_class: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of each class, the weakest at the bottom; of many the weakest and the strongest."""
    if not per_class:
        raise MissingData("summary.json has no accuracy of each class")
    ordered = sorted(per_class, key=lambda row: row["accuracy"])
    cut = len(ordered) > MAX_CLASS_LABELS
    if cut:
        half = MAX_CLASS_LABELS // 2
        ordered = ordered[:half] + ordered[-half:]
    figure, (axis,) = style.new_figure(height=max(2.2, 0.9 + 0.22 * len(ordered)))
    places = np.arange(len(ordered))
    axis.barh(places, [row["accuracy"] for row in ordered], color=style.SKY, height=0.7)
    labels = [f"{shortened_label(row['name'])} ({row['num_examples']})" for row in ordered]
    axis.set_yticks(places, labels, parse_math=False, size=8)
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.set_xlim(0, 1.02)
    style.percent_ticks(axis.xaxis)
    ends = f", the {half} weakest and the {half} strongest of {len(per_class)} classes" if cut else ""
    axis.set_xlabel(f"accuracy{ends}")
    axis.grid(visible=False, axis="y")
    return figure


def shortened_label(name: str) -> str:
    """Return a class name that fits an axis."""
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"

"""The pictures of a run: metric, bytes, client split and client metrics, each a function to a ``Figure``.

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
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from federated.communication.ledger import Ledger, Totals
from federated.results import plot_style as style
from federated.results.round_record import curve_lines
from federated.results.run_kind import kind_of
from federated.results.wording import format_bytes, format_metric, is_share, metric_label

MAX_BARS = 40  # clients that are drawn one by one
MAX_NUMBERED = 12  # clients and classes up to which a cell of the split carries its count
MAX_CLASS_LABELS = 24
MAX_LABEL = 18  # characters of a class name on an axis
MAX_LEGEND = 36  # characters of a run's name on a line of the legend
LEAST_ERROR = 1e-4  # below it an aggregation error is rounding
LOG_FACTOR = 20  # between two runs' bytes, from which on their axis is logarithmic
ON_BLUE = "#fdfdfd"  # not the theme's paper: the cell stays blue on a dark page too
# Transparent to blue: the page's own background shows through an empty cell, light or dark.
_CELLS = LinearSegmentedColormap.from_list("cells", [(0.0, 0.447, 0.698, 0.0), (0.0, 0.447, 0.698, 1.0)])
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


def client_split(partition: Mapping[str, Any]) -> Figure:
    """Draw how the training data is split: examples per client, and each client's share of every class.

    Up to ``MAX_BARS`` clients stand in the order of their number; more are sorted by their largest class, so
    that the structure of the split shows.
    """
    clients = partition.get("clients") or []
    if not clients:
        raise MissingData("the partition was not recorded")
    sizes = np.array([client["num_examples"] for client in clients])
    names = [client["client_id"] for client in clients]
    if not all(client.get("class_counts") for client in clients):
        figure, (axis,) = style.new_figure()
        _size_bars(axis, sizes)
        _name_client_axis(axis, names, "")
        return figure
    counts = np.array([client["class_counts"] for client in clients]).T  # (classes, clients)
    by_class = len(clients) > MAX_BARS
    order = np.lexsort((-counts.max(0), counts.argmax(0))) if by_class else np.arange(len(clients))
    height = float(np.clip(1.6 + 0.21 * min(len(counts), MAX_CLASS_LABELS), 2.8, 6.0))
    figure, axes = style.new_figure(rows=2, height=height, ratios=(1, max(2.0, height - 1.4)))
    _size_bars(axes[0], sizes[order])
    image = _class_cells(axes[1], counts[:, order], partition.get("class_names") or [])
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.01)
    bar.set_label("share of the client's examples", color=style.INK, size=9)
    bar.ax.tick_params(colors=style.INK, labelsize=8)
    bar.outline.set_edgecolor(style.GRID)
    style.percent_ticks(bar.ax.yaxis)
    _name_client_axis(axes[1], [names[i] for i in order], "sorted by largest class" if by_class else "")
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
    labels = [f"{_shorten(row['name'])} ({row['num_examples']})" for row in ordered]
    axis.set_yticks(places, labels, parse_math=False, size=8)
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.set_xlim(0, 1.02)
    style.percent_ticks(axis.xaxis)
    ends = f", the {half} weakest and the {half} strongest of {len(per_class)} classes" if cut else ""
    axis.set_xlabel(f"accuracy{ends}")
    axis.grid(visible=False, axis="y")
    return figure


def client_metric(metrics: Metrics, metric: str) -> Figure:
    """Draw each client's own metric where it was last recorded: bars, or a histogram of many clients."""
    server_round, clients = last_client_values(metrics, metric)
    values = np.array([value for _, value, _ in clients])
    mean = float(np.average(values, weights=[num_examples for _, _, num_examples in clients]))
    mean_label = f"mean, weighted by examples: {format_metric(metric, mean)}"
    figure, (axis,) = style.new_figure()
    if len(clients) <= MAX_BARS:
        axis.bar(range(len(clients)), values, color=style.SKY)
        axis.axhline(mean, color=style.INK, linestyle=style.DASHED, linewidth=1, label=mean_label)
        style.name_metric_axis(axis, metric)
        axis.grid(visible=False, axis="x")
        _name_client_axis(axis, [name for name, _, _ in clients], f"after round {server_round}")
    else:
        tenth = float(np.quantile(values, 0.1))
        tenth_label = f"one client in ten is below {format_metric(metric, tenth)}"
        axis.hist(values, bins=20, color=style.SKY, edgecolor=style.PAPER, linewidth=0.6)
        axis.axvline(mean, color=style.INK, linestyle=style.DASHED, linewidth=1.4, label=mean_label)
        axis.axvline(tenth, color=style.INK, linestyle=style.DOTTED, linewidth=1.4, label=tenth_label)
        if is_share(metric):
            style.percent_ticks(axis.xaxis)
        axis.set_xlabel(f"{metric_label(metric)} on the client's own data, after round {server_round}")
        axis.set_ylabel(f"clients (of {len(clients)})")
    style.draw_legend(axis, above=True)
    return figure


def last_client_values(metrics: Metrics, metric: str) -> tuple[int, list[tuple[int, float, int]]]:
    """Return the last round with client evaluation and its (client, value, examples), sorted by client.

    Raises:
        MissingData: clients were never evaluated.
    """
    for line in reversed(metrics):
        found = [
            (int(name), float(values[metric]), int(values.get("eval_examples") or 1))
            for name, values in (line.get("clients") or {}).items()
            if values.get(metric) is not None
        ]
        if found:
            return line["server_round"], sorted(found)
    raise MissingData(f"no client reported {metric_label(metric)} on its own data")


def _size_bars(axis: Axes, sizes: np.ndarray) -> None:
    if len(sizes) <= MAX_BARS:
        axis.bar(range(len(sizes)), sizes, color=style.SKY)
    else:
        axis.fill_between(range(len(sizes)), sizes, step="mid", color=style.SKY, linewidth=0)
    axis.set_ylabel("examples")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.grid(visible=False, axis="x")


def _class_cells(axis: Axes, counts: np.ndarray, class_names: Sequence[str]) -> Any:
    """Draw the (classes, clients) counts as each client's shares, with numbers where they fit."""
    shares = counts / np.maximum(counts.sum(0, keepdims=True), 1)
    image = axis.imshow(shares, aspect="auto", cmap=_CELLS, vmin=0, interpolation="nearest")
    axis.grid(visible=False)
    num_classes, num_clients = counts.shape
    step = -(-num_classes // MAX_CLASS_LABELS)
    shown = range(0, num_classes, step)
    labels = [_shorten(class_names[i]) if i < len(class_names) else str(i) for i in shown]
    axis.set_yticks(shown, labels, parse_math=False, size=8)
    if num_clients <= MAX_NUMBERED and num_classes <= MAX_NUMBERED:
        bright = 0.65 * shares.max()
        for row, column in np.argwhere(counts > 0):
            color = ON_BLUE if shares[row, column] > bright else style.INK
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, size=7)
    return image


def _name_client_axis(axis: Axes, names: Sequence[int], remark: str) -> None:
    """Label an axis of clients at 0, 1, ...: each one's number where there is room."""
    parts = ["client" if len(names) <= MAX_BARS else f"{len(names)} clients", remark]
    axis.set_xlabel(", ".join(part for part in parts if part))
    axis.set_xlim(-0.5, len(names) - 0.5)
    if len(names) > MAX_BARS:
        axis.set_xticks([])
        return
    step = -(-len(names) // 20)
    axis.set_xticks(range(0, len(names), step), [str(name) for name in names[::step]])


def _shorten(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"

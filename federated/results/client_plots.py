"""Pictures of the clients: what each has of the data, and how well each is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from federated.results import plot_style as style
from federated.results.plots import MAX_BARS, MAX_CLASS_LABELS, Metrics, MissingData, shortened_label
from federated.results.wording import format_metric, is_share, metric_label

MAX_NUMBERED = 12  # clients and classes up to which a cell of the split carries its count
ON_BLUE = "#fdfdfd"  # not the theme's paper: the cell stays blue on a dark page too
# Transparent to blue: the page's own background shows through an empty cell, light or dark.
_CELLS = LinearSegmentedColormap.from_list("cells", [(0.0, 0.447, 0.698, 0.0), (0.0, 0.447, 0.698, 1.0)])


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
    labels = [shortened_label(class_names[i]) if i < len(class_names) else str(i) for i in shown]
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

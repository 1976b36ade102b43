"""The pictures of a detailed evaluation: what is taken for what, each class's figures, recall by k."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from federated.results import plot_style as style
from models.vqa_metrics import Language, normalised

CHANCE = "guessing"
MAX_NUMBERED = 20  # classes up to which a cell carries its count
MAX_NAMED = 40  # classes up to which every class is named
MAX_BARS = 30  # classes up to which every class has its bar; beyond, the weakest and the strongest have
MAX_LETTERS = 20  # of a class name on an axis
NUM_PICTURES = 12  # that are shown with their question

_CELLS = LinearSegmentedColormap.from_list("cells", [style.PAPER, style.BLUE])


@dataclass(frozen=True)
class ClassFigures:
    """How well one class is told from the others.

    Attributes:
        name: The class.
        precision: Share of the images predicted as this class that are.
        recall: Share of the class's images that are predicted as it.
        f1: Harmonic mean of both.
        support: Images of the class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def confusion_matrix(counts: npt.NDArray[np.int64], class_names: Sequence[str]) -> Figure:
    """Draw which class is taken for which.

    Args:
        counts: Images by true class (rows) and predicted class (columns), (C, C).
        class_names: C names.
    """
    num_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    edge = float(np.clip(0.42 * num_classes, 3.6, 8.5))
    figure, (axis,) = style.new_figure(width=edge + 2.2, height=edge + 1.2)
    image = axis.imshow(shares, cmap=_CELLS, vmin=0, vmax=1, interpolation="nearest")
    axis.grid(visible=False)
    step = -(-num_classes // MAX_NAMED)
    shown = range(0, num_classes, step)
    labels = [_shortened(class_names[number]) for number in shown]
    axis.set_xticks(shown, labels, rotation=45, ha="right", rotation_mode="anchor", **_name_style())
    axis.set_yticks(shown, labels, **_name_style())
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if num_classes <= MAX_NUMBERED:
        _number_cells(axis, counts, shares)
    bar = figure.colorbar(image, ax=axis, shrink=0.7, pad=0.02)
    bar.set_label("share of the true class", color=style.INK, size=9)
    bar.ax.tick_params(colors=style.INK, labelsize=8)
    bar.outline.set_edgecolor(style.GRID)
    style.percent_ticks(bar.ax.yaxis)
    return figure


def answered_pictures(
    images: Sequence[Image.Image],
    questions: Sequence[str],
    right: Sequence[str],
    said: Sequence[str],
    language: Language = "en",
) -> Figure:
    """Draw pictures, each with a question, the answer given and, where it is another, the right one."""
    columns = 4
    figure = Figure(
        figsize=(10, 2.6 * -(-len(images) // columns)), layout="constrained", facecolor=style.PAPER
    )
    axes = figure.subplots(-(-len(images) // columns), columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, question, expected, answer in zip(axes, images, questions, right, said, strict=False):
        is_right = normalised(answer, language) == normalised(expected, language)
        axis.imshow(image.convert("RGB"))
        given = answer or "nothing"
        lines = [*textwrap.wrap(question, 34)[:2], given if is_right else f"{given} (right: {expected})"]
        axis.set_title("\n".join(lines), size=8, color=style.BLUE if is_right else style.ORANGE)
    return figure


def class_performance(rows: Sequence[ClassFigures]) -> Figure:
    """Draw F1 of each class as a bar, with precision and recall as marks, the weakest class at the bottom."""
    ordered = sorted(rows, key=lambda row: row.f1)
    is_cut = len(ordered) > MAX_BARS
    if is_cut:
        ordered = ordered[: MAX_BARS // 2] + ordered[-MAX_BARS // 2 :]
    figure, (axis,) = style.new_figure(height=max(2.6, 1.3 + 0.26 * len(ordered)))
    places = np.arange(len(ordered))
    axis.barh(places, [row.f1 for row in ordered], color=style.SKY, height=0.7, label="F1")
    for label, color, marker, values in (
        ("precision", style.ORANGE, "o", [row.precision for row in ordered]),
        ("recall", style.INK, "D", [row.recall for row in ordered]),
    ):
        axis.plot(values, places, linestyle="", marker=marker, markersize=4.5, color=color, label=label)
    labels = [f"{_shortened(row.name)} ({row.support})" for row in ordered]
    axis.set_yticks(places, labels, **_name_style())
    axis.set_ylim(-0.6, len(ordered) - 0.4)
    axis.set_xlim(0, 1.02)
    style.percent_ticks(axis.xaxis)
    axis.set_ylabel("class (images)")
    if is_cut:
        half = MAX_BARS // 2
        axis.set_xlabel(f"the {half} weakest and the {half} strongest of {len(rows)} classes")
    axis.grid(visible=False, axis="y")
    style.draw_legend(axis, above=True, columns=3)
    return figure


def recall_by_k(
    by_direction: Mapping[str, Mapping[int, float]], chance: Mapping[str, Mapping[int, float]]
) -> Figure:
    """Draw recall against the number of answers looked at, in each direction, beside guessing.

    Args:
        by_direction: "image_to_text" and the like -> k -> recall.
        chance: likewise for a gallery in random order.
    """
    figure, (axis,) = style.new_figure()
    for number, (direction, curve) in enumerate(by_direction.items()):
        label = direction.replace("_to_", " → ")
        style.draw_line(axis, list(curve), list(curve.values()), number, label=label)
    alike = len({tuple(curve.items()) for curve in chance.values()}) == 1
    for direction, curve in list(chance.items())[: 1 if alike else None]:
        axis.plot(
            list(curve),
            list(curve.values()),
            color=style.GREY,
            linestyle=style.DASHED if direction == next(iter(chance)) else ":",
            linewidth=1.2,
            label=CHANCE if alike else f"{CHANCE}, {direction.replace('_to_', ' → ')}",
        )
    axis.set_xscale("log")
    cutoffs = list(next(iter(by_direction.values())))
    axis.set_xticks(cutoffs, [str(k) for k in cutoffs])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("k, answers looked at")
    axis.set_ylabel("recall at k")
    axis.set_ylim(bottom=0)
    style.percent_ticks(axis.yaxis)
    style.draw_legend(axis)
    return figure


def _number_cells(axis: Axes, counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
    for row, column in np.argwhere(counts > 0):
        color = style.PAPER if shares[row, column] > 0.5 else style.INK
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, size=7)


def _name_style() -> dict[str, Any]:
    return {"parse_math": False, "size": 8}


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else name[: MAX_LETTERS - 1] + "…"

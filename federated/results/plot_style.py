"""How every picture looks and is saved: palette, axes, legends, PNG for a README, SVG for a page.

Figures are made without pyplot, so nothing global changes. The colours are Okabe and Ito's, which
colour-blind readers can tell apart; lines differ in marker too, bars in hatching.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, MaxNLocator

from federated.results.wording import is_share, metric_label

INK, GRID, PAPER = "#24292f", "#d8dee4", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
AMBER, GREY = "#e69f00", "#7f7f7f"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY)
MARKERS = "osD^vPX"
DASHED, DOTTED = (0, (4, 3)), (0, (1, 2))
WIDTH_INCHES, HEIGHT_INCHES = 5.6, 3.3
PNG_DPI = 200
MAX_MARKED = 30  # points up to which a line shows each of them
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Droid Sans Fallback")
_THEMED = {INK: "currentColor", GRID: f"var(--line, {GRID})", PAPER: f"var(--paper, {PAPER})"}


def new_figure(
    *,
    rows: int = 1,
    width: float = WIDTH_INCHES,
    height: float | None = None,
    ratios: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``rows`` axes above one another that share their x axis.

    Args:
        rows: number of axes.
        width: inches.
        height: inches; by default enough for the rows.
        ratios: the rows' relative heights.
    """
    height = height or HEIGHT_INCHES * (1 if rows == 1 else 1.35)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set(color=INK, linewidth=0.8)
        axis.tick_params(colors=INK, width=0.8, labelsize=9)
        axis.grid(visible=True, color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(color=INK, size=10)
    return figure, axes


def draw_line(axis: Axes, x: Any, y: Any, number: int, label: str | None = None) -> None:
    """Draw the ``number``-th line of a picture in its own colour and marker."""
    axis.plot(
        x,
        y,
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[number % len(MARKERS)] if len(x) <= MAX_MARKED else None,
        markersize=4.5,
        linewidth=1.8,
        label=label,
    )


def percent_ticks(axis: Any) -> None:
    """Print the ticks of one x or y axis as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %"))


def name_metric_axis(axis: Axes, metric: str) -> None:
    """Label the y axis with the metric, in percent where it is a share."""
    axis.set_ylabel(metric_label(metric))
    if is_share(metric):
        percent_ticks(axis.yaxis)


def name_round_axis(axis: Axes, step: str = "round") -> None:
    """Label the x axis as rounds (or epochs), with whole numbers; one alone is enough."""
    axis.set_xlabel(step)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))


def draw_legend(axis: Axes, *, above: bool = False, columns: int = 1) -> None:
    """Add a legend: where it hides least, or above the axes; nothing when no line has a label."""
    if not axis.get_legend_handles_labels()[0]:
        return
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)} if above else {"loc": "best"}
    legend = axis.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=columns, **place)
    for text in legend.get_texts():
        text.set(parse_math=False, family=font_families())


@cache
def font_families() -> list[str]:
    """Return the installed fonts that names in any script are set in, most preferred first."""
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def save_png(figure: Figure, path: Path) -> None:
    """Write a picture for a README: 200 dots an inch on white, the same bytes for the same figure."""
    _lay_out(figure)
    figure.savefig(path, format="png", dpi=PNG_DPI, facecolor=PAPER, metadata={"Software": None})


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an ``<svg>`` element that takes its colours and font from the page around it.

    Args:
        figure: the picture.
        name: a word that makes the element's ids unique in the page.
        title: what a screen reader says.
    """
    _lay_out(figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _without_glyph_warnings():
        figure.savefig(buffer, format="svg", transparent=True, dpi=PNG_DPI, metadata={"Date": None})
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    if view_box is None:
        raise ValueError(f"matplotlib wrote an SVG without a viewBox for {name}")
    body = svg[svg.index(">", view_box.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL).replace(
        "xlink:href=", "href="
    )
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    for color, themed in _THEMED.items():
        body = body.replace(color, themed)
    return f'<svg viewBox="{view_box.group(1)}" role="img" aria-label="{escape(title)}">{body}'


def _lay_out(figure: Figure) -> None:
    """Place everything once; matplotlib would do it again, and draw twice, for each file that is saved."""
    if figure.get_layout_engine() is not None:
        with _without_glyph_warnings():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Silence missing letters: a page's font has them, and a PNG warns when it is written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield

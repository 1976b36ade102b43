"""How every picture looks and is saved: palette, axes, legends, files, SVG for a page.

Figures are made without pyplot, so nothing global changes. The colours are Okabe and Ito's, which
colour-blind readers can tell apart; lines differ in marker and dashes too, bars in hatching. Words that the
usual font lacks letters for are set in fonts of the machine that have them.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from federated.results.wording import is_share, metric_label

INK, GRID, PAPER = "#24292f", "#d8dee4", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
AMBER, GREY = "#e69f00", "#7f7f7f"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY)
MARKERS = "osD^vPX"
DASHED, DOTTED = (0, (4, 3)), (0, (1, 2))
LINE_STYLES = ("-", DASHED, DOTTED, (0, (8, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
WIDTH_INCHES, HEIGHT_INCHES = 5.6, 3.3
PNG_DPI = 200
MAX_MARKED = 30  # points up to which a line shows each of them
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "png": {"metadata": {"Software": None}},
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
}
"""Endings of the files that a picture is saved as, and what keeps them the same for the same figure."""
FONT = "DejaVu Sans"  # matplotlib brings it
_FAVOURITES = ("Noto Sans", "WenQuanYi", "Droid Sans Fallback")  # asked first for letters that FONT lacks
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


def draw_line(axis: Axes, x: Any, y: Any, number: int, label: str | None = None) -> Any:
    """Draw the ``number``-th line of a picture and return it; up to 35 lines, no two look the same."""
    colour = number % len(SERIES)
    again = number // len(SERIES)
    (line,) = axis.plot(
        x,
        y,
        color=SERIES[colour],
        marker=MARKERS[(colour + again) % len(MARKERS)] if len(x) <= MAX_MARKED else None,
        linestyle=LINE_STYLES[again % len(LINE_STYLES)],
        markersize=4.5,
        linewidth=1.8,
        label=label,
    )
    return line


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
    _as_it_stands(axis.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=columns, **place))


def draw_legend_beside(figure: Figure) -> None:
    """Add a legend of all lines to the right of the axes, which become narrower."""
    _as_it_stands(figure.legend(loc="outside right upper", frameon=False, fontsize=8, labelcolor=INK))


def _as_it_stands(legend: Any) -> None:
    """Read no formulas into the words of a legend."""
    for text in legend.get_texts():
        text.set(parse_math=False)


def _set_in_fonts_that_have_its_letters(figure: Figure) -> bool:
    """Add fonts that have its letters to each word that ``FONT`` lacks some of; say whether there was one."""
    found = False
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        missing = frozenset(map(ord, text.get_text())) - _letters(FONT) - {ord("\n")}
        if missing and (families := _fonts_with(missing)):
            text.set_fontfamily([FONT, *families])
            found = True
    return found


@cache
def _fonts_with(missing: frozenset[int]) -> tuple[str, ...]:
    """Return as few of the machine's fonts as have the most of some letters."""
    names = sorted({font.name for font in fontManager.ttflist} - {FONT})
    names.sort(key=lambda name: min((i for i, f in enumerate(_FAVOURITES) if name.startswith(f)), default=9))
    chosen: list[str] = []
    while missing and names:
        best = max(names, key=lambda name: len(missing & _letters(name)))
        if not missing & _letters(best):
            break
        chosen.append(best)
        missing -= _letters(best)
    return tuple(chosen)


@cache
def _letters(family: str) -> frozenset[int]:
    """Return the code points that a font of the machine has; none where it cannot be read."""
    paths = [font.fname for font in fontManager.ttflist if font.name == family]
    try:
        return frozenset(FT2Font(paths[0]).get_charmap()) if paths else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write a picture as PNG (200 dots an inch, on white), SVG and PDF, each the same for the same figure."""
    _lay_out(figure)
    with mpl.rc_context({"svg.hashsalt": name}), _without_glyph_warnings():
        for ending, options in FORMATS.items():
            figure.savefig(
                folder / f"{name}.{ending}", format=ending, dpi=PNG_DPI, facecolor=PAPER, **options
            )


def save_svg(figure: Figure, name: str) -> bytes:
    """Return a picture as an SVG file on white, its letters drawn as shapes."""
    buffer = io.BytesIO()
    _lay_out(figure)
    with mpl.rc_context({"svg.hashsalt": name}), _without_glyph_warnings():
        figure.savefig(buffer, format="svg", facecolor=PAPER, **FORMATS["svg"])
    return buffer.getvalue()


def remove_figure(folder: Path, name: str) -> None:
    """Remove the files that ``save_figure`` wrote."""
    for ending in FORMATS:
        (folder / f"{name}.{ending}").unlink(missing_ok=True)


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
            if _set_in_fonts_that_have_its_letters(figure):
                figure.draw_without_rendering()
        figure.set_layout_engine("none")


@contextlib.contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Silence letters that no font of the machine has: a page is shown with the reader's fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield

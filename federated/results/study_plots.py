"""The pictures of a study: curves with bands over seeds, bars with intervals, and the Pareto front of bytes.

A band, or a bar's whisker, is the 95 % confidence interval of the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from federated.results import plot_style as style
from federated.results.plots import LOG_FACTOR
from federated.results.run_outcome import Outcome, Point
from federated.results.seed_statistics import Spread, spread
from federated.results.study_results import StudyResults, VariantRuns
from federated.results.wording import metric_label

_BAND = 0.16
"""Opacity of a band."""
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (4, 1.5, 1, 1.5)))
_WIDE = 1.25


def study_pictures(results: StudyResults) -> dict[str, tuple[str, str, Figure]]:
    """Return name -> (title, caption, picture) of those that the finished runs give something for."""
    label = metric_label(results.metric)
    drawn = [variant for variant in results.variants if len(variant.finals)]
    with_points = [variant for variant in drawn if any(run.points for run in variant.runs.values())]
    found: dict[str, tuple[str, str, Figure]] = {}
    band = "Bands are 95 % intervals of the mean over seeds."
    if with_points:
        found["metric_by_round"] = (f"{label} by round", band, _curves(results, with_points, by_bytes=False))
    if any(run.wire_bytes for variant in with_points for run in variant.runs.values()):
        found["metric_by_mb"] = (
            f"{label} against MB sent",
            f"Wire bytes, both ways, without the base model. {band}",
            _curves(results, with_points, by_bytes=True),
        )
    if drawn:
        found["final_bars"] = (
            f"{label} at the end",
            "Whiskers are 95 % intervals of the mean over seeds, dots are seeds.",
            _bars(results, drawn),
        )
    if any(run.wire_bytes for variant in drawn for run in variant.runs.values()):
        found["pareto"] = (
            f"{label} for the bytes sent",
            "The line joins the variants that no other beats in both. Whiskers are 95 % intervals.",
            _pareto(results, drawn),
        )
    return found


def save_picture(figure: Figure, stem: Path) -> None:
    """Write a picture as PNG, SVG and PDF; the same figure gives the same bytes."""
    style.save_png(figure, stem.with_suffix(".png"))
    with mpl.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none", "pdf.fonttype": 42}):
        figure.savefig(stem.with_suffix(".svg"), format="svg", metadata={"Date": None})
        figure.savefig(stem.with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None})


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other beats: by sending less for as much, or reaching more.

    Args:
        points: (bytes, metric).
    """
    kept: list[int] = []
    best = -np.inf
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1])):
        if points[place][1] > best:
            kept.append(place)
            best = points[place][1]
    return kept


def _curves(results: StudyResults, variants: Sequence[VariantRuns], *, by_bytes: bool) -> Figure:
    figure, (axis,) = style.new_figure(width=_WIDE * style.WIDTH_INCHES, height=1.2 * style.HEIGHT_INCHES)
    totals = [max(run.wire_bytes for run in variant.runs.values()) for variant in variants]
    logarithmic = by_bytes and max(totals) > LOG_FACTOR * max(1.0, min(totals))
    for variant in variants:
        number = results.variants.index(variant)
        places, values = _mean_curve(list(variant.runs.values()), by_bytes=by_bytes)
        if logarithmic:
            values = [value for place, value in zip(places, values, strict=True) if place > 0]
            places = [place for place in places if place > 0]
        means = [value.mean for value in values]
        _draw(axis, places, means, number, variant.name)
        if all(value.low is not None for value in values):
            lows, highs = ([getattr(value, end) for value in values] for end in ("low", "high"))
            axis.fill_between(places, lows, highs, color=_colour(number), alpha=_BAND, linewidth=0)
    if by_bytes:
        _name_megabytes(axis, logarithmic=logarithmic)
    else:
        style.name_round_axis(axis)
    style.name_metric_axis(axis, results.metric)
    style.draw_legend(axis)
    return figure


def _mean_curve(runs: Sequence[Outcome], *, by_bytes: bool) -> tuple[list[float], list[Spread]]:
    """Return where a variant's curve has points, and their spreads, in the rounds that all seeds have."""
    by_round = [{point.server_round: point for point in run.points} for run in runs if run.points]
    rounds = sorted(set.intersection(*(set(points) for points in by_round)))
    places, values = [], []
    for server_round in rounds:
        points: list[Point] = [own[server_round] for own in by_round]
        found = spread([point.value for point in points])
        if found is not None:
            values.append(found)
            places.append(
                float(np.mean([point.wire_bytes for point in points])) / 1e6
                if by_bytes
                else float(server_round)
            )
    return places, values


def _bars(results: StudyResults, variants: Sequence[VariantRuns]) -> Figure:
    figure, (axis,) = style.new_figure(
        width=_WIDE * style.WIDTH_INCHES, height=max(2.2, 0.42 * len(variants) + 1.0)
    )
    for row, variant in enumerate(variants):
        number, values = results.variants.index(variant), list(variant.finals.values())
        found = spread(values)
        if found is None:
            continue
        place = len(variants) - 1 - row
        axis.barh(place, found.mean, height=0.62, color=_colour(number), alpha=0.75)
        _whisker(axis, found.mean, place, found)
        axis.plot(values, [place] * len(values), "o", color=style.INK, markersize=2.6, alpha=0.6)
    axis.set_yticks(
        range(len(variants))[::-1],
        [variant.name for variant in variants],
        parse_math=False,
        family=style.font_families(),
    )
    axis.set_xlabel(metric_label(results.metric))
    if style.is_share(results.metric):
        style.percent_ticks(axis.xaxis)
    axis.grid(visible=False, axis="y")
    return figure


def _pareto(results: StudyResults, variants: Sequence[VariantRuns]) -> Figure:
    figure, (axis,) = style.new_figure(width=_WIDE * style.WIDTH_INCHES, height=1.2 * style.HEIGHT_INCHES)
    points = []
    for variant in variants:
        number = results.variants.index(variant)
        found, sent = spread(list(variant.finals.values())), _mean(variant, lambda run: run.wire_bytes) / 1e6
        if found is None:
            continue
        points.append((sent, found.mean))
        _draw(axis, [sent], [found.mean], number, variant.name)
        _whisker(axis, sent, found.mean, found, colour=_colour(number))
    on_front = [points[place] for place in front(points)]
    axis.step(
        [x for x, _ in on_front], [y for _, y in on_front], where="post", color=style.INK,
        linewidth=1, linestyle=style.DASHED, zorder=1,
    )  # fmt: skip
    sent_all = [x for x, _ in points]
    axis.margins(x=0.08)
    _name_megabytes(axis, logarithmic=max(sent_all) > LOG_FACTOR * max(1e-6, min(sent_all)))
    style.name_metric_axis(axis, results.metric)
    style.draw_legend(axis)
    return figure


def _mean(variant: VariantRuns, value: Callable[[Outcome], float]) -> float:
    return float(np.mean([value(run) for run in variant.runs.values()]))


def _whisker(axis: Axes, x: float, y: float, values: Spread, colour: str | None = None) -> None:
    """Draw an interval: across in ink, or upright in a variant's colour."""
    if values.low is None or values.high is None:
        return
    reach = [[values.mean - values.low], [values.high - values.mean]]
    x_error, y_error = (reach, None) if colour is None else (None, reach)
    axis.errorbar(x, y, y_error, x_error, fmt="none", ecolor=colour or style.INK, elinewidth=1.1, capsize=3)


def _name_megabytes(axis: Axes, *, logarithmic: bool) -> None:
    if logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_xlim(left=0)
    axis.set_xlabel(f"sent, up and down (MB on the wire{', logarithmic' if logarithmic else ''})")


def _draw(axis: Axes, x: Sequence[float], y: Sequence[float], number: int, label: str) -> None:
    """Draw a variant's line; beyond the palette, colours come again with other dashes and markers."""
    again = number // len(style.SERIES)
    axis.plot(
        x,
        y,
        color=_colour(number),
        marker=style.MARKERS[(number + again) % len(style.MARKERS)] if len(x) <= style.MAX_MARKED else None,
        linestyle=_DASHES[again % len(_DASHES)],
        markersize=4.5 if len(x) > 1 else 7,
        linewidth=1.8,
        label=label,
    )


def _colour(number: int) -> str:
    return style.SERIES[number % len(style.SERIES)]

"""The pictures of a study: curves with bands over seeds, bars with intervals, and the Pareto front of bytes.

A band, or a bar's whisker, is the 95 % confidence interval of the mean over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
_WIDE = 1.25
_MOST_IN_AXES = 6


Place = Callable[[Point], float | None]
_PLACES: dict[str, tuple[str, str, Place]] = {
    "round": ("by round", "", lambda point: point.server_round),
    "mb": (
        "against MB sent",
        "Wire bytes, both ways, without the base model.",
        lambda point: point.wire_bytes / 1e6,
    ),
    "time": (
        "by simulated time",
        "On the clients' own links and devices.",
        lambda point: point.simulated_seconds,
    ),
}
"""Name of a horizontal axis -> words, caption, where a model stands on it (None: not recorded)."""


def study_pictures(results: StudyResults) -> dict[str, tuple[str, str, Figure]]:
    """Return name -> (title, caption, picture) of those that the finished runs give something for."""
    label = metric_label(results.metric)
    drawn = [variant for variant in results.variants if len(variant.finals)]
    with_points = [variant for variant in drawn if any(run.points for run in variant.runs.values())]
    found: dict[str, tuple[str, str, Figure]] = {}
    band = "Bands are 95 % intervals of the mean over seeds."
    for name, (words, remark, place) in _PLACES.items():
        shown = [variant for variant in with_points if _has(variant, place)]
        if shown:
            caption = f"{remark} {band}".strip()
            found[f"metric_by_{name}"] = (f"{label} {words}", caption, _curves(results, shown, name, place))
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


def _has(variant: VariantRuns, place: Place) -> bool:
    """Whether a variant's runs recorded where their models stand on an axis, and moved on it."""
    return any(place(point) for run in variant.runs.values() for point in run.points)


def _curves(results: StudyResults, variants: Sequence[VariantRuns], name: str, place: Place) -> Figure:
    figure, (axis,) = style.new_figure(width=_WIDE * style.WIDTH_INCHES, height=1.2 * style.HEIGHT_INCHES)
    curves = {variant.name: _mean_curve(list(variant.runs.values()), place) for variant in variants}
    ends = [max(places, default=0.0) for places, _ in curves.values()]
    logarithmic = name == "mb" and max(ends) > LOG_FACTOR * max(1e-6, min(ends))
    for variant in variants:
        number, (places, values) = results.variants.index(variant), curves[variant.name]
        if logarithmic:  # what was measured at 0 bytes has no place on such an axis
            values = [value for x, value in zip(places, values, strict=True) if x > 0]
            places = [x for x in places if x > 0]
        style.draw_line(axis, places, [value.mean for value in values], number, label=variant.name)
        if all(value.low is not None for value in values):
            lows, highs = ([getattr(value, end) for value in values] for end in ("low", "high"))
            axis.fill_between(places, lows, highs, color=_colour(number), alpha=_BAND, linewidth=0)
    if name == "mb":
        _name_megabytes(axis, logarithmic=logarithmic)
    elif name == "time":
        axis.set_xlabel("simulated time (s)")
        axis.set_xlim(left=0)
    else:
        style.name_round_axis(axis)
    style.name_metric_axis(axis, results.metric)
    if style.is_share(results.metric):  # an interval may end where no share is
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, 0.0), min(high, 1.02))
    _draw_legend(figure, axis)
    return figure


def _mean_curve(runs: Sequence[Outcome], place: Place) -> tuple[list[float], list[Spread]]:
    """Return where a variant's curve has points, and their spreads, in the rounds that all seeds have."""
    by_round = [{point.server_round: point for point in run.points} for run in runs if run.points]
    places, values = [], []
    for server_round in sorted(set.intersection(*(set(points) for points in by_round))):
        points = [own[server_round] for own in by_round]
        found, where = spread([point.value for point in points]), [place(point) for point in points]
        known = [x for x in where if x is not None]
        if found is not None and len(known) == len(points):
            values.append(found)
            places.append(float(np.mean(known)))
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
        style.draw_line(axis, [sent], [found.mean], number, variant.name).set(markersize=7, linestyle="none")
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
    _draw_legend(figure, axis)
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


def _colour(number: int) -> str:
    return style.SERIES[number % len(style.SERIES)]


def _draw_legend(figure: Figure, axis: Axes) -> None:
    """Name the variants: in the axes where that leaves room, or beside them."""
    if len(axis.get_legend_handles_labels()[0]) <= _MOST_IN_AXES:
        style.draw_legend(axis)
    else:
        style.draw_legend_beside(figure)

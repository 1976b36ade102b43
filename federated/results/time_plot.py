"""The headline metric against simulated time, of one run or of several: the picture of a run with a clock."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from federated.results import plot_style as style
from federated.results.plots import MAX_LEGEND, MissingData, series
from federated.results.round_record import curve_lines

TIME = "simulated_seconds_total"
_MINUTES_FROM, _HOURS_FROM = 180, 10_800
"""Seconds from which on the axis has other units."""


def metric_by_time(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> Figure:
    """Draw each run's headline metric against its simulated time.

    Args:
        runs: name -> the lines of ``metrics.jsonl``; one run needs no name.
        metric: key of the headline metric.

    Raises:
        MissingData: no run has a simulated clock.
    """
    curves = {name: _curve(lines, metric) for name, lines in runs.items()}
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        raise MissingData("no run has a simulated clock (clock)")
    longest = max(seconds for points in drawn.values() for seconds, _ in points)
    unit, in_unit = _unit_of(longest)
    figure, (axis,) = style.new_figure(width=(1.6 if len(drawn) > 1 else 1.0) * style.WIDTH_INCHES)
    for number, (name, points) in enumerate(drawn.items()):
        label = textwrap.fill(name, MAX_LEGEND) if len(drawn) > 1 else None
        times = [seconds / in_unit for seconds, _ in points]
        style.draw_line(axis, times, [value for _, value in points], number, label=label)
    axis.set_xlabel(f"simulated time ({unit})")
    axis.set_xlim(left=0)
    style.name_metric_axis(axis, metric)
    if len(drawn) > 1:
        style.draw_legend_beside(figure)
    return figure


def _curve(lines: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Return (simulated seconds, value) after each round that was evaluated; nothing without a clock."""
    if not any(TIME in line for line in lines):
        return []
    seconds = {line["server_round"]: line.get(TIME) for line in lines}
    rounds, values = series(curve_lines(lines), metric)
    pairs = ((seconds[server_round], value) for server_round, value in zip(rounds, values, strict=True))
    return [(time, value) for time, value in pairs if time is not None]


def _unit_of(seconds: float) -> tuple[str, float]:
    if seconds < _MINUTES_FROM:
        return "s", 1
    return ("min", 60) if seconds < _HOURS_FROM else ("h", 3600)

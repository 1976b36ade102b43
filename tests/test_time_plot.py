"""The picture of a metric against simulated time, and what a comparison says of that time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from federated.results.compare import compare_runs, comparison_table, write_comparison
from federated.results.plots import MissingData
from federated.results.time_plot import metric_by_time
from tests.fake_run import FakeRun


def lines_of(*times: float) -> list[dict[str, Any]]:
    return [
        {"server_round": n, "accuracy": 0.1 * n, "simulated_seconds_total": seconds}
        for n, seconds in enumerate(times)
    ]


def points(axis: Axes) -> list[list[tuple[float, float]]]:
    return [list(zip(*map(list, line.get_data()), strict=True)) for line in axis.get_lines()]


def test_points_are_rounds_at_their_times() -> None:
    (axis,) = metric_by_time({"": lines_of(0.0, 10.0, 25.0)}, "accuracy").axes
    assert points(axis) == [[(0.0, 0.0), (10.0, 0.1), (25.0, 0.2)]]
    assert axis.get_xlabel() == "simulated time (s)"


@pytest.mark.parametrize(("last", "unit", "shown"), [(600.0, "min", 10.0), (36_000.0, "h", 10.0)])
def test_long_times_have_longer_units(last: float, unit: str, shown: float) -> None:
    (axis,) = metric_by_time({"": lines_of(0.0, last)}, "accuracy").axes
    assert axis.get_xlabel() == f"simulated time ({unit})"
    assert points(axis)[0][-1] == (shown, 0.1)


def test_rounds_without_an_evaluation_and_runs_without_a_clock_are_left_out() -> None:
    lines = lines_of(0.0, 10.0, 25.0)
    del lines[1]["accuracy"]
    bare = [{"server_round": 0, "accuracy": 0.5}]
    (axis,) = metric_by_time({"timed": lines, "bare": bare}, "accuracy").axes
    assert points(axis) == [[(0.0, 0.0), (25.0, 0.2)]]
    with pytest.raises(MissingData, match="simulated clock"):
        metric_by_time({"bare": bare}, "accuracy")


def test_a_comparison_tells_simulated_time_where_a_run_has_it(tmp_path: Path) -> None:
    runs = [tmp_path / "timed", tmp_path / "bare"]
    for run in runs:
        FakeRun().write(run)
    assert "simulated time" not in comparison_table(compare_runs(runs).rows).columns
    assert not (
        write_comparison(compare_runs(runs), tmp_path / "before").parent / "comparison_time.png"
    ).exists()
    metrics = runs[0] / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["simulated_seconds_total"] = 40.0 * line["server_round"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    comparison = compare_runs(runs)
    assert [row.simulated_seconds for row in comparison.rows] == [40.0 * lines[-1]["server_round"], None]
    assert "simulated time" in comparison_table(comparison.rows).columns
    text = write_comparison(comparison, tmp_path / "after").read_text(encoding="utf-8")
    assert "comparison_time.png" in text
    assert (tmp_path / "after" / "comparison_time.png").is_file()

"""Runs side by side say what their folders say, and name what else sets them apart."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from federated.results.compare import (
    compare_runs,
    comparison_table,
    terminal_tables,
    to_csv,
    to_json,
    write_comparison,
)
from federated.results.tables import to_markdown
from federated.results.wording import format_megabytes
from models.errors import UserError
from tests.fake_run import ACCURACIES, EXCHANGED, OVERHEAD_BYTES, FakeRun


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    better = FakeRun(accuracies=ACCURACIES, client_metrics=False)
    smaller = FakeRun(accuracies=(0.192, 0.4, 0.5, 0.6), exchanged=EXCHANGED // 4, client_metrics=False)
    return [better.write(tmp_path / "fp32"), smaller.write(tmp_path / "int8|x")]


def test_rows_hold_what_the_folders_hold(two_runs: list[Path]) -> None:
    fp32, int8 = compare_runs(two_runs).rows
    assert (fp32.final, fp32.best, fp32.rounds, fp32.zero_shot) == (0.708, 0.708, 5, 0.192)
    assert (int8.final, int8.rounds, int8.exchanged_parameters) == (0.6, 3, EXCHANGED // 4)
    assert fp32.uplink_wire_bytes == 5 * 10 * (4 * EXCHANGED + OVERHEAD_BYTES) == fp32.downlink_wire_bytes
    assert (fp32.seconds, fp32.peak_memory_bytes) == (41.25, 812_000_000)


def test_the_default_target_is_the_best_value_that_every_run_reached(two_runs: list[Path]) -> None:
    fp32, int8 = compare_runs(two_runs).rows
    assert fp32.target == int8.target == 0.6
    assert fp32.wire_bytes_to_target == 2 * 2 * 10 * (4 * EXCHANGED + OVERHEAD_BYTES)  # in round 2
    assert int8.wire_bytes_to_target == 3 * 2 * 10 * (EXCHANGED + OVERHEAD_BYTES)  # in round 3


def test_a_target_that_was_not_reached_has_no_bytes(two_runs: list[Path]) -> None:
    assert [row.wire_bytes_to_target is None for row in compare_runs(two_runs, target=0.65).rows] == [
        False,
        True,
    ]


def test_what_the_mb_are_is_said_with_and_without_a_target(two_runs: list[Path]) -> None:
    *_, note = compare_runs(two_runs).notes
    assert note.startswith("MB are wire bytes")
    assert "MB to reach 60.0 %" in note
    *_, note = compare_runs(two_runs, target=0.99).notes
    assert note.startswith("MB are wire bytes")
    assert "MB to reach" not in note


def test_markdown_json_and_csv_agree(two_runs: list[Path], tmp_path: Path) -> None:
    path = write_comparison(compare_runs(two_runs), tmp_path / "out")
    rows = compare_runs(two_runs).rows
    markdown = path.read_text()
    assert to_markdown(comparison_table(rows)) in markdown
    assert "int8\\|x" in markdown
    assert (
        len({line.replace("\\|", "").count("|") for line in to_markdown(comparison_table(rows)).splitlines()})
        == 1
    )
    from_json = json.loads((tmp_path / "out" / "comparison.json").read_text())
    from_csv = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert from_json == json.loads(to_json(rows))
    assert to_csv(rows).count("\n") == 3
    for one, other in zip(from_json, from_csv, strict=True):
        assert {key: "" if value is None else str(value) for key, value in one.items()} == other
    for ending in ("png", "svg", "pdf"):
        assert (tmp_path / "out" / f"comparison.{ending}").stat().st_size > 1000
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [FakeRun().write(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [row.name for row in compare_runs(folders).rows] == ["a/run", "b/run"]


def test_a_foreign_a_damaged_and_another_tasks_folder_are_named_and_left_out(
    two_runs: list[Path], tmp_path: Path
) -> None:
    other = FakeRun(metric="image_to_text_recall_at_5").write(tmp_path / "other")
    (tmp_path / "foreign").mkdir()
    damaged = FakeRun().write(tmp_path / "damaged")
    (damaged / "communication.csv").write_text("a,b\n")
    broken = FakeRun().write(tmp_path / "broken")
    (broken / "config.yaml").write_text("seed: [")
    comparison = compare_runs([other, tmp_path / "foreign", *two_runs, damaged, broken, tmp_path / "none"])
    assert [row.name for row in comparison.rows] == ["fp32", "int8|x"]
    reasons = sorted(comparison.left_out)
    for folder, reason in zip(("broken", "damaged", "foreign", "none", "other"), reasons, strict=True):
        assert str(tmp_path / folder) in reason
    assert "is not a run folder" in reasons[2]
    assert "image_to_text_recall_at_5" in reasons[4]
    assert "foreign" in write_comparison(comparison, tmp_path / "out").read_text()


def test_without_a_run_there_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs"):
        compare_runs([])
    with pytest.raises(UserError, match="not a run folder"):
        compare_runs([tmp_path])


def test_an_unfinished_run_is_marked_and_compares_as_far_as_it_went(two_runs: list[Path]) -> None:
    (two_runs[0] / "summary.json").unlink()
    comparison = compare_runs(two_runs)
    row, other = comparison.rows
    assert (row.final, row.exchanged_parameters, row.peak_memory_bytes) == (0.708, None, None)
    assert (row.finished, other.finished) == (False, True)
    assert [cells[0] for cells in comparison_table(comparison.rows).rows] == ["fp32 (unfinished)", "int8|x"]
    assert any(note.startswith("Unfinished") and note.endswith(": fp32.") for note in comparison.notes)


@pytest.mark.parametrize("target", [0.65, "0.65", "65%", "65 %", "65"])
def test_a_target_is_a_share_or_a_percentage(target: float | str, two_runs: list[Path]) -> None:
    assert [row.target for row in compare_runs(two_runs, target=target).rows] == [0.65, 0.65]


def test_a_target_that_is_no_number_is_refused(two_runs: list[Path]) -> None:
    with pytest.raises(UserError, match=r"0\.65, or 65"):
        compare_runs(two_runs, target="two thirds")


def test_the_rounds_to_a_target_are_those_of_its_bytes(two_runs: list[Path]) -> None:
    fp32, int8 = compare_runs(two_runs, target="65 %").rows
    assert (fp32.rounds_to_target, int8.rounds_to_target) == (3, None)  # 65.1 % after round 3
    assert fp32.wire_bytes_to_target == 3 * 2 * 10 * (4 * EXCHANGED + OVERHEAD_BYTES)
    header = comparison_table([fp32, int8]).columns
    assert {"rounds to reach 65.0 %", "MB to reach 65.0 %"} <= set(header)


def test_a_central_run_reaches_a_target_in_epochs_without_bytes(tmp_path: Path) -> None:
    (row,) = compare_runs([FakeRun(central=True).write(tmp_path / "central")], target=0.6).rows
    assert (row.rounds_to_target, row.wire_bytes_to_target) == (2, None)


def test_method_alpha_seed_and_every_key_that_differs_are_columns(tmp_path: Path) -> None:
    folders = [FakeRun().write(tmp_path / name) for name in "abc"]
    changes = {
        "b": {"seed: 0": "seed: 3", "alpha: 0.5": "alpha: 5.0", "r: 8": "r: 4"},
        "c": {"name: fedavg": "name: flora\n  server_optimizer:\n    name: fedadam", "clip_lora": "clip"},
    }
    for name, pairs in changes.items():
        path = tmp_path / name / "config.yaml"
        for there, instead in pairs.items():
            assert there in path.read_text()
            path.write_text(path.read_text().replace(there, instead))
    rows = compare_runs(folders).rows
    assert [(row.method, row.alpha, row.seed) for row in rows] == [
        ("fedavg", 0.5, 0),
        ("fedavg", 5.0, 3),
        ("flora + fedadam, full", 0.5, 0),
    ]
    assert [row.settings for row in rows] == [
        {"model.type": "clip_lora", "lora.r": 8, "aggregation.server_optimizer.name": None},
        {"model.type": "clip_lora", "lora.r": 4, "aggregation.server_optimizer.name": None},
        {"model.type": "clip", "lora.r": 8, "aggregation.server_optimizer.name": "fedadam"},
    ]
    table = comparison_table(rows)
    assert [cells[table.columns.index("lora.r")] for cells in table.rows] == ["8", "4", "8"]
    assert set(table.columns) == {
        head.replace(". ", ".") for part in terminal_tables(rows).values() for head in part.columns
    }


def test_runs_with_equal_settings_have_no_column_of_settings(two_runs: list[Path]) -> None:
    rows = compare_runs(two_runs).rows
    assert [row.settings for row in rows] == [{}, {}]
    assert set(terminal_tables(rows)) == {"Runs", "What they took"}


def test_what_is_sent_in_all_is_up_and_down_together(two_runs: list[Path]) -> None:
    rows = compare_runs(two_runs).rows
    table = comparison_table(rows)
    column = table.columns.index("MB sent")
    assert [cells[column] for cells in table.rows] == [
        format_megabytes(row.uplink_wire_bytes + row.downlink_wire_bytes) for row in rows
    ]


def test_runs_of_the_same_data_split_model_and_seed_are_compared_without_remark(two_runs: list[Path]) -> None:
    (only,) = compare_runs(two_runs).notes
    assert only.startswith("MB are wire bytes")
    assert "MB to reach 60.0 %: until the first round" in only


@pytest.mark.parametrize(
    ("there", "instead", "note"),
    [
        ("seed: 0", "seed: 7", "seed differs: 7 in c; 0 in the other runs."),
        (
            "source: fashion_mnist",
            "source: emoji",
            "data.source differs: emoji in c; fashion_mnist in the other",
        ),
        ("alpha: 0.5", "alpha: 9", "partition.options.alpha differs: 9 in c; 0.5 in the other runs."),
        ("\n    alpha: 0.5", " {}", "partition.options.alpha differs: not set in c; 0.5 in the other runs."),
        ("model_name: tiny", "model_name: b", "model.model_name differs: b in c; tiny in the other runs."),
        ("r: 8", "r: 4", None),  # the method may differ
        ("name: fedavg", "name: ffa", None),
    ],
)
def test_runs_that_differ_in_more_than_the_method_are_named_with_the_difference(
    there: str, instead: str, note: str | None, tmp_path: Path
) -> None:
    folders = [FakeRun().write(tmp_path / name) for name in "abcd"]
    config = folders[2] / "config.yaml"
    assert there in config.read_text()
    config.write_text(config.read_text().replace(there, instead))
    differing = [line for line in compare_runs(folders).notes if " differs: " in line]
    assert len(differing) == (0 if note is None else 1)
    assert all(line.startswith(str(note)) for line in differing)
    assert all(
        line in write_comparison(compare_runs(folders), tmp_path / "out").read_text() for line in differing
    )


def test_central_and_personal_runs_are_marked_in_table_and_notes(tmp_path: Path) -> None:
    folders = [
        FakeRun().write(tmp_path / "quickstart"),
        FakeRun(central=True).write(tmp_path / "upper"),
        FakeRun(personal=True).write(tmp_path / "own"),
    ]
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text().replace("num_clients: 10", "num_clients: 1"))
    (folders[2] / "config.yaml").unlink()
    comparison = compare_runs(folders)
    names = [row[0] for row in comparison_table(comparison.rows).rows]
    assert names == ["quickstart", "upper (central)", "own (personal)"]
    assert any(note.startswith("Central training") and note.endswith(": upper.") for note in comparison.notes)
    assert any(note.startswith("Personal models") and note.endswith(": own.") for note in comparison.notes)
    assert any(note.startswith("No config.yaml") and note.endswith(": own.") for note in comparison.notes)
    assert not any("differs" in note for note in comparison.notes)  # a central run has no split

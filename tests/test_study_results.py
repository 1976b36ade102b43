"""Tables, frames and pictures of many runs say what the run folders say, and count honestly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from federated.communication.ledger import Ledger, Transfer
from federated.results import load_runs
from federated.results.records import read_run
from federated.results.run_outcome import Outcome, outcome_of, parse_budget, parse_target
from federated.results.study_page import write_page, write_tables
from federated.results.study_plots import front, study_pictures
from federated.results.study_results import StudyResults, VariantRuns
from federated.results.study_tables import study_notes, study_tables, to_latex, to_latex_text
from federated.results.tables import TextTable, to_markdown
from models.errors import UserError
from tests.fake_run import EXCHANGED, OVERHEAD_BYTES, TOTAL, FakeRun

ROUND = 10 * 2 * (4 * EXCHANGED + OVERHEAD_BYTES)
"""Wire bytes of a fake round: ten clients, both ways."""
CURVES = {
    "plain": ((0.2, 0.4, 0.5, 0.6), (0.2, 0.5, 0.6, 0.7), (0.2, 0.3, 0.4, 0.5)),
    "better": ((0.2, 0.5, 0.6, 0.7), (0.2, 0.6, 0.7, 0.8), (0.2, 0.5, 0.6, 0.5)),
}


def outcome(folder: Path, curve: Sequence[float], **how: object) -> Outcome:
    return outcome_of(read_run(FakeRun(accuracies=curve, client_metrics=False, **how).write(folder)))  # type: ignore[arg-type]


def study(folder: Path, curves: Mapping[str, Sequence[Sequence[float]]] = CURVES) -> StudyResults:
    variants = tuple(
        VariantRuns(
            name,
            next(iter(curves)),
            {seed: outcome(folder / f"runs/{name}-{seed}", curve) for seed, curve in enumerate(of_seed)},
        )
        for name, of_seed in curves.items()
    )
    return StudyResults("mine", variants, (0, 1, 2))


def cells(table: TextTable, row: int) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[row], strict=True))


def test_a_table_has_mean_deviation_and_interval_over_seeds(tmp_path: Path) -> None:
    row = cells(study_tables(study(tmp_path))["Results"], 0)
    assert row["accuracy"] == "60.0 ± 10.0 %"
    assert row["95 % interval"] == "[35.2, 84.8]"  # 4.3027 x 10 / sqrt(3) = 24.84
    assert row["MB sent"] == f"{3 * ROUND / 1e6:.2f}"
    assert row["with base"] == f"{(3 * ROUND + 10 * 4 * TOTAL) / 1e6:.1f}"


def test_differences_are_paired_by_seed_and_baselines_left_out(tmp_path: Path) -> None:
    table = study_tables(study(tmp_path))["Differences to the baseline, seed by seed"]
    assert len(table.rows) == 1
    row = cells(table, 0)
    assert (row["variant"], row["against"], row["difference (points)"]) == ("better", "plain", "+6.7")
    assert row["win/tie/loss"] == "2/1/0"
    assert row["p"] == row["p (Holm)"] == "0.184"  # differences .1, .1, 0: t = 2 on 2 degrees of freedom


def test_seeds_that_are_missing_or_no_number_are_counted(tmp_path: Path) -> None:
    whole = study(tmp_path)
    first = whole.variants[0]
    broken = Outcome("accuracy", None, (), 5.0, 5.0)
    cut = VariantRuns("plain", "plain", {0: first.runs[0], 1: broken})
    results = StudyResults("mine", (cut, whole.variants[1]), (0, 1, 2))
    tables = study_tables(results)
    assert cells(tables["Results"], 0)["seeds"] == "1 of 3"
    assert cells(tables["Results"], 0)["95 % interval"] == "–"
    assert results.differences["better"].spread.num == 1
    assert cells(tables["Differences to the baseline, seed by seed"], 0)["p"] == "–"


def test_cost_to_target_is_what_was_sent_before_the_first_model_that_has_it(tmp_path: Path) -> None:
    cost = study(tmp_path).cost_to(0.5)
    better, plain = cost["better"], cost["plain"]
    assert (better.reached, better.num, better.rounds.mean, better.rounds.sd) == (3, 3, 1.0, 0.0)
    assert better.wire_bytes.mean == ROUND
    assert better.wire_bytes_with_base.mean == ROUND + 10 * 4 * TOTAL
    assert plain.rounds.mean == pytest.approx((2 + 1 + 3) / 3)
    assert plain.wire_bytes.mean == pytest.approx(2 * ROUND)


def test_who_did_not_reach_the_target_counts_with_all_it_sent(tmp_path: Path) -> None:
    results = study(tmp_path)
    cost = results.cost_to(0.7)
    assert (cost["plain"].reached, cost["better"].reached) == (1, 2)
    assert cost["plain"].rounds.mean == 3
    assert cost["better"].rounds.mean == pytest.approx((3 + 2 + 3) / 3)
    table = study_tables(results, target=0.7)["Cost-to-Target: accuracy 70.0 %"]
    assert [cells(table, row)["reached"] for row in (0, 1)] == ["1 of 3", "2 of 3"]
    assert cells(table, 1)["rounds"] == "> 2.67"
    assert any("lower bound" in note for note in study_notes(results, 0.7))
    never = study_tables(results, target=0.95)["Cost-to-Target: accuracy 95.0 %"]
    assert never.rows[0] == ("plain", "0 of 3", "not reached", "not reached", "not reached")


def test_quality_under_budget_is_of_the_last_model_before_it_was_spent(tmp_path: Path) -> None:
    results = study(tmp_path)
    assert results.quality_under(2 * ROUND)["plain"].mean == pytest.approx(0.5)
    assert results.quality_under(2 * ROUND - 1)["plain"].mean == pytest.approx(0.4)
    assert results.quality_under(0)["plain"].mean == pytest.approx(0.2)  # before training, nothing is sent


def test_the_base_counts_for_the_clients_that_have_taken_part(tmp_path: Path) -> None:
    """Two clients, one a round; the second evaluates in round 1, after the model that it measures."""
    folder = FakeRun(accuracies=(0.2, 0.4, 0.5), num_clients=2, cohort_size=1, client_metrics=False).write(
        tmp_path
    )
    ledger = Ledger(
        Transfer(server_round, client, "downlink", phase, "ok", 1, 4, 100)
        for server_round, client, phase in ((1, 0, "train"), (1, 1, "evaluate"), (2, 1, "train"))
    )  # fmt: skip
    ledger.write_csv(folder / "communication.csv")
    base = 4 * TOTAL  # a client's; the summary has it for both
    summary = json.loads((folder / "summary.json").read_text())
    summary["communication"]["one_off_base_bytes"] = 2 * base
    (folder / "summary.json").write_text(json.dumps(summary))
    points = outcome_of(read_run(folder)).points
    assert [point.wire_bytes for point in points] == [0, 100, 300]
    assert [point.wire_bytes_with_base for point in points] == [0, 100 + base, 300 + 2 * base]


def test_simulated_seconds_to_the_target_are_those_of_the_clock_in_that_round(tmp_path: Path) -> None:
    for seed, curve in enumerate(CURVES["plain"]):
        FakeRun(accuracies=curve, client_metrics=False).write(folder := tmp_path / str(seed))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line["simulated_seconds_total"] = 100.0 * line["server_round"] + seed
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {seed: outcome_of(read_run(tmp_path / str(seed))) for seed in range(3)}
    results = StudyResults("mine", (VariantRuns("plain", "plain", runs),), (0, 1, 2))
    found = results.cost_to(0.5)["plain"].simulated_seconds
    assert found is not None
    assert found.mean == pytest.approx((200 + 101 + 302) / 3)
    assert "simulated s" in study_tables(results, target=0.5)["Cost-to-Target: accuracy 50.0 %"].columns
    assert "metric_by_time" in study_pictures(results)


@pytest.mark.parametrize(
    ("text", "value"),
    [(0.65, 0.65), ("65%", 0.65), ("65 %", 0.65), (65, 0.65), ("0.65", 0.65), (1, 1.0), (0, 0.0)],
)
def test_a_target_is_a_share_or_per_cent(text: float | str, value: float) -> None:
    assert parse_target(text, "accuracy") == pytest.approx(value)
    assert parse_target("12", "perplexity") == 12
    with pytest.raises(UserError, match="no value to reach"):
        parse_target("high", "accuracy")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5MB", 5_000_000), ("1.5 kB", 1500), (2000, 2000), ("2e6", 2_000_000), ("1GB", 10**9)],
)
def test_a_budget_is_bytes_in_powers_of_ten(text: int | str, num_bytes: int) -> None:
    assert parse_budget(text) == num_bytes
    for wrong in ("5MiB", "much", "-3MB", ""):
        with pytest.raises(UserError, match="no number of bytes"):
            parse_budget(wrong)


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [(3.0, 0.7), (1.0, 0.5), (2.0, 0.4), (3.0, 0.6), (5.0, 0.7), (0.5, 0.1)]
    found = front(points)
    beaten = {
        i
        for i, (sent, value) in enumerate(points)
        for j, (other_sent, other) in enumerate(points)
        if j != i and other_sent <= sent and other >= value and (other_sent, other) != (sent, value)
    }
    assert sorted(found) == sorted(set(range(len(points))) - beaten)


def test_latex_has_the_rules_of_booktabs_and_no_bare_command() -> None:
    table = TextTable(("name_1", "share"), (("a & b", "50 %"), ("[x]", "±1 < 2")), words=frozenset({0}))
    assert to_latex(table).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"name\_1 & share \\",
        r"\midrule",
        r"a \& b & 50 \% \\",
        r"{[}x] & $\pm$1 $<$ 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert to_latex_text("\\{~^}") == r"\textbackslash{}\{\textasciitilde{}\textasciicircum{}\}"
    assert to_markdown(table).splitlines()[:3] == ["| name_1 | share |", "| --- | ---: |", "| a & b | 50 % |"]


def test_an_interval_that_is_wider_than_shares_can_be_is_drawn_within_them(tmp_path: Path) -> None:
    results = study(tmp_path, {"wide": ([0.1, 0.9], [0.9, 0.1])})
    figures = {name: figure for name, (_, _, figure) in study_pictures(results).items()}
    low, high = figures["metric_by_round"].axes[0].get_ylim()
    assert low == 0
    assert 1 < high < 1.05


def test_a_study_leaves_tables_frames_pictures_and_a_page(tmp_path: Path) -> None:
    results = study(tmp_path, {"<b>plain</b>": CURVES["plain"], "better": CURVES["better"]} | {
        f"v{n}": (CURVES["plain"][0],) for n in range(8)
    })  # fmt: skip
    tables, notes = write_tables(results, tmp_path, target="60%", budget="2MB")
    page = write_page(results, tmp_path, tables, notes).read_text()
    assert "&lt;b&gt;plain&lt;/b&gt;" in page
    assert "<b>plain" not in page
    assert page.count("<svg ") == 4
    for title, table in tables.items():
        assert title in page
        assert to_markdown(table) in (tmp_path / "tables.md").read_text()
        assert to_latex(table) in (tmp_path / "tables.tex").read_text()
    for name in ("metric_by_round", "metric_by_mb", "final_bars", "pareto"):
        heads = {ext: (tmp_path / f"plots/{name}.{ext}").read_bytes()[:5] for ext in ("png", "svg", "pdf")}
        assert heads == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}
    frame = load_runs(tmp_path / "runs" / "*")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + len(frame)


# ---- frames


def test_runs_become_rows_with_the_settings_that_differ(tmp_path: Path) -> None:
    for name, uplink in (("a", "fp32"), ("b", "int8")):
        folder = FakeRun(client_metrics=False).write(tmp_path / name)
        text = (folder / "config.yaml").read_text().replace("uplink: fp32", f"uplink: {uplink}")
        (folder / "config.yaml").write_text(f"{text}output: {{name: {name}}}\n")
    (tmp_path / "no_run").mkdir()
    frame = load_runs(str(tmp_path / "*"))
    assert list(frame.index) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list(frame["communication.uplink"]) == ["fp32", "int8"]
    assert not [column for column in frame.columns if column.startswith(("output", "lora", "partition"))]
    assert (frame["final"] == 0.708).all()
    assert frame["uplink_wire_bytes"].iloc[0] == 5 * ROUND / 2
    long = load_runs([tmp_path / "a", tmp_path / "b"], by_round=True)
    assert long.index.names == ["run", "server_round"]
    assert list(long.xs(str(tmp_path / "b"))["accuracy"]) == [0.192, 0.512, 0.608, 0.651, 0.684, 0.708]
    assert list(long.xs(str(tmp_path / "b"))["sent_wire_bytes"]) == [t * ROUND for t in range(6)]
    assert set(long["communication.uplink"]) == {"fp32", "int8"}


def test_a_pattern_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder is called"):
        load_runs(tmp_path / "*")

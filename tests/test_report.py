"""The report says what the run's files say, needs nothing from outside, and escapes what it prints."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from federated.communication.ledger import Ledger, Transfer
from federated.communication.savings import Bandwidth, ModelSizes, communication_summary
from federated.results import client_plots, plot_style, plots, run_place
from federated.results.byte_reasons import byte_reasons
from federated.results.plot_style import inline_svg, save_figure
from federated.results.records import read_run
from federated.results.report import write_report
from federated.results.tables import round_table
from federated.results.wording import format_bytes, format_megabytes, format_percent, format_saving
from models.errors import UserError
from tests.fake_run import ACCURACIES, EXCHANGED, TOTAL, FakeRun

PICTURES = {
    "metric_by_round",
    "metric_by_bytes",
    "bytes_by_round",
    "bytes_by_method",
    "client_metric",
    "client_split",
    "class_accuracy",
    "aggregation_error",
}
HOSTILE = '<script>alert(1)</script> & "quotes" $x$'


@pytest.fixture(scope="module")
def run() -> FakeRun:
    return FakeRun(
        failures={(2, 3): f"ValueError: {HOSTILE}", (3, 3): f"ValueError: {HOSTILE}", (4, 7): "timeout"}
    )


@pytest.fixture(scope="module")
def folder(run: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run.write(tmp_path_factory.mktemp("runs") / "quickstart")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> ET.Element:
    """The page, parsed as XML: that it parses is what "well-formed" means here."""
    return parse(folder)


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw, but do not render: for what is about the page's words."""
    monkeypatch.setattr("federated.results.report.save_figure", lambda figure, folder, name: None)
    monkeypatch.setattr("federated.results.report.inline_svg", lambda figure, name, title: "<svg/>")


def parse(folder: Path) -> ET.Element:
    return ET.fromstring((folder / "report.html").read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))


def text_of(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def cards_of(page: ET.Element) -> dict[str, str]:
    cards = [card for card in page.iter("div") if card.get("class") == "card"]
    return {text_of(card.find("dt")): " ".join(text_of(note) for note in card.iter("dd")) for card in cards}


def table_of(page: ET.Element, name: str) -> list[list[str]]:
    (table,) = (table for table in page.iter("table") if table.get("id") == name)
    return [[text_of(cell) for cell in row] for row in table.iter("tr")]


def attributes_of(page: ET.Element) -> Iterator[tuple[str, str]]:
    for element in page.iter():
        yield from element.attrib.items()


def test_headline_figures_are_the_runs_numbers(run: FakeRun, page: ET.Element) -> None:
    cards, ledger = cards_of(page), run.ledger()
    assert cards["Final accuracy"].startswith("70.8 %")
    assert "19.2 % (+51.6 points)" in cards["Final accuracy"]
    sent = cards["Sent over the wire"]
    assert sent.startswith(format_bytes(ledger.total().wire_bytes))
    assert f"up {format_bytes(ledger.total(direction='uplink').wire_bytes)}" in sent
    assert f"payload alone: {format_bytes(ledger.total().payload_bytes)}" in sent
    assert cards["Time"].startswith("41.2 s 5 rounds")
    assert "peak memory 812.0 MB" in cards["Time"]
    assert cards["Parameters that travel"].startswith(f"{EXCHANGED:,} {100 * EXCHANGED / TOTAL:.2f} %")


def test_the_saving_stands_with_and_without_the_base(run: FakeRun, page: ET.Element) -> None:
    saved = cards_of(page)["Saved against full model FedAvg"]
    transfers = sum(1 for row in run.ledger().rows if row.payload_bytes)
    ours, full = run.ledger().total().wire_bytes, transfers * 4 * TOTAL
    assert saved.startswith(format_percent(1 - ours / full, 2))
    assert f"with the base model counted: {format_percent(1 - (ours + 10 * 4 * TOTAL) / full, 2)}" in saved
    assert "computed for the same clients and rounds" in saved


def test_the_round_table_equals_metrics_and_ledger(run: FakeRun, page: ET.Element) -> None:
    header, *rows = table_of(page, "rounds")
    ledger, column = run.ledger(), {name: number for number, name in enumerate(header)}
    assert len(rows) == len(ACCURACIES)
    for server_round, (row, accuracy) in enumerate(zip(rows, ACCURACIES, strict=True)):
        uplink = ledger.total(server_round=server_round, direction="uplink").wire_bytes
        so_far = sum(sent.wire_bytes for sent in ledger.rows if sent.server_round <= server_round)
        assert row[column["round"]] == str(server_round)
        assert row[column["accuracy"]] == f"{100 * accuracy:.1f} %"
        assert row[column["up MB"]] == format_megabytes(uplink)
        assert row[column["total MB"]] == format_megabytes(so_far)
        assert row[column["failed"]] == str(sum(1 for t, _ in run.failures if t == server_round))


def test_the_comparison_table_equals_the_summary(folder: Path, page: ET.Element) -> None:
    recorded = json.loads((folder / "summary.json").read_text())["communication"]["comparison"]
    _, *rows = table_of(page, "savings")
    assert [row[0] for row in rows] == [row["name"] for row in recorded]
    for shown, row in zip(rows, recorded, strict=True):
        assert shown[2:6] == [
            format_bytes(row["total_bytes"]),
            format_saving(row["saving"]),
            format_bytes(row["total_bytes_with_base"]),
            format_saving(row["saving_with_base"]),
        ]
        assert shown[6] == ("measured" if row["measured"] else "computed")


def test_failed_clients_are_listed_with_rounds_and_reason(page: ET.Element) -> None:
    _, *rows = table_of(page, "failures")
    assert rows == [["3", "2–3", f"ValueError: {HOSTILE}"], ["7", "4", "timeout"]]


def test_every_picture_is_in_the_page_and_saved_as_png_svg_and_pdf(folder: Path, page: ET.Element) -> None:
    figures = {figure.get("id"): figure for figure in page.iter("figure")}
    assert set(figures) == PICTURES
    assert all(figure.find("svg") is not None for figure in figures.values())
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    paths = list((folder / "plots").iterdir())
    assert {(path.stem, path.suffix) for path in paths} == {
        (name, end) for name in PICTURES for end in starts
    }
    for path in paths:
        assert path.read_bytes().startswith(starts[path.suffix])
        assert run_place._is_written(f"plots/{path.name}")


def test_a_picture_is_the_same_file_for_the_same_figure(run: FakeRun, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_figure(plots.metric_by_round(run.metrics(), "accuracy"), tmp_path / name, "picture")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_page_says_when_by_what_command_and_with_which_versions(page: ET.Element) -> None:
    header = text_of(page.find("body/header"))
    for words in (
        "Started 2026-01-02 03:04 UTC",
        "fedlora run quickstart output.name='a b'",
        "fedlora 0.1.0, python 3.11, torch 2.13.0",
    ):
        assert words in header


def test_the_accuracy_of_each_class_is_the_summarys(run: FakeRun, page: ET.Element) -> None:
    _, *rows = table_of(page, "classes")
    assert rows == [
        [row["name"], str(row["num_examples"]), format_percent(row["accuracy"])] for row in run.per_class()
    ]


def test_the_aggregation_error_stands_in_each_round_with_what_it_means(page: ET.Element) -> None:
    header, *rows = table_of(page, "rounds")
    column = header.index("aggregation error")
    assert [row[column] for row in rows] == ["–", "10 %", "5 %", "3.33 %", "2.5 %", "2 %"]
    (figure,) = (figure for figure in page.iter("figure") if figure.get("id") == "aggregation_error")
    assert "weighted average of the models that its clients trained" in text_of(figure)


def test_wide_tables_scroll_within_themselves(page: ET.Element) -> None:
    boxes = [box for box in page.iter("div") if box.get("class") == "scroll"]
    assert {box.get("aria-label") for box in boxes} >= {"rounds", "savings", "classes", "failures"}
    assert sum(1 for _ in page.iter("table")) == len(boxes)
    assert "overflow-x: auto" in text_of(page.find("head/style"))


def test_nothing_outside_the_page_is_referenced(folder: Path, page: ET.Element) -> None:
    text = re.sub(r"data:image/png;base64,[^\"]*", "", (folder / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//[a-z]|@import|<link|<script", text, flags=re.IGNORECASE)
    for name, value in attributes_of(page):
        if name in ("href", "src", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value[:60])
    assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_every_inner_reference_has_its_target(page: ET.Element) -> None:
    ids = [value for name, value in attributes_of(page) if name == "id"]
    assert len(ids) == len(set(ids))
    markup = ET.tostring(page, encoding="unicode")
    targets = set(re.findall(r"url\(#([^)]*)\)", markup)) | set(re.findall(r'href="#([^"]*)"', markup))
    assert targets <= set(ids)


def test_words_of_the_run_are_escaped_everywhere(tmp_path: Path) -> None:
    run = FakeRun(class_names=(HOSTILE, "b"), failures={(1, 0): HOSTILE})
    folder = run.write(tmp_path / "a & <b>run")
    (folder / "config.yaml").write_text(f"seed: 0\nname: '{HOSTILE}'\n")
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    write_report(folder)
    page = parse(folder)
    assert not list(page.iter("script"))
    assert not list(page.iter("b"))
    assert text_of(page.find("body/header/h1")) == "a & <b>run"
    assert HOSTILE in text_of(page)


def test_class_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    partition = FakeRun(class_names=("$\\frac{1}{", "cash $ and $ more")).partition()
    figure = client_plots.client_split(partition)
    svg = inline_svg(figure, "split", "Split")
    assert "$\\frac{1}{" in svg
    assert "cash $ and $ more" in svg


def test_a_second_report_is_the_same_to_the_byte(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.usefixtures("words_only")
def test_an_unfinished_run_is_reported_as_far_as_it_went(run: FakeRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "cut")
    for name in ("summary.json", "partition.json", "environment.json", "config.yaml"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    write_report(folder)
    page = parse(folder)
    assert "did not finish" in text_of(page)
    assert cards_of(page)["Final accuracy"].startswith("65.1 %")
    assert "the partition was not recorded" in text_of(page)
    assert "no client reported accuracy" in text_of(page)
    assert not (folder / "plots" / "client_split.png").exists()


def test_a_run_without_metrics_or_transfers_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"server_round": 0}\n')
    write_report(tmp_path)
    text = text_of(parse(tmp_path))
    assert "no round recorded accuracy" in text
    assert text.count("Not shown:") == len(PICTURES) + 1
    assert "No transfers were recorded" in text


@pytest.mark.usefixtures("words_only")
def test_a_summary_that_contradicts_the_ledger_is_pointed_out(run: FakeRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "tampered")
    summary = json.loads((folder / "summary.json").read_text())
    summary["communication"]["total_wire_bytes"] += 1
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report(folder)
    assert f"{run.ledger().total().wire_bytes:,}" in text_of(parse(folder))
    assert "this page shows communication.csv" in text_of(parse(folder))


@pytest.mark.usefixtures("words_only")
def test_a_declared_base_is_stated(run: FakeRun, tmp_path: Path) -> None:
    folder = run.write(tmp_path / "declared")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("base_preinstalled: false", "base_preinstalled: true"))
    write_report(folder)
    assert "declares that clients hold the base model already" in text_of(parse(folder))


@pytest.mark.usefixtures("words_only")
def test_what_is_cached_is_a_line_each_and_no_python(run: FakeRun, tmp_path: Path) -> None:
    folder, notes = (
        run.write(tmp_path / "cached"),
        ["images: not cached (because)", "captions: computed once"],
    )
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"caches": notes, "none": None}))
    write_report(folder)
    page = parse(folder)
    values = {
        text_of(key): [text_of(line) for line in value]
        for pairs in page.iter("dl")
        if pairs.get("class") == "pairs"
        for key, value in zip(pairs.findall("dt"), pairs.findall("dd"), strict=True)
    }
    assert (values["caches"], values["none"], values["torch"]) == (notes, ["–"], ["2.13.0"])
    assert "['" not in text_of(page)


@pytest.mark.usefixtures("words_only")
def test_a_run_of_the_full_model_is_told_what_its_messages_cost(tmp_path: Path) -> None:
    run = FakeRun(exchanged=TOTAL, client_metrics=False)
    folder = run.write(tmp_path / "full")
    sizes = ModelSizes(4 * TOTAL, head_bytes=4 * 10 * 129, base_bytes=4 * TOTAL, ships_base=True)
    summary = json.loads((folder / "summary.json").read_text())
    summary["communication"] = communication_summary(run.ledger(), sizes, Bandwidth())
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report(folder)
    page = parse(folder)
    assert cards_of(page)["Sent more than full model FedAvg"].startswith("0.01 %")
    assert "This run sends every weight and needs none." in text_of(page)
    ours, head = (
        next(row for row in table_of(page, "savings") if row[0] == n) for n in ("this run", "head only")
    )
    assert (ours[3], ours[2] == ours[4]) == ("0.01 % more", True)
    assert head[4] == format_bytes(4 * 10 * 129 * 100 + 10 * 4 * TOTAL)


@pytest.mark.usefixtures("words_only")
def test_another_headline_metric_leads_the_page(tmp_path: Path) -> None:
    run = FakeRun(metric="image_to_text_recall_at_5", client_metrics=False)
    folder = run.write(tmp_path / "retrieval")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"text_to_image_recall_at_5": 0.31} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder)
    page = parse(folder)
    assert cards_of(page)["Final I→T R@5"].startswith("70.8 %")
    header, *rows = table_of(page, "rounds")
    assert rows[0][header.index("T→I R@5")] == "31.0 %"


@pytest.mark.parametrize("content", [None, "not json\n{}\n", '{"accuracy": 1}\n'])
def test_what_is_no_run_folder_is_the_users_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_a_round_made_again_counts_once(tmp_path: Path) -> None:
    lines = [{"server_round": 1, "accuracy": 0.1}, {"server_round": 2, "accuracy": 0.2}]
    again = [{"server_round": 2, "accuracy": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    assert [line["accuracy"] for line in read_run(tmp_path).metrics] == [0.1, 0.3]


# Personal models


@pytest.fixture(scope="module")
def personal() -> FakeRun:
    return FakeRun(accuracies=(0.9, 0.5, 0.6), personal=True)


@pytest.mark.usefixtures("words_only")
def test_personal_models_and_the_pre_trained_model_are_told_apart(personal: FakeRun, tmp_path: Path) -> None:
    write_report(personal.write(tmp_path / "fedsa"))
    page = parse(tmp_path / "fedsa")
    card = cards_of(page)["Final accuracy"]
    assert card.startswith("60.0 % mean of personal models, each on its own client's rows")
    assert "pre-trained model, on the server's rows: 90.0 %" in card
    assert "points" not in card  # a difference between two sets of rows says nothing
    text = text_of(page)
    assert "There is no global model." in text
    assert not re.search("(?<!no )global model", text)


def test_no_line_joins_what_was_scored_on_different_rows(personal: FakeRun) -> None:
    metrics, ledger = personal.metrics(), personal.ledger()
    top, losses = plots.metric_by_round(metrics, "accuracy", 0.9).axes
    curve, before = top.lines
    assert list(curve.get_xdata()) == [1, 2]
    assert [text.get_text() for text in top.get_legend().get_texts()] == [
        "personal models, clients' rows",
        "pre-trained model, server's rows: 90.0 %",
    ]
    assert set(before.get_ydata()) == {0.9}
    assert [list(line.get_xdata()) for line in losses.lines] == [[1, 2], [1, 2]]
    assert plots.curve_of("fedsa", metrics, "accuracy", ledger).values == [0.5, 0.6]


def test_the_best_of_personal_models_is_not_the_pre_trained_models(personal: FakeRun, tmp_path: Path) -> None:
    folder = personal.write(tmp_path / "fedsa")
    (folder / "summary.json").unlink()
    headline = read_run(folder).headline
    assert (headline["zero_shot"], headline["final"], headline["best"]) == (0.9, 0.6, 0.6)


# Central training


@pytest.mark.usefixtures("words_only")
def test_a_central_run_has_epochs_and_no_rounds_clients_or_bytes(tmp_path: Path) -> None:
    folder = FakeRun(central=True, accuracies=(0.2, 0.7, 0.6)).write(tmp_path / "central")
    (folder / "config.yaml").unlink()  # it has the sections of federated runs
    write_report(folder)
    page = parse(folder)
    text = text_of(page).replace("metrics.jsonl, communication.csv", "")
    assert not re.search(r"\b(round|client|sent|travel|cohort|transfer|global model)", text), text
    assert "best: 70.0 % after epoch 1" in cards_of(page)["Final accuracy"]
    assert "weights of epoch 2" in cards_of(page)["Final accuracy"]
    assert cards_of(page)["Time"].startswith("41.2 s 2 epochs on this machine")
    assert [figure.get("id") for figure in page.iter("figure")] == ["metric_by_epoch", "class_accuracy"]
    assert table_of(page, "rounds")[0] == [
        "epoch",
        "accuracy",
        "validation accuracy",
        "loss",
        "train loss",
        "seconds",
    ]
    figure = plots.metric_by_round(FakeRun(central=True).metrics(), "accuracy")
    assert figure.axes[-1].get_xlabel() == "epoch"


# Pictures


@pytest.mark.parametrize("num_clients", [1, 4, 12, 41, 1000])
@pytest.mark.parametrize("num_classes", [2, 100])
def test_the_split_is_drawn_for_few_and_many_clients(num_clients: int, num_classes: int) -> None:
    run = FakeRun(num_clients=num_clients, class_names=tuple(f"class {i}" for i in range(num_classes)))
    sizes, cells = client_plots.client_split(run.partition()).axes[:2]
    counts = np.array([client["class_counts"] for client in run.partition()["clients"]])
    shown = np.asarray(cells.images[0].get_array())  # (classes, clients)
    assert shown.shape == (num_classes, num_clients)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(np.sort(shown.sum(0)), np.sort(shares.sum(1)))
    assert len(cells.get_yticks()) <= 24
    if num_clients <= plots.MAX_BARS:
        assert [bar.get_height() for bar in sizes.patches] == counts.sum(1).tolist()
        np.testing.assert_allclose(shown.T, shares)


def test_a_split_without_classes_shows_sizes() -> None:
    clients = [{"client_id": i, "num_examples": 10 + i} for i in range(4)]
    (axis,) = client_plots.client_split({"clients": clients}).axes
    assert [bar.get_height() for bar in axis.patches] == [10, 11, 12, 13]


def test_bars_by_round_stack_to_the_ledgers_bytes(run: FakeRun) -> None:
    ledger = run.ledger()
    (axis,) = plots.bytes_by_round(ledger).axes
    tops: dict[int, float] = {}
    for bar in axis.patches:
        center = round(bar.get_x() + bar.get_width() / 2)
        tops[center] = tops.get(center, 0.0) + bar.get_height()
    for server_round, megabytes in tops.items():
        assert megabytes == pytest.approx(ledger.total(server_round=server_round).wire_bytes / 1e6)


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 40, 300])
def test_rounds_are_counted_in_whole_numbers(num_rounds: int) -> None:
    run = FakeRun(accuracies=tuple(np.linspace(0.1, 0.9, num_rounds + 1)), num_clients=2, cohort_size=2)
    metrics, ledger = run.metrics(), run.ledger()
    for figure in (
        plots.bytes_by_round(ledger),
        plots.metric_by_round(metrics, "accuracy"),
        plots.metric_by_round(metrics[-1:], "accuracy"),
    ):
        axis = figure.axes[-1]
        left, right = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if left <= tick <= right]
        assert ticks
        assert all(tick == round(tick) for tick in ticks), ticks


def test_the_byte_curve_counts_what_was_sent_until_each_model_existed(run: FakeRun) -> None:
    ledger, last = run.ledger(), len(ACCURACIES) - 1
    curve = plots.curve_of("run", run.metrics(), "accuracy", ledger)
    evaluation = ledger.total(phase="evaluate").wire_bytes  # after the last round
    assert evaluation > 0
    assert curve.values == list(ACCURACIES)
    assert curve.wire_bytes[0] == 0
    assert curve.wire_bytes[last] == ledger.total().wire_bytes - evaluation
    assert curve.total_wire_bytes == ledger.total().wire_bytes


def test_the_byte_curve_ends_where_the_total_is(run: FakeRun) -> None:
    total = run.summary()["communication"]["total_wire_bytes"]
    (axis,) = plots.metric_by_bytes(run.metrics(), "accuracy", run.ledger()).axes
    assert max(float(max(line.get_xdata())) for line in axis.lines) == total / 1e6
    assert axis.get_legend().get_texts()[0].get_text().endswith(f"{format_bytes(total)} in all")
    without_evaluation = FakeRun(client_metrics=False)
    (axis,) = plots.metric_by_bytes(
        without_evaluation.metrics(), "accuracy", without_evaluation.ledger()
    ).axes
    (only,) = axis.lines
    assert max(only.get_xdata()) == without_evaluation.ledger().total().wire_bytes / 1e6


@pytest.mark.parametrize("num_clients", [3, 300])
def test_client_values_show_their_weighted_mean(num_clients: int) -> None:
    run = FakeRun(num_clients=num_clients, cohort_size=3)
    clients = [entry for entry in run.metrics()[-1]["clients"].values() if "accuracy" in entry]
    mean = np.average([c["accuracy"] for c in clients], weights=[c["eval_examples"] for c in clients])
    (axis,) = client_plots.client_metric(run.metrics(), "accuracy").axes
    assert f"{100 * mean:.1f} %" in axis.get_legend().get_texts()[0].get_text()
    assert len(clients) == num_clients


def test_other_ways_are_drawn_at_their_totals(run: FakeRun) -> None:
    comparison = run.summary()["communication"]["comparison"]
    (axis,) = plots.bytes_by_method(comparison).axes
    widths = [bar.get_width() for bar in axis.patches[: len(comparison)]]
    assert widths == pytest.approx([row["total_bytes"] / 1e6 for row in comparison])


def test_runs_of_very_different_size_share_a_logarithmic_axis() -> None:
    small = plots.Curve("small", [0, 1000, 2000], [0.1, 0.2, 0.3], 2000)
    large = plots.Curve("large", [0, 10**6, 2 * 10**6], [0.1, 0.2, 0.3], 2 * 10**6)
    (logarithmic,) = plots.metric_by_bytes_of_runs([small, large], "accuracy").axes
    (linear,) = plots.metric_by_bytes_of_runs([small, small], "accuracy").axes
    assert (logarithmic.get_xscale(), linear.get_xscale()) == ("log", "linear")
    assert [len(line.get_xdata()) for line in logarithmic.lines] == [2, 2]  # 0 bytes has no place there
    assert [len(line.get_xdata()) for line in linear.lines] == [3, 3]


def test_missing_values_are_gaps_not_errors() -> None:
    metrics = [
        {"server_round": 0},
        {"server_round": 1, "accuracy": 0.5, "loss": float("nan")},
        {"server_round": 2},
    ]
    figure = plots.metric_by_round(metrics, "accuracy")
    assert list(figure.axes[0].lines[0].get_xdata()) == [1]
    assert "<svg" in inline_svg(figure, "name", "Title")


def test_drawing_leaves_matplotlibs_settings_and_pyplot_alone(run: FakeRun) -> None:
    before = dict(mpl.rcParams)
    inline_svg(plots.metric_by_round(run.metrics(), "accuracy", 0.192), "name", "Title")
    assert dict(mpl.rcParams) == before


def test_an_svgs_title_is_escaped() -> None:
    svg = inline_svg(Figure(), "name", 'a "title" <b>')
    assert ET.fromstring(svg).get("aria-label") == 'a "title" <b>'


def test_bytes_in_the_round_table_come_from_metrics_when_there_is_no_ledger(run: FakeRun) -> None:
    trained = run.metrics()[1:]
    assert round_table(trained, "accuracy").rows == round_table(trained, "accuracy", run.ledger()).rows


def test_no_two_of_thirty_runs_look_alike_and_their_legend_is_beside_the_axes() -> None:
    curves = [plots.Curve(f"run_{i}" + "_long" * 12, [0, 1000], [0.1, i / 30], 1500) for i in range(30)]
    figure = plots.metric_by_bytes_of_runs(curves, "accuracy")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    named = [line for line in axis.lines if not line.get_label().startswith("_")]
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in named}
    dashes = {(line.get_color(), str(line._dash_pattern)) for line in named}
    assert len(named) == len(looks) == len(dashes) == 30
    (legend,) = figure.legends
    box, axes_box = legend.get_window_extent(), axis.get_window_extent()
    assert box.x0 >= axes_box.x1
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1


SCRIPTS = ("猫", "ねこ", "고양이", "кошка", "γάτα", "قطة", "חתול", "बिल्ली", "แมว", "🐈", "con mèo", "$x_{1}")


def test_class_names_of_any_script_are_drawn_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    run = FakeRun(class_names=SCRIPTS, client_metrics=False)
    folder = run.write(tmp_path / "run")
    write_report(folder)
    assert not [str(warning.message) for warning in recwarn]
    assert not caplog.records
    page = text_of(parse(folder))
    assert all(name in page for name in SCRIPTS)


def test_letters_that_the_usual_font_lacks_are_set_in_fonts_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {plot_style.FONT: "abc", "Half": "猫", "Noto Sans CJK": "猫犬", "Thai": "แมว", "Other": "xyz"}
    fonts = [SimpleNamespace(name=name, fname=name) for name in known]
    monkeypatch.setattr(plot_style, "fontManager", SimpleNamespace(ttflist=fonts))
    monkeypatch.setattr(plot_style, "_letters", lambda family: frozenset(map(ord, known[family])))
    choose = plot_style._fonts_with.__wrapped__
    assert choose(frozenset(map(ord, "犬แ"))) == ("Noto Sans CJK", "Thai")
    assert choose(frozenset(map(ord, "猫"))) == ("Noto Sans CJK",)
    assert choose(frozenset(map(ord, "अ"))) == ()


# Why rounds differ


def transfers(*rows: tuple[int, int, str, str, int]) -> Ledger:
    """A ledger of (round, client, direction, phase, values); a value is 4 bytes, a message 100 more."""
    return Ledger(
        Transfer(t, client, direction, phase, "ok", values, 4 * values, 4 * values + 100)  # type: ignore[arg-type]
        for t, client, direction, phase, values in rows
    )


def rounds_of(downlinks: list[dict[int, int]], update: int) -> Ledger:
    """Training rounds: client -> values of its downlink."""
    rows = []
    for server_round, sizes in enumerate(downlinks, start=1):
        for client, values in sizes.items():
            rows.append((server_round, client, "downlink", "train", values))
            rows.append((server_round, client, "uplink", "train", update))
    return transfers(*rows)


def test_equal_rounds_need_no_reason() -> None:
    assert byte_reasons(rounds_of([{0: 10, 1: 10}, {0: 10, 1: 10}], 10)) == []


def test_newcomers_that_receive_more_are_the_reason() -> None:
    (reason,) = byte_reasons(rounds_of([{0: 1000, 1: 1000}, {0: 400, 2: 1000}, {0: 400, 1: 400}], 400))
    assert "the first time receives the whole state, 1,000 values" in reason
    assert "taken part before receives 400 values" in reason
    assert "New clients: 2 in round 1, 1 in round 2." in reason


def test_missed_rounds_and_merged_bases_are_the_reason() -> None:
    first, missed, merged = byte_reasons(rounds_of([{0: 10, 1: 10}, {0: 90, 2: 10}, {0: 90, 1: 170}], 40))
    assert "the first time" in first
    assert "A client of the round before receives 90 values" in missed
    assert "up to 170 values" in missed
    assert "An update has 40 values; in rounds 2–3 downlinks had up to 170" in merged


def test_rounds_of_different_numbers_of_clients_are_named() -> None:
    (reason,) = byte_reasons(rounds_of([{0: 10, 1: 10}, {0: 10}, {0: 10, 1: 10}], 10))
    assert reason == "Not every round has as many clients: 1 in round 2, 2 in rounds 1, 3."


def test_evaluation_failures_and_setup_are_reasons() -> None:
    ledger = rounds_of([{0: 10, 1: 10}, {0: 10}], 10)
    ledger.append(Transfer(0, 0, "downlink", "setup", "ok", 0, 0, 700))
    ledger.append(Transfer(2, 1, "downlink", "evaluate", "ok", 10, 40, 140))
    ledger.append(Transfer(2, 1, "downlink", "train", "failed", 10, 40, 140))
    setup, evaluation, failed = byte_reasons(ledger)
    assert "which client it is: 700 B" in setup
    assert "After round 2, 1 client received" in evaluation
    assert "In round 2 a client failed" in failed

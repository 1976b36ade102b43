"""The terminal shows the run's numbers whole, as bars where there is a terminal and as lines where not."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from federated.results.console import MAX_FAILURES_SHOWN, RunDisplay, print_results, print_table
from federated.results.tables import TextTable, failure_table, round_table, saving_table
from federated.results.wording import (
    format_bytes,
    format_megabytes,
    format_metric,
    format_percent,
    format_rounds,
    format_saving,
    format_seconds,
    metric_label,
    saving,
)
from tests.fake_run import TOTAL, FakeRun

MARKUP = "ValueError: [bold]shard[/bold] of [client] holds no images"


def console_of(width: int = 100, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=width, force_terminal=terminal, color_system=None), output


def play(run: FakeRun, display: RunDisplay) -> None:
    with display:
        display.run_started(len(run.accuracies) - 1, headline_metric=run.metric)
        for line in run.metrics():
            cohort = line.get("cohort", [])
            if cohort:
                display.round_started(line["server_round"], len(cohort), "train")
            failed = {failure["client_id"] for failure in line.get("failed", [])}
            for client_id in cohort:
                display.client_done(client_id, "failed" if client_id in failed else "ok")
            display.round_done(line)


@pytest.fixture
def run() -> FakeRun:
    return FakeRun(failures={(2, 3): MARKUP})


def test_without_a_terminal_there_is_one_plain_line_a_round(run: FakeRun) -> None:
    console, output = console_of()
    play(run, RunDisplay(console))
    lines = output.getvalue().splitlines()
    rounds = [line for line in lines if line.startswith("round")]
    assert [line.split()[1] for line in rounds] == [f"{t}/5" for t in range(6)]
    assert len(lines) == len(rounds) + 1
    assert lines[3] == f"  client 3: {MARKUP}"
    assert "\x1b" not in output.getvalue()


def test_a_rounds_line_has_the_metric_the_clients_and_the_bytes_so_far(run: FakeRun) -> None:
    console, output = console_of()
    play(run, RunDisplay(console))
    line = next(line for line in output.getvalue().splitlines() if line.startswith("round 2/5"))
    sent = sum(row.wire_bytes for row in run.ledger().rows if row.server_round <= 2)
    for part in ("accuracy 60.8 %", "10 clients", "1 failed", f"{format_bytes(sent)} sent"):
        assert part in line


def test_in_a_terminal_the_bars_count_rounds_and_clients(run: FakeRun) -> None:
    console, output = console_of(terminal=True)
    display = RunDisplay(console)
    with display:
        display.run_started(5)
        display.round_started(1, 10)
        display.client_done(0, "ok")
        display.client_done(7, "failed")
        shown = console.export_text() if console.record else ""
        display._progress.refresh()
    shown += output.getvalue()
    assert "2/10" in shown
    assert "0/5" in shown
    assert "1 failed, last: client 7" in shown


def test_an_error_takes_the_bars_away(run: FakeRun) -> None:
    console, _ = console_of(terminal=True)
    with pytest.raises(KeyboardInterrupt), RunDisplay(console):
        raise KeyboardInterrupt
    with RunDisplay(console):  # a display that still held the terminal would refuse a second one
        pass


def test_many_failures_of_a_round_are_summed_up() -> None:
    run = FakeRun(failures={(1, client): "no images" for client in range(9)})
    console, output = console_of()
    play(run, RunDisplay(console))
    assert output.getvalue().count("no images") == MAX_FAILURES_SHOWN
    assert f"and {9 - MAX_FAILURES_SHOWN} more" in output.getvalue()


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_number_is_cut_at_any_width(run: FakeRun, width: int) -> None:
    console, output = console_of(width)
    print_results(console, run.metrics(), run.summary(), run.ledger())
    text = output.getvalue()
    rounds, savings = (
        round_table(run.metrics(), "accuracy", run.ledger()),
        saving_table(run.summary()["communication"]["comparison"]),
    )
    for whole in (rounds, savings):
        table = whole if width == 160 else whole.without(*whole.optional)
        for row in table.rows:
            numbers = [cell for number, cell in enumerate(row) if number not in table.words]
            assert any(all(cell in line for cell in numbers) for line in text.splitlines()), row


def test_the_tables_fit_a_usual_terminal(run: FakeRun) -> None:
    console, output = console_of(80)
    print_results(console, run.metrics(), run.summary(), run.ledger())
    assert max(map(len, output.getvalue().splitlines())) <= 80


def test_a_run_that_sends_more_than_the_full_model_says_so_without_a_minus() -> None:
    run = FakeRun(exchanged=TOTAL, client_metrics=False)
    console, output = console_of(80)
    print_results(console, run.metrics(), run.summary(), run.ledger())
    assert "0.01 % more sent than full model FedAvg" in output.getvalue()
    assert "-" not in output.getvalue().replace("pre-", "")
    assert max(map(len, output.getvalue().splitlines())) <= 80


def test_a_narrow_terminal_leaves_out_optional_columns_and_folds_long_names() -> None:
    table = TextTable(
        ("run", "final", "extra one", "extra two"),
        (("a_name_without_a_blank_" * 3, "70.8 %", "1" * 20, "2" * 20),),
        words=frozenset({0}),
        optional=("extra two", "extra one"),
    )
    shown = {}
    for width in (130, 110, 40):
        console, output = console_of(width)
        print_table(console, table, "Runs")
        shown[width] = output.getvalue()
        assert max(map(len, shown[width].splitlines())) <= width
    assert ["extra two" in text for text in shown.values()] == [True, False, False]
    assert ["extra one" in text for text in shown.values()] == [True, True, False]
    assert all("70.8 %" in text for text in shown.values())
    rows = shown[40].partition("─\n")[2].replace("70.8 %", "")
    assert "".join(rows.split()) == "a_name_without_a_blank_" * 3


@pytest.mark.parametrize("width", [80, 100])
def test_retrievals_many_recalls_fit_a_usual_terminal(width: int) -> None:
    recalls = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    lines = [line | dict.fromkeys(recalls, 0.25) for line in FakeRun(metric=recalls[1]).metrics()]
    console, output = console_of(width)
    print_table(console, round_table(lines, recalls[1]), "Rounds")
    assert max(map(len, output.getvalue().splitlines())) <= width
    assert "R@5" in output.getvalue()


def test_reasons_are_printed_as_they_are(run: FakeRun) -> None:
    console, output = console_of()
    print_results(console, run.metrics(), run.summary(), run.ledger())
    assert MARKUP in output.getvalue()


def test_the_closing_line_names_the_saving_with_and_without_the_base(run: FakeRun) -> None:
    console, output = console_of()
    print_results(console, run.metrics(), run.summary())
    ours = run.summary()["communication"]["comparison"][0]
    reached, saved = output.getvalue().splitlines()[-2:]
    assert reached.startswith("accuracy 19.2 % → 70.8 %, ")
    assert saved == (
        f"{format_percent(ours['saving'], 2)} saved against full model FedAvg "
        f"({format_percent(ours['saving_with_base'], 2)} with the base model counted)"
    )


def test_personal_models_are_not_compared_with_the_pre_trained_model() -> None:
    run = FakeRun(personal=True)
    console, output = console_of()
    play(run, RunDisplay(console))
    print_results(console, run.metrics(), run.summary(), run.ledger())
    text = output.getvalue()
    assert "round 5/5  accuracy 70.8 % (clients' rows)" in text
    assert "19.2 % →" not in text
    assert "that is personal models, clients' rows; pre-trained model, server's rows: 19.2 %" in text


def test_an_unfinished_run_prints_its_rounds(run: FakeRun) -> None:
    console, output = console_of()
    print_results(console, run.metrics()[:3], {})
    assert "60.8 %" in output.getvalue()


def test_failures_that_only_the_ledger_knows_are_listed(run: FakeRun) -> None:
    silent = [line | {"failed": []} for line in run.metrics()]
    ((client, rounds, reason),) = failure_table(silent, run.ledger()).rows
    assert (client, rounds) == ("3", "2")
    assert "no reason recorded" in reason


# kB and MB are powers of ten.
@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (825, "825 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.00 MB"),
        (3_145_728, "3.15 MB"),
        (605_109_252, "605.1 MB"),
        (1_210_218_504, "1.21 GB"),
        (5 * 10**15, "5000.0 TB"),
        (None, "–"),
    ],
)
def test_bytes_are_written_in_powers_of_ten(num_bytes: int | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_megabytes_are_millions_of_bytes() -> None:
    assert [format_megabytes(n) for n in (0, 1_000_000, 31_457_280, 605_109_252)] == [
        "0",
        "1.000",
        "31.46",
        "605.1",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.9448, "94.48 %"), (1.0, "100.00 %"), (0.99999, "> 99.99 %"), (-0.032, "-3.20 %"), (None, "–")],
)
def test_a_share_below_one_is_never_written_as_one_hundred_percent(share: float | None, text: str) -> None:
    assert format_percent(share, 2) == text


@pytest.mark.parametrize(
    ("saving", "text"),
    [(0.9801, "98.01 %"), (0.0, "0.00 %"), (-0.00001, "0.00 %"), (-0.0002, "0.02 % more"), (None, "–")],
)
def test_what_was_not_saved_is_written_as_more(saving: float | None, text: str) -> None:
    assert format_saving(saving) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.40 s"), (41.24, "41.2 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_written_in_fitting_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_losses_are_not_percentages_and_shares_are() -> None:
    assert format_metric("loss", 0.5) == "0.5"
    assert format_metric("accuracy", 0.5) == "50.0 %"
    assert format_metric("loss", float("nan")) == "nan"
    assert metric_label("train_loss") == "train loss"


def test_round_numbers_are_joined_into_spans() -> None:
    assert format_rounds([7, 1, 2, 3, 3]) == "1–3, 7"
    assert format_rounds([]) == ""


@pytest.mark.parametrize(
    ("share", "written"), [(0.9801, "98.01 %"), (-3e-5, "0.00 %"), (-0.0002, "0.02 % more"), (None, "–")]
)
def test_a_saving_is_never_minus_zero(share: float | None, written: str) -> None:
    assert format_saving(share) == written
    assert saving(share) == (written.removesuffix(" more"), written.endswith("more"))

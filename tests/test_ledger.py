"""The ledger adds up like a naive sum, survives the disk, and savings follow the published formulas."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from federated.communication.ledger import COLUMNS, Ledger, Totals, Transfer
from federated.communication.savings import (
    FULL_MODEL,
    THIS_RUN,
    Bandwidth,
    ModelSizes,
    communication_summary,
    comparison,
    parallel_seconds,
    transfer_seconds,
)
from models.errors import UserError
from tests.fake_run import EXCHANGED, OVERHEAD_BYTES, FakeRun

# openai/clip-vit-base-patch32 in fp32: 151,277,313 values; LoRA on its text tower's q, k, v, out at r=16:
# 786,432 values.
CLIP_BYTES = 605_109_252
TEXT_QKVO_R16_BYTES = 3_145_728


def random_ledger(num_rows: int = 400, seed: int = 0) -> Ledger:
    """Return transfers with every combination of words and arbitrary counts."""
    rng = np.random.default_rng(seed)
    words = itertools.cycle(
        itertools.product(("uplink", "downlink"), ("train", "evaluate", "setup"), ("ok", "failed"))
    )
    rows = []
    for (direction, phase, status), counts in zip(words, rng.integers(0, 10**7, (num_rows, 3)), strict=False):
        place = (int(rng.integers(0, 6)), int(rng.integers(0, 9)))
        rows.append(Transfer(*place, direction, phase, status, *(int(count) for count in counts)))
    return Ledger(rows)


def training_ledger(num_clients: int, cohort_size: int, num_rounds: int, num_bytes: int) -> Ledger:
    """Return a run in which every client takes part at least once and payload is all there is on the wire."""
    ledger = Ledger()
    clients = itertools.cycle(range(num_clients))
    for server_round in range(1, num_rounds + 1):
        for client in itertools.islice(clients, cohort_size):
            for direction in ("downlink", "uplink"):
                counts = (num_bytes // 4, num_bytes, num_bytes)
                ledger.append(Transfer(server_round, client, direction, "train", "ok", *counts))
    return ledger


def naive_total(ledger: Ledger, **where: int | str) -> Totals:
    kept = [row for row in ledger.rows if all(getattr(row, key) == value for key, value in where.items())]
    return Totals(
        len(kept),
        sum(row.parameters for row in kept),
        sum(row.payload_bytes for row in kept),
        sum(row.wire_bytes for row in kept),
    )


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"direction": "uplink"},
        {"server_round": 3, "phase": "train"},
        {"status": "failed"},
        {"client_id": 99},
    ],
)
def test_totals_equal_naive_sums(where: dict[str, int | str]) -> None:
    ledger = random_ledger()
    assert ledger.total(**where) == naive_total(ledger, **where)


def test_groups_are_disjoint_and_add_up_to_the_whole() -> None:
    ledger = random_ledger()
    groups = ledger.totals_by("server_round", "direction", "phase")
    for (server_round, direction, phase), totals in groups.items():
        assert totals == naive_total(ledger, server_round=server_round, direction=direction, phase=phase)
    assert sum(totals.wire_bytes for totals in groups.values()) == ledger.total().wire_bytes
    assert sum(totals.transfers for totals in groups.values()) == len(ledger)


def test_cumulative_bytes_end_at_the_total_and_never_fall() -> None:
    ledger = random_ledger()
    sent = ledger.cumulative_wire_bytes()
    assert list(sent) == list(range(max(sent) + 1))
    assert list(sent.values()) == sorted(sent.values())
    assert sent[max(sent)] == ledger.total().wire_bytes


def test_a_client_that_was_only_asked_who_it_is_took_no_part_and_needs_no_base() -> None:
    rows = [Transfer(0, client_id, "downlink", "setup", "ok", 0, 0, 10) for client_id in (0, 1, 2)]
    rows.append(Transfer(1, 1, "downlink", "train", "ok", 1, 4, 10))
    assert Ledger(rows).clients() == (1,)
    assert ModelSizes(full_model_bytes=100, base_bytes=90).one_off_base_bytes(Ledger(rows)) == 90


def test_a_round_without_transfers_keeps_the_cumulative_bytes() -> None:
    rows = [Transfer(t, 0, "uplink", "train", "ok", 1, 4, 10) for t in (1, 4)]
    assert Ledger(rows).cumulative_wire_bytes() == {0: 0, 1: 10, 2: 10, 3: 10, 4: 20}


def test_csv_round_trip_keeps_every_row(tmp_path: Path) -> None:
    ledger = random_ledger()
    ledger.write_csv(tmp_path / "communication.csv")
    assert Ledger.read_csv(tmp_path / "communication.csv").rows == ledger.rows


def test_csv_has_the_documented_columns_and_plain_numbers(tmp_path: Path) -> None:
    ledger = FakeRun().ledger()
    ledger.write_csv(tmp_path / "communication.csv")
    with (tmp_path / "communication.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert COLUMNS[:2] == ("server_round", "client_id")
    assert sum(int(row["wire_bytes"]) for row in rows) == ledger.total().wire_bytes
    assert int(rows[0]["wire_bytes"]) == 4 * EXCHANGED + OVERHEAD_BYTES


def test_writing_in_steps_equals_writing_once(tmp_path: Path) -> None:
    rows = random_ledger().rows
    ledger = Ledger()
    for start in range(0, len(rows), 50):
        for row in rows[start : start + 50]:
            ledger.append(row)
        ledger.write_csv(tmp_path / "steps.csv")
        ledger.write_csv(tmp_path / "steps.csv")  # nothing new: nothing changes
    Ledger(rows).write_csv(tmp_path / "once.csv")
    assert (tmp_path / "steps.csv").read_bytes() == (tmp_path / "once.csv").read_bytes()


def test_later_writes_only_append(tmp_path: Path) -> None:
    path = tmp_path / "communication.csv"
    ledger = random_ledger(10)
    ledger.write_csv(path)
    path.write_text(path.read_text().replace("setup", "train"))  # an edit that a rewrite would undo
    before = path.read_bytes()
    ledger.append(ledger.rows[0])
    ledger.write_csv(path)
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == before.count(b"\n") + 1


def test_a_write_that_falls_short_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "communication.csv"
    ledger = random_ledger(10)
    ledger.write_csv(path)
    before = path.read_bytes()
    ledger.append(ledger.rows[0])
    plain_open = Path.open

    def open_on_a_full_disk(self: Path, mode: str = "r", **options: object):
        file = plain_open(self, mode, **options)
        if "b" not in mode:
            return file

        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                return file.write(data[: len(data) // 2])

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        return Full()

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    with pytest.raises(OSError, match="as it was before"):
        ledger.write_csv(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    ledger.write_csv(path)
    assert Ledger.read_csv(path).rows == ledger.rows


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "communication.csv"
    ledger = random_ledger(20)
    ledger.write_csv(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert Ledger.read_csv(path).rows == ledger.rows[:-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "columns"),
        (",".join(COLUMNS) + "\n1,2,sideways,train,ok,1,1,1\n", "line 2.*sideways"),
        (",".join(COLUMNS) + "\n1,2,uplink,train,ok,1,1\n", "line 2"),
        (",".join(COLUMNS) + "\n1,2,uplink,train,ok,1,-1,1\n", "negative"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "communication.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Ledger.read_csv(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Ledger.read_csv(tmp_path / "communication.csv")


def test_an_unknown_column_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="rond.*server_round"):
        Ledger().total(rond=1)


def test_transfers_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_ledger(1).rows[0].wire_bytes = 0  # type: ignore[misc]


# num_bytes * 8 / (mbps * 1e6), rounded.
@pytest.mark.parametrize(
    ("num_bytes", "mbps", "seconds"),
    [
        (CLIP_BYTES, 10, 484.09),
        (CLIP_BYTES, 50, 96.82),
        (CLIP_BYTES // 2, 10, 242.04),
        (TEXT_QKVO_R16_BYTES, 10, 2.517),
        (TEXT_QKVO_R16_BYTES, 50, 0.503),
        (1_000_000, 8, 1.0),
    ],
)
def test_seconds_at_a_bandwidth_match_the_published_table(
    num_bytes: int, mbps: float, seconds: float
) -> None:
    assert transfer_seconds(num_bytes, mbps) == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize("mbps", [0, -1, float("nan")])
def test_a_bandwidth_must_be_positive(mbps: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        transfer_seconds(1, mbps)


def test_a_round_lasts_as_long_as_its_slowest_client() -> None:
    rows = [
        Transfer(1, 0, "downlink", "train", "ok", 0, 0, 5_000_000),
        Transfer(1, 1, "downlink", "train", "ok", 0, 0, 10_000_000),
        Transfer(1, 0, "uplink", "train", "ok", 0, 0, 2_500_000),
        Transfer(1, 1, "downlink", "evaluate", "ok", 0, 0, 5_000_000),
        Transfer(2, 0, "uplink", "train", "ok", 0, 0, 1_250_000),
    ]
    seconds = parallel_seconds(Ledger(rows), Bandwidth(uplink_mbps=10, downlink_mbps=50))
    assert seconds == {1: (pytest.approx(2.0), pytest.approx(1.6 + 0.8)), 2: (pytest.approx(1.0), 0.0)}


def test_more_clients_send_more_bytes_in_the_same_time() -> None:
    few, many = (training_ledger(n, n, 2, 1000) for n in (2, 50))
    assert many.total().wire_bytes == 25 * few.total().wire_bytes
    assert parallel_seconds(many, Bandwidth()) == parallel_seconds(few, Bandwidth())


# Text q, k, v, out at r=16 in fp32 against full-model FedAvg in fp32, rounded to two digits.
@pytest.mark.parametrize(
    ("num_clients", "cohort_size", "num_rounds", "saving_with_base"),
    [(10, 10, 10, 94.48), (10, 10, 50, 98.48), (100, 10, 50, 89.48), (100, 10, 200, 96.98)],
)
def test_savings_match_the_published_examples(
    num_clients: int, cohort_size: int, num_rounds: int, saving_with_base: float
) -> None:
    ledger = training_ledger(num_clients, cohort_size, num_rounds, TEXT_QKVO_R16_BYTES)
    rows = {row.name: row for row in comparison(ledger, ModelSizes(CLIP_BYTES, base_bytes=CLIP_BYTES))}
    ours, full = rows[THIS_RUN], rows[FULL_MODEL]
    assert 100 * ours.saving == pytest.approx(99.48, abs=0.005)
    assert 100 * ours.saving_with_base == pytest.approx(saving_with_base, abs=0.005)
    assert full.payload_bytes_per_client_round == 2 * CLIP_BYTES
    assert full.total_bytes == 2 * cohort_size * num_rounds * CLIP_BYTES == full.total_bytes_with_base
    assert rows[f"{FULL_MODEL}, fp16"].total_bytes * 2 == full.total_bytes
    assert (ours.measured, full.measured, full.saving) == (True, False, 0.0)


def test_a_pre_installed_base_makes_both_savings_equal() -> None:
    ledger = training_ledger(10, 10, 10, TEXT_QKVO_R16_BYTES)
    for row in comparison(ledger, ModelSizes(CLIP_BYTES, head_bytes=20_520)):
        assert row.saving == row.saving_with_base
        assert row.total_bytes == row.total_bytes_with_base


def test_head_only_needs_the_base_and_full_model_does_not() -> None:
    ledger = training_ledger(4, 2, 6, 1000)
    rows = {row.name: row for row in comparison(ledger, ModelSizes(50_000, head_bytes=40, base_bytes=49_000))}
    assert rows["head only"].total_bytes == 40 * 24
    assert rows["head only"].total_bytes_with_base == 40 * 24 + 4 * 49_000
    assert rows[THIS_RUN].total_bytes_with_base == 1000 * 24 + 4 * 49_000


def test_head_only_needs_the_same_base_whether_or_not_this_run_ships_it() -> None:
    ledger, sizes = training_ledger(4, 2, 6, 1000), {"head_bytes": 40, "base_bytes": 49_000}
    adapters = communication_summary(ledger, ModelSizes(50_000, **sizes), Bandwidth())
    full = communication_summary(ledger, ModelSizes(50_000, **sizes, ships_base=True), Bandwidth())
    assert adapters["comparison"][1:] == full["comparison"][1:]
    assert (adapters["one_off_base_bytes"], full["one_off_base_bytes"]) == (4 * 49_000, 0)
    assert full["comparison"][0]["total_bytes_with_base"] == full["comparison"][0]["total_bytes"]


def test_without_a_head_there_is_no_head_only_row() -> None:
    names = [row.name for row in comparison(training_ledger(1, 1, 1, 4), ModelSizes(100))]
    assert names == [THIS_RUN, FULL_MODEL, f"{FULL_MODEL}, fp16"]


def test_computed_rows_repeat_evaluation_but_not_lost_replies() -> None:
    rows = [
        Transfer(1, 0, "downlink", "train", "failed", 10, 40, 50),
        Transfer(1, 0, "uplink", "train", "failed", 0, 0, 0),
        Transfer(1, 1, "downlink", "train", "ok", 10, 40, 50),
        Transfer(1, 1, "uplink", "train", "ok", 10, 40, 50),
        Transfer(1, 1, "downlink", "evaluate", "ok", 10, 40, 50),
        Transfer(1, 1, "uplink", "evaluate", "ok", 0, 0, 9),
        Transfer(0, 1, "downlink", "setup", "ok", 3, 12, 20),
    ]
    ours, full, _ = comparison(Ledger(rows), ModelSizes(1000))
    assert full.total_bytes == 4 * 1000
    assert ours.total_bytes == 4 * 50 + 9 + 20


def test_another_runs_ledger_replaces_the_computed_row(tmp_path: Path) -> None:
    other = FakeRun(exchanged=250_000, client_metrics=False)
    folder = other.write(tmp_path / "full")
    summary = json.loads((folder / "summary.json").read_text())
    summary["communication"]["one_off_base_bytes"] = 0
    (folder / "summary.json").write_text(json.dumps(summary))
    ours = FakeRun(client_metrics=False).ledger()
    rows = {
        row.name: row
        for row in comparison(ours, ModelSizes(7_000_000, base_bytes=6_000_000), {FULL_MODEL: folder})
    }
    total = other.ledger().total().wire_bytes
    assert rows[FULL_MODEL].measured
    assert rows[FULL_MODEL].total_bytes == rows[FULL_MODEL].total_bytes_with_base == total
    assert rows[THIS_RUN].saving == pytest.approx(1 - ours.total().wire_bytes / total)
    assert rows[THIS_RUN].saving_with_base == pytest.approx(
        1 - (ours.total().wire_bytes + 60_000_000) / total
    )


def test_another_run_under_a_new_name_is_one_more_row(tmp_path: Path) -> None:
    folder = FakeRun(exchanged=100).write(tmp_path / "small")
    names = [row.name for row in comparison(FakeRun().ledger(), ModelSizes(7_000_000), {"rank 1": folder})]
    assert names[-1] == "rank 1"


def test_the_summary_holds_every_documented_key_and_adds_up() -> None:
    ledger = FakeRun(failures={(2, 3): "no images"}).ledger()
    summary = communication_summary(ledger, ModelSizes(7_000_000, 5_160, 6_900_000), Bandwidth())
    assert summary["total_wire_bytes"] == summary["uplink_wire_bytes"] + summary["downlink_wire_bytes"]
    assert summary["total_wire_bytes"] == sum(row.wire_bytes for row in ledger.rows)
    assert summary["uplink_payload_bytes"] == naive_total(ledger, direction="uplink").payload_bytes
    assert summary["one_off_base_bytes"] == 10 * 6_900_000
    assert set(summary["comparison"][0]) == {
        "name",
        "payload_bytes_per_client_round",
        "total_bytes",
        "total_bytes_with_base",
        "saving",
        "saving_with_base",
        "measured",
    }
    assert set(summary["seconds_at_bandwidth"]) == {
        "uplink_mbps",
        "downlink_mbps",
        "uplink_seconds",
        "downlink_seconds",
    }
    assert json.loads(json.dumps(summary)) == summary


def test_an_empty_ledger_saves_nothing_and_takes_no_time() -> None:
    summary = communication_summary(Ledger(), ModelSizes(100, 4, 96), Bandwidth())
    assert summary["total_wire_bytes"] == summary["one_off_base_bytes"] == 0
    assert all(row["saving"] == row["saving_with_base"] == 0 for row in summary["comparison"])

"""The simulated clock: seconds of a round from bytes and local steps, deadlines, and what clients have."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_federation import NUM_CLIENTS, small_config
from small_run import lines_without_times

from federated.communication.ledger import COLUMNS, TIMED_COLUMNS, Ledger, Transfer
from federated.communication.simulated_clock import DeviceProfile, SimulatedClock, arrivals, broadcast_seconds
from federated.config.schema import ExperimentConfig
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.results.run_folder import RunFolder
from federated.rounds.client import client_app
from federated.rounds.client_devices import client_devices, read_profiles, simulated_clock
from federated.rounds.run import Run, build_run
from federated.rounds.server import serve
from models.errors import UserError

ROUNDS = 2
FEW = (f"federation.rounds={ROUNDS}", "output.report=false")
SLOW = (
    "clock.uplink_mbps={name: lognormal, median: 2, sigma: 1.0}",
    "clock.downlink_mbps={name: uniform, low: 5, high: 50}",
    "clock.latency_seconds={name: choice, values: [0.01, 0.2]}",
    "clock.seconds_per_step=0.5",
    "clock.compute_factor={name: lognormal, median: 1, sigma: 0.7}",
)


@pytest.fixture(scope="module")
def plain() -> Run:
    return build_run(small_config(*FEW))


def play(run: Run, folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], Ledger, ExperimentConfig]:
    run = dataclasses.replace(run, config=small_config(*FEW, *overrides))
    grid = InProcessGrid(client_app(run), run.num_clients)
    clients = {client_id: node_id_of(client_id) for client_id in range(run.num_clients)}
    with contextlib.closing(RunFolder(folder, run.config)) as run_folder:
        serve(grid, run, clients, run_folder)
    return lines_without_times(folder), Ledger.read_csv(folder / "communication.csv"), run.config


def profiles_of(config: ExperimentConfig) -> list[DeviceProfile]:
    assert config.clock is not None
    profile_of = client_devices(config, config.clock)
    return [profile_of(client_id) for client_id in range(NUM_CLIENTS)]


def naive_seconds(
    row: dict[str, str], rows: list[dict[str, str]], profile: DeviceProfile, steps: int
) -> float:
    """When a row's message arrived, from the text of the ledger: every step written out."""
    mine = [r for r in rows if all(r[k] == row[k] for k in ("server_round", "client_id", "phase"))]
    seconds = 0.0
    for each in mine:
        up = each["direction"] == "uplink"
        megabits = int(each["wire_bytes"]) * 8 / 1_000_000
        seconds += profile.latency_seconds + megabits / (profile.uplink_mbps if up else profile.downlink_mbps)
        if each is row:
            break
        if not up and each["phase"] == "train":
            seconds += steps * profile.seconds_per_step
    return seconds


def test_times_and_rounds_are_those_of_a_naive_clock(plain: Run, tmp_path: Path) -> None:
    lines, _, config = play(plain, tmp_path / "run", *SLOW)
    with (tmp_path / "run" / "communication.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    profiles, steps = profiles_of(config), config.client.local_steps
    assert len({profile.uplink_mbps for profile in profiles}) == NUM_CLIENTS
    slowest: dict[tuple[str, str], float] = {}
    for row in rows:
        expected = naive_seconds(row, rows, profiles[int(row["client_id"])], steps)
        assert float(row["simulated_seconds"]) == pytest.approx(expected, abs=1e-6)
        key = row["server_round"], row["phase"]
        slowest[key] = max(slowest.get(key, 0.0), float(row["simulated_seconds"]))
    total = 0.0
    for line in lines:
        of_round = [s for (number, _), s in slowest.items() if number == str(line["server_round"])]
        total += sum(of_round)
        assert line["simulated_seconds"] == pytest.approx(sum(of_round), abs=1e-5)
        assert line["simulated_seconds_total"] == pytest.approx(total, abs=1e-5)


def test_a_late_reply_is_refused_by_name_and_paid(plain: Run, tmp_path: Path) -> None:
    _, before, config = play(plain, tmp_path / "patient", *SLOW)
    ends = {
        (row.server_round, row.client_id): row.simulated_seconds or 0.0
        for row in before.rows
        if row.phase == "train" and row.direction == "uplink"
    }
    first = sorted(seconds for (number, _), seconds in ends.items() if number == 1)
    deadline = (first[-1] + first[-2]) / 2
    lines, ledger, _ = play(plain, tmp_path / "strict", *SLOW, f"clock.deadline_seconds={deadline}")
    late = {client_id for (number, client_id), seconds in ends.items() if number == 1 and seconds > deadline}
    assert len(late) == 1
    assert {entry["client_id"] for entry in lines[1]["failed"]} == late
    reason = lines[1]["failed"][0]["reason"]
    assert "late" in reason
    assert "clock.deadline_seconds" in reason
    assert lines[1]["simulated_seconds"] == pytest.approx(deadline, abs=1e-5)
    paid = [row for row in ledger.select(server_round=1, direction="uplink") if row.client_id in late]
    assert [row.status for row in paid] == ["ok"]
    assert paid[0].wire_bytes == next(
        row.wire_bytes for row in before.select(server_round=1, direction="uplink") if row.client_id in late
    )


def test_a_clock_changes_nothing_but_times(plain: Run, tmp_path: Path) -> None:
    lines, ledger, _ = play(plain, tmp_path / "timed", *SLOW)
    untimed, bare, _ = play(plain, tmp_path / "untimed")
    for line in lines:
        line.pop("simulated_seconds")
        line.pop("simulated_seconds_total")
    assert lines == untimed
    assert [dataclasses.replace(row, simulated_seconds=None) for row in ledger.rows] == list(bare.rows)
    header = (tmp_path / "untimed" / "communication.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == ",".join(COLUMNS)
    assert ledger.timed
    assert not bare.timed


def test_a_client_that_cannot_be_reached_is_named_and_costs_nothing(plain: Run, tmp_path: Path) -> None:
    lines, ledger, _ = play(plain, tmp_path / "run", "clock.availability=0.5")
    unreached = 0
    for line in lines[1:]:
        names = {entry["client_id"] for entry in line["failed"]}
        assert all("could not be reached" in entry["reason"] for entry in line["failed"])
        assert len(names) == len(line["failed"])
        assert not [row for row in ledger.select(server_round=line["server_round"]) if row.client_id in names]
        unreached += len(names)
    assert 0 < unreached < ROUNDS * NUM_CLIENTS


def test_the_server_waits_for_who_never_replies() -> None:
    def row(direction: str, seconds: float) -> Transfer:
        return Transfer(1, 0, direction, "train", "ok", 1, 1, 1, seconds)  # type: ignore[arg-type]

    replied, silent = [row("downlink", 1.0), row("uplink", 4.0)], [row("downlink", 1.0)]
    assert broadcast_seconds([replied], None, 100.0) == 4.0
    assert broadcast_seconds([replied, silent], None, 100.0) == 100.0
    assert broadcast_seconds([replied, silent], 3.0, 100.0) == 3.0
    assert broadcast_seconds([replied], 9.0, 100.0) == 4.0
    assert broadcast_seconds([], 9.0, 100.0) == 0.0


def test_a_clients_messages_follow_one_another() -> None:
    profile = DeviceProfile(uplink_mbps=8.0, downlink_mbps=16.0, latency_seconds=0.5)
    assert arrivals(profile, 2_000_000, 3.0, [1_000_000, 1_000_000]) == [1.5, 6.0, 7.5]
    assert arrivals(profile, 0, 0.0, []) == [0.5]


def test_distributions_have_their_medians_and_ranges() -> None:
    overrides = "partition.num_clients=2000", *SLOW
    config = small_config(*overrides)
    assert config.clock is not None
    profile_of = client_devices(config, config.clock)
    profiles = [profile_of(client_id) for client_id in range(2000)]
    logs = np.log([profile.uplink_mbps for profile in profiles])
    assert abs(np.mean(logs) - math.log(2)) < 5 / math.sqrt(2000)
    assert abs(np.std(logs) - 1.0) < 5 / math.sqrt(2 * 2000)
    down = np.array([profile.downlink_mbps for profile in profiles])
    assert 5 <= down.min() < 5.5
    assert 49.5 < down.max() <= 50
    assert {profile.latency_seconds for profile in profiles} == {0.01, 0.2}
    assert np.median([p.seconds_per_step for p in profiles]) == pytest.approx(0.5, rel=0.2)


def test_one_quantity_does_not_shift_the_others() -> None:
    one = profiles_of(small_config(*SLOW))
    other = profiles_of(small_config(*SLOW[1:], "clock.uplink_mbps=3"))
    assert [p.downlink_mbps for p in one] == [p.downlink_mbps for p in other]
    assert [p.latency_seconds for p in one] == [p.latency_seconds for p in other]
    assert {p.uplink_mbps for p in other} == {3.0}


def test_a_file_goes_first_and_says_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "profiles.csv"
    path.write_text("client_id,uplink_mbps,compute_factor\n2,1.5,\n0,,4\n", encoding="utf-8")
    drawn, listed = profiles_of(small_config(*SLOW)), profiles_of(small_config(*SLOW, f"clock.path={path}"))
    assert listed[2] == dataclasses.replace(drawn[2], uplink_mbps=1.5)
    assert listed[0] == dataclasses.replace(drawn[0], seconds_per_step=2.0)
    assert [listed[1], listed[3]] == [drawn[1], drawn[3]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("client_id,upload\n0,1\n", "upload"),
        ("uplink_mbps\n1\n", "client_id"),
        ("client_id,uplink_mbps\n0,1\n0,2\n", "line 3: client 0 has two lines"),
        ("client_id,uplink_mbps\n0,0\n", "line 2: uplink_mbps is 0"),
        ("client_id,availability\n0,nan\n", "line 2: availability"),
        ("client_id,uplink_mbps\n0,1,2\n", "line 2: it has more or fewer cells"),
        ("client_id,uplink_mbps\nzero,1\n", "line 2"),
        ("", "client_id"),
    ],
)
def test_a_file_that_is_no_table_of_profiles_is_refused_by_line(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "profiles.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_profiles(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("clock.uplink_mbps={name: gamma}", "clock.uplink_mbps needs the name of a distribution"),
        ("clock.uplink_mbps={name: lognormal, median: 3}", "clock.uplink_mbps.sigma"),
        ("clock.uplink_mbps={name: lognormal, median: 3, sigma: 1e9}", "uplink_mbps is from"),
        ("clock.availability=3", "clock.availability gives client 0 3"),
        ("clock.compute_factor={name: choice, values: []}", "clock.compute_factor.values"),
    ],
)
def test_a_wrong_clock_is_refused_before_anything_is_loaded(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        simulated_clock(small_config(override))
    assert words in str(error.value)


def test_a_clock_goes_on_where_a_commit_left_it() -> None:
    def clock() -> SimulatedClock:
        made = simulated_clock(small_config(*SLOW))
        assert made is not None
        return made

    rows = [
        Transfer(1, 0, "downlink", "train", "ok", 1, 1, 10**6),
        Transfer(1, 0, "uplink", "train", "ok", 1, 1, 10**6),
    ]
    whole, first, second = clock(), clock(), clock()
    for each in (whole, first):
        each._pass([each.timed(rows)])
        each.end_round(1)
    second.restore(first.state())
    for each in (whole, second):
        each._pass([each.timed([dataclasses.replace(row, server_round=2) for row in rows])])
    assert whole.end_round(2) == second.end_round(2)
    with pytest.raises(UserError, match="not a number of seconds"):
        second.restore("soon")


def test_a_timed_ledger_survives_its_file(tmp_path: Path) -> None:
    row = Transfer(1, 0, "downlink", "train", "ok", 1, 2, 3, 0.125)
    setup = Transfer(0, 0, "uplink", "setup", "ok", 1, 2, 3)
    ledger = Ledger([setup, row], timed=True)
    ledger.write_csv(tmp_path / "communication.csv")
    ledger.append(row)
    ledger.write_csv(tmp_path / "communication.csv")
    read = Ledger.read_csv(tmp_path / "communication.csv")
    assert read.rows == (setup, row, row)
    assert read.timed
    header = (tmp_path / "communication.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == ",".join(TIMED_COLUMNS)

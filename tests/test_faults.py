"""Faults on purpose: who is struck, what the server makes of it, and what is paid for it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, Metadata
from real_federation import NUM_CLIENTS, small_config
from small_run import lines_without_times

from benchmarks.unreliable import faulty, outcomes
from federated.communication.ledger import Ledger
from federated.config.config_files import load_config
from federated.config.faults_and_clock import FaultsSection
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.simulation import run_experiment
from federated.results.run_folder import RunFolder
from federated.rounds.build import client_settings, training_settings
from federated.rounds.checkpoint import latest_checkpoint, load_server_checkpoint
from federated.rounds.client import client_app
from federated.rounds.client_state import METHOD_MEMORY, recall
from federated.rounds.compatibility import build_aggregator
from federated.rounds.faults import FaultPlan, fault_plan
from federated.rounds.run import Run, build_run
from federated.rounds.server import serve
from models.errors import UserError
from models.state import State

FAULTS = tuple(FaultsSection.model_fields)
REASONS = {
    "dropout": "no reply within federation.timeout_seconds",
    "crash_before_training": "before it trained",
    "crash_after_training": "after it trained",
    "not_finite": "not finite|NaN|nan",
    "wrong_shape": "the payload's layout has digest",
    "lying_examples": "examples, but its shard has",
    "torn_payload": "cannot be read",
    "duplicate": "sent its update again; it counts once",
    "late": "its reply came late",
}
UPLINKS = {"dropout": [], "duplicate": ["ok", "ok"], **dict.fromkeys(FAULTS[1:3], ["failed"])}


@pytest.fixture(scope="module")
def clean() -> Run:
    return build_run(small_config("federation.rounds=2", "output.report=false"))


class LossyGrid(InProcessGrid):
    """Keeps back the replies of some clients to their training messages."""

    lost: Callable[[int, int], bool]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        return [reply for reply in replies if not self._is_lost(reply.metadata)]

    def _is_lost(self, told: Metadata) -> bool:
        client_id = told.src_node_id - node_id_of(0)
        return told.message_type == "train" and self.lost(int(told.group_id), client_id)


def with_faults(run: Run, *overrides: str, **shares: float) -> Run:
    given = [f"faults.{fault}={share}" for fault, share in shares.items()]
    given += ["clock.deadline_seconds=60"] if "late" in shares else []
    config = small_config("federation.rounds=2", "output.report=false", *given, *overrides)
    parts: dict[str, Any] = {"aggregator": build_aggregator(config), "clients": client_settings(config)}
    parts["training_settings"] = training_settings(config)
    return dataclasses.replace(run, config=config, **parts)


def play(
    run: Run, folder: Path, lost: Callable[[int, int], bool] = lambda server_round, client_id: False
) -> tuple[list[dict[str, Any]], Ledger, State, InProcessGrid]:
    grid = LossyGrid(client_app(run), run.num_clients)
    grid.lost = lost
    clients = {client_id: node_id_of(client_id) for client_id in range(run.num_clients)}
    with contextlib.closing(RunFolder(folder, run.config)) as run_folder:
        serve(grid, run, clients, run_folder)
    state = load_server_checkpoint(latest_checkpoint(folder)).server.state
    return lines_without_times(folder), Ledger.read_csv(folder / "communication.csv"), state, grid


def test_each_fault_strikes_its_share_and_at_most_one_strikes_a_message() -> None:
    shares = {fault: 0.02 * (1 + place) for place, fault in enumerate(FAULTS)}
    plan = FaultPlan(7, shares)
    num = 6000
    counts = collections.Counter(plan.of(r, c) for r in range(1, num // 10 + 1) for c in range(10))
    for fault, share in shares.items():
        assert abs(counts[fault] - num * share) < 5 * np.sqrt(num * share * (1 - share))


def test_who_is_struck_depends_on_seed_round_and_client_alone() -> None:
    plan = FaultPlan(0, {"dropout": 0.3, "duplicate": 0.3})
    struck = {(r, c): plan.of(r, c) for r in range(1, 20) for c in range(20)}
    again = FaultPlan(0, {"dropout": 0.3, "duplicate": 0.3})
    assert {key: again.of(*key) for key in reversed(struck)} == struck
    assert {key: FaultPlan(1, plan.shares).of(*key) for key in struck} != struck


def test_a_late_reply_needs_a_deadline() -> None:
    with pytest.raises(UserError, match=r"faults\.late=0\.1 .* set clock\.deadline_seconds"):
        load_config("quickstart", ["faults.late=0.1", "clock.latency_seconds=1"])


def test_shares_beyond_all_messages_are_refused() -> None:
    with pytest.raises(UserError, match=r"add up to 1\.2"):
        load_config("quickstart", ["faults.dropout=0.6", "faults.duplicate=0.6"])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_what_was_sent_is_paid(fault: str, clean: Run, tmp_path: Path) -> None:
    run = with_faults(clean, **{fault: 0.5})
    lines, ledger, _, _ = play(run, tmp_path / "run")
    plan, whole = fault_plan(run.config), {}
    for line in lines[1:]:
        server_round = line["server_round"]
        struck = {c for c in range(NUM_CLIENTS) if plan.of(server_round, c) == fault}
        assert 0 < len(struck) < NUM_CLIENTS
        assert {entry["client_id"] for entry in line["failed"]} == struck
        for entry in line["failed"]:
            assert entry["fault"] == fault
            assert entry["reason"].startswith(f"{fault} (on purpose): ")
            assert [word for word in REASONS[fault].split("|") if word in entry["reason"]]
        used = {int(c) for c, entry in line["clients"].items() if "train_loss" in entry}
        assert used == set(range(NUM_CLIENTS)) - (struck if fault != "duplicate" else set())
        for client_id in range(NUM_CLIENTS):
            of_client = {"server_round": server_round, "client_id": client_id, "phase": "train"}
            up = list(ledger.select(direction="uplink", **of_client))
            expected = UPLINKS.get(fault, ["ok"]) if client_id in struck else ["ok"]
            assert [row.status for row in up] == expected
            assert len(list(ledger.select(direction="downlink", **of_client))) == 1
            if client_id not in struck:
                whole[client_id] = up[0].payload_bytes
    if fault == "torn_payload":
        torn = [r for r in ledger.rows if r.direction == "uplink" and r.phase == "train" and not r.parameters]
        assert torn
        assert all(0 < row.wire_bytes < min(whole.values()) for row in torn)
    counted = json.loads((tmp_path / "run" / "summary.json").read_text())["failures"]
    assert counted == {fault: sum(len(line["failed"]) for line in lines)}
    total = sum(line["uplink_wire_bytes"] + line["downlink_wire_bytes"] for line in lines)
    assert total == ledger.total().wire_bytes


def test_a_reply_that_comes_twice_changes_nothing_of_the_model(clean: Run, tmp_path: Path) -> None:
    _, _, twice, _ = play(with_faults(clean, duplicate=1.0), tmp_path / "twice")
    _, _, once, _ = play(clean, tmp_path / "once")
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("fault", ["dropout", "crash_after_training", "not_finite", "late"])
def test_clients_that_fail_leave_the_round_to_the_others(fault: str, clean: Run, tmp_path: Path) -> None:
    run = with_faults(clean, **{fault: 0.5})
    _, _, found, _ = play(run, tmp_path / "faulty")
    plan = fault_plan(run.config)
    _, _, expected, _ = play(clean, tmp_path / "lossy", lost=lambda r, c: plan.of(r, c) is not None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fault", ["crash_before_training", "crash_after_training"])
def test_a_crash_leaves_the_client_without_what_it_learnt(fault: str, clean: Run, tmp_path: Path) -> None:
    settings = "client.scaffold=true", "client.optimizer=sgd", "federation.rounds=1"
    run = with_faults(clean, *settings, **{fault: 0.5})
    *_, grid = play(run, tmp_path / "run")
    struck = {c for c in range(NUM_CLIENTS) if fault_plan(run.config).of(1, c)}
    assert 0 < len(struck) < NUM_CLIENTS
    assert {c for c in range(NUM_CLIENTS) if recall(grid.context(c), METHOD_MEMORY) == {}} == struck


@pytest.mark.parametrize("uplink", ["fp16", "int8", "topk:0.1", "topk:0.25:ef+int8", "int4:sr"])
def test_spoilt_values_are_refused_whatever_the_codec(uplink: str, clean: Run, tmp_path: Path) -> None:
    run = with_faults(
        clean, f"communication.uplink={uplink}", "federation.rounds=1", not_finite=0.5, wrong_shape=0.5
    )
    lines, *_ = play(run, tmp_path / "run")
    assert [entry["client_id"] for entry in lines[1]["failed"]] == list(range(NUM_CLIENTS))
    assert lines[1]["skipped"]


@pytest.mark.parametrize("engine", ["engine.workers=2", "engine.batched_clients=2"])
def test_every_engine_strikes_the_same_clients(engine: str, tmp_path: Path) -> None:
    shares = [*(f"faults.{fault}=0.08" for fault in FAULTS), "clock.deadline_seconds=60"]
    found = {}
    for name in ("engine.workers=1", engine):
        config = small_config(
            *shares, "output.report=false", f"output.root={tmp_path}", f"output.name={name}", name
        )
        found[name] = run_experiment(config)
    ours, other = (lines_without_times(path) for path in found.values())
    assert [line["failed"] for line in ours] == [line["failed"] for line in other]
    assert sum(len(line["failed"]) for line in ours) > 2
    one, two = ((path / "communication.csv").read_text() for path in found.values())
    assert one == two
    if "workers" in engine:
        assert ours == other


def test_every_message_of_a_run_with_all_faults_has_one_outcome(clean: Run, tmp_path: Path) -> None:
    overrides = [*faulty(0.7), "federation.rounds=4"]
    config = small_config(*overrides, "output.report=false")
    play(dataclasses.replace(clean, config=config), tmp_path / "run")
    found = outcomes(config, tmp_path / "run")
    assert found.total() == NUM_CLIENTS * 4 + found["evaluated"]
    assert len(found) > 5
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines()
    struck = next(n for n, line in enumerate(lines) if json.loads(line)["failed"])
    forgotten = json.loads(lines[struck])
    forgotten["failed"].pop()
    lines[struck] = json.dumps(forgotten)
    metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="was planned"):
        outcomes(config, tmp_path / "run")

"""The Flower apps as Flower's own engines call them: same results as a run on the in-process engine."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.common import Message
from flwr.common.constant import SUPERLINK_NODE_ID

from federated.communication.ledger import Ledger
from federated.config.config_files import dump_config
from federated.engines import flower_apps
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.engines.simulation import run_experiment
from federated.methods import Limits
from federated.rounds.client import client_app
from federated.rounds.replies import UnreadableReplyError
from federated.rounds.run import build_run
from federated.rounds.run_strategy import build_strategy
from federated.rounds.strategy import LoRAStrategy
from tests.real_federation import same
from tests.small_run import lines_without_times, small_config

DIRECTIONS = ("uplink", "downlink")
ROOT = Path(__file__).parents[1]


class ShuffledIdentities(InProcessGrid):
    """A grid whose node ids say nothing about the client and come in another order, as Flower's do."""

    def get_node_ids(self) -> list[int]:
        return list(reversed(list(super().get_node_ids())))

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        return list(reversed(list(super().send_and_receive(messages, timeout=timeout))))


def test_the_components_that_flower_loads_are_these_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower runs the app from a copy of ``flower/`` alone, so its modules must need nothing beside them."""
    project = tomllib.loads((ROOT / "flower" / "pyproject.toml").read_text(encoding="utf-8"))
    monkeypatch.syspath_prepend(ROOT / "flower")
    apps = project["tool"]["flwr"]["app"]["components"]
    for component, expected in (("serverapp", flower_apps.server), ("clientapp", flower_apps.client)):
        module, _, name = apps[component].partition(":")
        assert getattr(importlib.import_module(module), name) is expected


def test_the_server_app_on_a_grid_with_arbitrary_node_order_gives_the_run_of_the_inprocess_engine(
    tmp_path: Path,
) -> None:
    config = small_config(
        tmp_path / "direct", overrides=["partition.num_clients=3", "federation.cohort_size=2"]
    )
    direct = run_experiment(config)
    run_config = {"config": dump_config(config), "run-dir": str(tmp_path / "app")}
    grid = ShuffledIdentities(flower_apps.client, 3, run_config=run_config)
    flower_apps.server(grid=grid, context=Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), run_config))
    lines, expected = lines_without_times(tmp_path / "app"), lines_without_times(direct)
    assert lines[1:] == expected[1:]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "app" / name).read_bytes() == (direct / name).read_bytes()
    theirs, ours = (Ledger.read_csv(path / "communication.csv") for path in (tmp_path / "app", direct))
    question = [row for row in theirs.rows if row.phase == "setup"]  # which client a node is
    assert [(row.client_id, row.direction) for row in question] == [
        (client_id, direction) for client_id in range(3) for direction in ("downlink", "uplink")
    ]
    assert sum(row.wire_bytes for row in question) == sum(lines[0][f"{d}_wire_bytes"] for d in DIRECTIONS)
    assert theirs.rows[len(question) :] == ours.rows


def test_limits_of_the_configuration_and_sizes_of_the_shards_reach_the_strategy(tmp_path: Path) -> None:
    overrides = ["aggregation.max_update_ratio=7", "aggregation.max_examples_ratio=11"]
    experiment = build_run(small_config(tmp_path, overrides=overrides))
    strategy = build_strategy(experiment, {i: 1000 + i for i in range(experiment.num_clients)})
    assert strategy._limits == Limits(update_ratio=7, examples_ratio=11)
    for client_id, shard in enumerate(experiment.shards):
        strategy._shard_sizes.check_train(client_id, len(shard.train))
        strategy._shard_sizes.check_test(client_id, len(shard.test))
        with pytest.raises(UnreadableReplyError, match=f"its shard has {len(shard.train)}"):
            strategy._shard_sizes.check_train(client_id, len(shard.train) + 1)
        with pytest.raises(UnreadableReplyError, match=f"its shard has {len(shard.test)}"):
            strategy._shard_sizes.check_test(client_id, len(shard.test) + 1)


def test_runs_in_one_process_take_turns_without_meeting_each_other(tmp_path: Path) -> None:
    """Each app belongs to the run that it was made of, not to the process."""

    def begin(rank: int) -> tuple[LoRAStrategy, InProcessGrid]:
        run = build_run(small_config(tmp_path, overrides=[f"lora.r={rank}", "evaluation.clients=false"]))
        strategy = build_strategy(run, {i: node_id_of(i) for i in range(run.num_clients)})
        return strategy, InProcessGrid(client_app(run), run.num_clients)

    def play(strategy: LoRAStrategy, grid: InProcessGrid, server_round: int) -> None:
        messages = strategy.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        assert not strategy.record.failed

    alone, first, second = begin(2), begin(2), begin(4)
    for server_round in (1, 2):
        play(*alone, server_round)
    for server_round in (1, 2):
        play(*first, server_round)
        play(*second, server_round)
    assert same(first[0].server_state.state, alone[0].server_state.state)
    assert {name: t.shape for name, t in second[0].server_state.state.items()} != {
        name: t.shape for name, t in first[0].server_state.state.items()
    }

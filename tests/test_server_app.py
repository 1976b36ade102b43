"""The Flower apps as Flower's own engines call them: same results as a run on the in-process engine."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.common import Message
from flwr.common.constant import SUPERLINK_NODE_ID

from federated.communication.ledger import Ledger
from federated.config.schema import dump_config
from federated.engines.inprocess import InProcessGrid
from federated.engines.simulation import run_experiment
from federated.methods import Limits
from federated.rounds.client import app as client_app
from federated.rounds.replies import UnreadableReplyError
from federated.rounds.run import build_experiment
from federated.rounds.server import app as server_app
from federated.rounds.server import build_strategy
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
    for component, expected in (("serverapp", server_app), ("clientapp", client_app)):
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
    grid = ShuffledIdentities(client_app, 3, run_config=run_config)
    server_app(grid=grid, context=Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), run_config))
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
    experiment = build_experiment(small_config(tmp_path, overrides=overrides))
    strategy = build_strategy(experiment, {i: 1000 + i for i in range(experiment.num_clients)})
    assert strategy._limits == Limits(update_ratio=7, examples_ratio=11)
    for client_id, shard in enumerate(experiment.shards):
        strategy._shard_sizes.check_train(client_id, len(shard.train))
        strategy._shard_sizes.check_test(client_id, len(shard.test))
        with pytest.raises(UnreadableReplyError, match=f"its shard has {len(shard.train)}"):
            strategy._shard_sizes.check_train(client_id, len(shard.train) + 1)
        with pytest.raises(UnreadableReplyError, match=f"its shard has {len(shard.test)}"):
            strategy._shard_sizes.check_test(client_id, len(shard.test) + 1)

"""What ``fedlora info`` foresees for every round is what the ledger of the run then says."""

from __future__ import annotations

from pathlib import Path

import pytest

from federated.communication.ledger import Ledger
from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from federated.methods.registry import AGGREGATORS
from federated.tools.inspection import closing_note, describe_run, rounds_table

SMALL = (
    "federation.rounds=4",
    "federation.cohort_size=2",
    "partition.num_clients=4",
    "partition.name=iid",
    "partition.options={}",
    "client.local_steps=1",
    "client.batch_size=4",
    "data.max_train_samples=80",
    "data.max_test_samples=20",
    "lora.r=4",
    "evaluation.every=4",
    "evaluation.aggregation_error_every=0",
    "output.report=false",
)
WAYS = {
    "fedavg": [],
    "flora": ["aggregation.name=flora", "evaluation.clients_every=2"],
    "ffa, int8, fedadam": [
        "aggregation.name=ffa",
        "communication.uplink=int8",
        "aggregation.server_optimizer.name=fedadam",
    ],
    "hetlora with ranks": ["aggregation.name=hetlora", "client.ranks=[2,4]"],
    "scaffold, top-k": ["client.scaffold=true", "communication.uplink=topk:0.1"],
}
OTHERS = sorted(AGGREGATORS.keys() - {"fedavg", "flora", "ffa", "hetlora"})


def check(folder: Path, overrides: list[str]) -> None:
    config = load_config("quickstart", [*SMALL, *overrides, f"output.root={folder}"])
    planned = describe_run(config)
    ledger = Ledger.read_csv(run_experiment(config) / "communication.csv")
    assert len(planned.rounds) == config.federation.rounds
    for each in planned.rounds:
        of_round = {"server_round": each.server_round}
        for direction, values, num_bytes in (
            ("downlink", each.downlink_values, each.downlink_bytes),
            ("uplink", each.uplink_values, each.uplink_bytes),
        ):
            total = ledger.total(**of_round, direction=direction, phase="train")
            assert (each.server_round, total.parameters, total.payload_bytes) == (
                each.server_round,
                values,
                num_bytes,
            )
        evaluation = ledger.total(**of_round, direction="downlink", phase="evaluate")
        assert evaluation.payload_bytes == each.evaluation_bytes
    assert planned.total_bytes == ledger.total().payload_bytes


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_of_every_round_are_those_of_the_run(way: str, tmp_path: Path) -> None:
    check(tmp_path, WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_bytes_of_every_round_are_those_of_the_run_for_other_aggregators(
    name: str, tmp_path: Path
) -> None:
    check(tmp_path, [f"aggregation.name={name}"])


def test_rounds_that_send_the_same_share_a_row_and_the_sum_goes_on() -> None:
    description = describe_run(load_config("quickstart", ["federation.rounds=30"]))
    rows = rounds_table(description.rounds).rows
    assert [row[0] for row in rows] == ["1", "2–29", "30"]
    assert rows[0][2] == "10"  # all clients are new
    assert rows[1][2] == "0"
    assert description.total_bytes == sum(each.total_bytes for each in description.rounds)
    assert "30 rounds" in closing_note(description)


def test_what_is_added_to_an_aggregator_is_named() -> None:
    options = ["client.scaffold=true", "client.proximal_mu=0.1", "federation.rounds=1"]
    assert describe_run(load_config("quickstart", options)).method == "fedavg + SCAFFOLD + FedProx mu=0.1"
    options = ["aggregation.server_optimizer.name=fedyogi", "aggregation.name=ffa", "federation.rounds=1"]
    assert describe_run(load_config("quickstart", options)).method == "ffa + fedyogi"
    falling = describe_run(load_config("quickstart", ["aggregation.name=hetlora", "client.ranks=[4,8]"]))
    assert falling.method == "hetlora + client ranks 4, 8"

"""The reported aggregation error against a float64 oracle of what clients trained, whatever the codecs."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from real_federation import RealFederation, small_config, with_method

from federated.rounds.client_ranks import mixed_ranks, rank_of, scaling_at
from federated.rounds.compatibility import build_aggregator
from federated.rounds.run import Run, build_run
from lora.adapters import factor_pairs
from models.state import State

COHORTS = ((0, 1, 2, 3), (1, 2), (0, 1, 3))


@pytest.fixture(scope="module")
def base() -> Run:
    return build_run(small_config())


def coded(base: Run, method: str, uplink: str, downlink: str, **client: Any) -> Run:
    codecs = {"uplink": uplink, "downlink": downlink}
    communication = base.config.communication.model_copy(update=codecs)
    config = base.config.model_copy(update={"communication": communication})
    return with_method(replace(base, config=config), method, **client)


def products(experiment: Run, state: State, rank: int | None = None) -> State:
    """s B A of every module in float64."""
    scaling = scaling_at(experiment, rank)
    private = set(experiment.aggregator.private(state))
    model = experiment.aggregator.client.to_model({n: t for n, t in state.items() if n not in private})
    return {
        pair.module: scaling[pair.module] * model[pair.b].double() @ model[pair.a].double()
        for pair in factor_pairs(model)
    }


def true_error(fed: RealFederation, before: State, cohort: tuple[int, ...]) -> float:
    """||global - ideal|| / ||ideal|| with the clients' own states, before any codec touched them.

    The ideal is the global model plus the weighted changes where clients hold truncations of it.
    """
    experiment = fed.experiment
    total = sum(experiment.num_examples(i) for i in cohort)
    ideal: dict[str, torch.Tensor] = {}
    for i in cohort:
        rank, weight = rank_of(experiment, i), experiment.num_examples(i) / total
        trained = products(experiment, fed.trained[i], rank)
        if mixed_ranks(experiment):
            started = products(experiment, fed.held[i], rank)
            whole = products(experiment, before)
            trained = {m: whole[m] + trained[m] - started[m] for m in trained}
        for module, product in trained.items():
            ideal[module] = ideal.get(module, torch.zeros_like(product)) + weight * product
    found = products(experiment, fed.strategy.server_state.state)
    gap = sum(float((found[m] - ideal[m]).square().sum()) for m in ideal)
    return math.sqrt(gap / sum(float(product.square().sum()) for product in ideal.values()))


@pytest.mark.parametrize(
    ("method", "uplink", "downlink", "tolerance"),
    [
        ("fedavg", "fp32", "fp32", 1e-4),
        ("ffa", "fp32", "int8", 1e-4),
        ("rolora", "fp32", "int4:sr", 1e-4),
        ("fed_sb", "fp32", "int8", 1e-4),
        ("fedavg", "int4", "fp32", 0.05),
        ("fedsvd", "int4:sr", "int8", 0.05),
        ("fedavg", "topk:0.25:ef", "fp32", 0.1),
        ("dual", "int4", "int8", 0.05),
    ],
)
def test_the_reported_error_is_that_to_what_clients_trained(
    method: str, uplink: str, downlink: str, tolerance: float, base: Run
) -> None:
    check(coded(base, method, uplink, downlink), tolerance)


@pytest.mark.parametrize(
    ("method", "uplink", "downlink", "tolerance"),
    [("flexlora", "int4", "int8", 0.05), ("hetlora", "fp32", "int8", 1e-3)],
)
def test_the_reported_error_is_that_to_what_clients_trained_with_mixed_ranks(
    method: str, uplink: str, downlink: str, tolerance: float, base: Run
) -> None:
    check(coded(base, method, uplink, downlink, ranks=[4, 2, 1]), tolerance)


def check(experiment: Run, tolerance: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fed = RealFederation(experiment, patch)
        for server_round, cohort in enumerate(COHORTS, start=1):
            before = fed.strategy.server_state.state
            fed.play(server_round, cohort)
            assert not fed.strategy.record.failed
            reported = fed.strategy.record.metrics["aggregation_error"]
            assert reported == pytest.approx(true_error(fed, before, cohort), rel=tolerance, abs=1e-6)


@pytest.mark.parametrize(("uplink", "downlink"), [("fp32", "int8"), ("int4", "fp32")])
def test_an_exact_rule_with_a_lossy_codec_is_not_called_exact(
    uplink: str, downlink: str, base: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lossless = coded(base, "ffa", "fp32", "fp32").config
    config = coded(base, "ffa", uplink, downlink).config
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build_aggregator(lossless)
        assert not caplog.messages
        build_aggregator(config)
    key = f"communication.uplink={uplink}" if uplink != "fp32" else f"communication.downlink={downlink}"
    assert any("exact only without loss" in message and key in message for message in caplog.messages)

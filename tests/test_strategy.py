"""The strategy against replies that clients might send: good ones, bad ones, none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from aggregator_simulation import adapter, scaling_of
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from federated.aggregators import aggregator_from_name
from federated.codecs import codec_from_name
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.messages import CLIENT_ID, NUM_EXAMPLES, RANK, SERVER_ROUND, TRAIN_LOSS, write_state
from federated.payload import ARRAYS, CONFIG, FLAT, METRICS
from federated.strategy import LoRAStrategy, Ranks, sample_cohort
from models.state import State

NUM_CLIENTS = 4
Spoil = Callable[[RecordDict], None]


@pytest.fixture(autouse=True)
def _flower_process() -> None:
    """Flower's messages need a process that knows its run."""
    InProcessGrid(lambda message, context: message, NUM_CLIENTS)  # type: ignore[arg-type]


def strategy(name: str = "fedavg", **options: object) -> LoRAStrategy:
    aggregator = aggregator_from_name(name, {})
    return LoRAStrategy(
        aggregator=aggregator,
        server_state=aggregator.init(adapter(dtype=torch.float32), scaling_of(4)),
        clients={i: node_id_of(i) for i in range(NUM_CLIENTS)},
        seed=0,
        cohort_size=NUM_CLIENTS,
        **options,  # type: ignore[arg-type]
    )


def ask(server: LoRAStrategy, server_round: int = 1) -> dict[int, Message]:
    messages = server.configure_train(server_round, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
    return {message.metadata.dst_node_id - node_id_of(0): message for message in messages}


def reply(
    request: Message, state: State, *, num_examples: float = 10, loss: float = 1.0, rank: int = 0
) -> Message:
    content = write_state(state, codec_from_name("fp32"), np.random.default_rng(0), {SERVER_ROUND: 1})
    client_id = request.metadata.dst_node_id - node_id_of(0)
    content[METRICS] = MetricRecord(
        {CLIENT_ID: client_id, NUM_EXAMPLES: num_examples, TRAIN_LOSS: loss, RANK: rank}
    )
    return answer(request, content)


def answer(request: Message, content: RecordDict | Error) -> Message:
    message = Message(content, reply_to=request)
    message.metadata.__dict__["_src_node_id"] = request.metadata.dst_node_id
    return message


def ones(server: LoRAStrategy, scale: float = 1.0) -> State:
    return {name: torch.full_like(t, scale) for name, t in server.server_state.state.items()}


def failed(server: LoRAStrategy) -> dict[int, str]:
    return {failure.client_id: failure.reason for failure in server.record.failed}


# ---- good replies


def test_cohorts_depend_on_seed_and_round_alone() -> None:
    assert sample_cohort(3, 2, 50, 10) == sample_cohort(3, 2, 50, 10)
    assert sample_cohort(3, 2, 50, 10) != sample_cohort(3, 3, 50, 10)
    assert sample_cohort(3, 2, 50, 10) == sorted(set(sample_cohort(3, 2, 50, 10)))


def test_a_delta_is_added_to_what_the_client_received_and_weighted_by_examples() -> None:
    server = strategy()
    before, requests = dict(server.server_state.state), ask(server)
    replies = [reply(requests[i], ones(server, i), num_examples=n) for i, n in enumerate((10, 30, 20, 40))]
    server.aggregate_train(1, reversed(replies))
    wanted = 0.3 * 1 + 0.2 * 2 + 0.4 * 3
    for name, tensor in server.server_state.state.items():
        torch.testing.assert_close(tensor, before[name] + wanted)
    assert server.record.metrics["train_loss"] == 1.0
    assert list(server.record.clients) == [0, 1, 2, 3]
    assert not server.record.failed


# ---- bad ones: named, and the round goes on


def no_metrics(content: RecordDict) -> None:
    del content[METRICS]


def text_for_a_number(content: RecordDict) -> None:
    content[METRICS] = MetricRecord({NUM_EXAMPLES: [1, 2], TRAIN_LOSS: 1.0, RANK: 0})


def another_dtype(content: RecordDict) -> None:
    content[ARRAYS] = ArrayRecord({FLAT: Array(np.zeros(3, dtype=np.int16))})


def not_an_array(content: RecordDict) -> None:
    array = Array(np.zeros(3, dtype=np.float32))
    array.data = b"this is no npy file"
    content[ARRAYS] = ArrayRecord({FLAT: array})


def unknown_codec(content: RecordDict) -> None:
    content[CONFIG] = ConfigRecord({**content.config_records[CONFIG], "payload-codec": "int3"})


def no_config(content: RecordDict) -> None:
    del content[CONFIG]


@pytest.mark.parametrize(
    "spoil", [no_metrics, text_for_a_number, another_dtype, not_an_array, unknown_codec, no_config]
)
def test_a_reply_that_cannot_be_read_is_named_and_the_round_goes_on(spoil: Spoil) -> None:
    server = strategy()
    requests = ask(server)
    bad = reply(requests[2], ones(server))
    spoil(bad.content)
    server.aggregate_train(1, [reply(requests[0], ones(server)), bad, reply(requests[3], ones(server))])
    assert set(failed(server)) == {1, 2}
    assert failed(server)[1] == "no reply within federation.timeout_seconds"
    assert failed(server)[2]
    assert sorted(server.record.clients) == [0, 3]
    assert not server.record.skipped


def test_a_client_cannot_bring_a_layout_of_its_own() -> None:
    server = strategy()
    requests = ask(server)
    foreign = {"head.bias": torch.ones(3), "something.else": torch.ones(2)}
    content = write_state(
        foreign, codec_from_name("fp32"), np.random.default_rng(0), {SERVER_ROUND: 1}, send_layout=True
    )
    content[METRICS] = MetricRecord({NUM_EXAMPLES: 1, TRAIN_LOSS: 1.0, RANK: 0})
    server.aggregate_train(1, [answer(requests[1], content), reply(requests[0], ones(server))])
    assert "differs from the expected layout" in failed(server)[1]
    assert sorted(server.record.clients) == [0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_examples": 0}, "has 0 training examples"),
        ({"num_examples": -4}, "has -4 training examples"),
        ({"loss": float("nan")}, "the mean loss of its local steps is nan"),
        ({"num_examples": float("nan")}, "cannot convert float NaN"),
    ],
)
def test_unusable_numbers_are_named(options: dict[str, float], reason: str) -> None:
    server = strategy()
    requests = ask(server)
    server.aggregate_train(
        1,
        [reply(requests[0], ones(server)), reply(requests[1], ones(server), **options)],  # type: ignore[arg-type]
    )
    assert reason in failed(server)[1]
    assert sorted(server.record.clients) == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_named(value: float) -> None:
    server = strategy()
    requests = ask(server)
    bad = reply(requests[1], ones(server))
    flat = bad.content.array_records[ARRAYS][FLAT].numpy().copy()
    flat[5] = value
    bad.content[ARRAYS] = ArrayRecord({FLAT: Array(flat)})
    server.aggregate_train(1, [reply(requests[0], ones(server)), bad])
    assert f"holds {value}" in failed(server)[1]
    assert all(bool(t.isfinite().all()) for t in server.server_state.state.values())


def test_the_same_reply_twice_counts_once_and_two_different_ones_not_at_all() -> None:
    server = strategy()
    before, requests = dict(server.server_state.state), ask(server)
    replies = [reply(requests[0], ones(server)), reply(requests[0], ones(server))]
    replies += [reply(requests[1], ones(server)), reply(requests[1], ones(server, 9.0))]
    server.aggregate_train(1, replies)
    assert "again" in failed(server)[0]
    assert "2 different updates" in failed(server)[1]
    for name, tensor in server.server_state.state.items():
        torch.testing.assert_close(tensor, before[name] + 1)


def test_a_reply_that_nobody_asked_for_is_ignored() -> None:
    server = strategy()
    requests = ask(server)
    stranger = reply(requests[0], ones(server, 50.0))
    stranger.metadata.__dict__["_src_node_id"] = 999_999
    server.aggregate_train(1, [stranger, reply(requests[1], ones(server))])
    assert sorted(server.record.clients) == [1]


def test_a_round_without_a_usable_update_is_skipped_and_said_so() -> None:
    server = strategy()
    before, requests = dict(server.server_state.state), ask(server)
    replies = [
        answer(requests[0], Error(0, "out of memory")),
        reply(requests[1], ones(server), num_examples=0),
    ]
    assert server.aggregate_train(1, replies) == (None, None)
    assert server.record.skipped
    assert set(failed(server)) == {0, 1, 2, 3}
    assert failed(server)[0] == "out of memory"
    assert server.server_state.server_round == 1
    assert all(torch.equal(t, before[n]) for n, t in server.server_state.state.items())
    ask(server, 2)
    assert server.record.server_round == 2


def test_an_evaluation_that_cannot_be_read_is_named() -> None:
    server = strategy(evaluates=lambda server_round: [0, 1])
    messages = list(
        server.configure_evaluate(1, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
    )
    good = RecordDict({METRICS: MetricRecord({CLIENT_ID: 0, NUM_EXAMPLES: 7, "accuracy": 0.5, "loss": 1.5})})
    server.aggregate_evaluate(1, [answer(messages[0], good), answer(messages[1], RecordDict())])
    assert server.record.clients == {0: {"eval_examples": 7, "accuracy": 0.5, "eval_loss": 1.5}}
    assert set(failed(server)) == {1}


# ---- ranks


def ranked(**options: object) -> LoRAStrategy:
    return strategy(
        "hetlora", ranks=Ranks(lambda client_id: 3, lambda rank: scaling_of(rank or 4)), **options
    )


def test_a_client_goes_on_with_the_rank_that_it_pruned_itself_to() -> None:
    server = ranked()
    requests = ask(server)
    start = server._start_of(0).state
    server.aggregate_train(
        1, [reply(requests[0], {n: torch.zeros_like(t) for n, t in start.items()}, rank=2)]
    )
    assert server.current_ranks == {0: 2}
    config = ask(server, 2)[0].content.config_records[CONFIG]
    assert config[RANK] == 2


@pytest.mark.parametrize("rank", [4, -1])
def test_a_client_cannot_give_itself_a_higher_rank(rank: int) -> None:
    server = ranked()
    requests = ask(server)
    start = server._start_of(0).state
    server.aggregate_train(1, [reply(requests[0], start, rank=rank), reply(requests[1], start)])
    assert f"asks for rank {rank} after 3" in failed(server)[0]
    assert server.current_ranks == {}


def test_an_update_of_another_rank_than_the_clients_is_named_and_the_round_goes_on() -> None:
    server = ranked()
    requests = ask(server)
    start = server._start_of(0).state
    narrow = {n: t[:2] if "_A." in n else t[:, :2] if "_B." in n else t for n, t in start.items()}
    server.aggregate_train(1, [reply(requests[0], narrow), reply(requests[1], start)])
    assert "layout" in failed(server)[0]
    assert sorted(server.record.clients) == [1]


def test_a_refused_update_does_not_change_a_rank() -> None:
    server = ranked()
    requests = ask(server)
    server.aggregate_train(1, [reply(requests[0], server._start_of(0).state, rank=2, num_examples=0)])
    assert server.current_ranks == {}

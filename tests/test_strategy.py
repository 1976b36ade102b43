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

from federated.communication.codec import codec_from_name
from federated.communication.messages import (
    CLIENT_ID,
    NUM_EXAMPLES,
    NUM_VALUES,
    RANK,
    SERVER_ROUND,
    TRAIN_LOSS,
    write_state,
)
from federated.communication.payload import ARRAYS, CONFIG, FLAT, METRICS
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.methods import aggregator_from_name
from federated.methods.scaffold import with_scaffold
from federated.rounds.replies import ShardSizes, read_training_reply
from federated.rounds.strategy import LoRAStrategy, Ranks, sample_cohort
from models.state import State, num_values

NUM_CLIENTS = 4
Spoil = Callable[[RecordDict], None]


@pytest.fixture(autouse=True)
def _flower_process() -> None:
    """Flower's messages need a process that knows its run."""
    InProcessGrid(lambda message, context: message, NUM_CLIENTS)  # type: ignore[arg-type]


def strategy(name: str = "fedavg", *, scaffold: bool = False, **options: object) -> LoRAStrategy:
    aggregator = aggregator_from_name(name, {})
    if scaffold:
        aggregator = with_scaffold(aggregator, NUM_CLIENTS)
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
    told = {SERVER_ROUND: request.content.config_records[CONFIG][SERVER_ROUND]}
    content = write_state(state, codec_from_name("fp32"), np.random.default_rng(0), told)  # type: ignore[arg-type]
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
        ({"loss": 1e300}, "the mean loss of its local steps is 1e+300"),
        ({"loss": -1e30}, "the mean loss of its local steps is -1e+30"),
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


def test_what_a_client_writes_of_its_failure_is_made_fit_to_be_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An error's reason, and text in a reply that is quoted when it is refused."""
    server = strategy()
    requests, nasty = ask(server), "\x1b[2J\x1b]0;owned\x07\u202e" + "x" * 100_000
    bad = reply(requests[1], ones(server))
    config = {**bad.content.config_records[CONFIG], "payload-codec": nasty}
    bad.content[CONFIG] = ConfigRecord(config)  # type: ignore[arg-type]
    late = reply(requests[2], ones(server))
    late.content[CONFIG] = ConfigRecord({SERVER_ROUND: nasty})
    empty = answer(requests[3], Error(0))
    server.aggregate_train(1, [answer(requests[0], Error(0, nasty)), bad, late, empty])
    assert set(failed(server)) == {0, 1, 2, 3}
    for text in (*failed(server).values(), *(record.getMessage() for record in caplog.records)):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
        assert len(text) < 700
    assert failed(server)[3] == "no reason given"


def test_an_evaluation_that_cannot_be_read_is_named() -> None:
    server = strategy(evaluates=lambda server_round: [0, 1])
    messages = list(
        server.configure_evaluate(1, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
    )
    good = RecordDict({METRICS: MetricRecord({CLIENT_ID: 0, NUM_EXAMPLES: 7, "accuracy": 0.5, "loss": 1.5})})
    server.aggregate_evaluate(1, [answer(messages[0], good), answer(messages[1], RecordDict())])
    assert server.record.clients == {0: {"eval_examples": 7, "accuracy": 0.5, "eval_loss": 1.5}}
    assert set(failed(server)) == {1}


# ---- what one client says of itself


@pytest.mark.parametrize("scaffold", [False, True])
@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "ternary", "topk:0.1", "topk:0.25:ef+int8"])
def test_the_values_of_a_reply_are_those_that_travel(name: str, scaffold: bool) -> None:
    """Values that a sparse codec leaves out are zeros where it is decoded; normal ones are never zero."""
    server = strategy(uplink=codec_from_name(name), scaffold=scaffold)
    (request, other) = (ask(server)[i] for i in (0, 1))
    layout = server._start_of(0).reply_layout
    generator = torch.Generator().manual_seed(1)
    state = {n: torch.randn(shape, generator=generator) for n, shape in layout}
    told = {SERVER_ROUND: 1}
    codec = codec_from_name(name)
    content = write_state(state, codec, np.random.default_rng(0), told)  # type: ignore[arg-type]
    sparse = name.startswith("topk")
    # the fp32 form of the same selection, for a quantiser rounds small values to zero
    exact = codec_from_name(name.partition("+")[0]) if sparse else codec
    decoded = exact.decode(exact.encode(state, np.random.default_rng(0)), layout)
    sent = sum(int(t.count_nonzero()) for t in decoded.values()) if sparse else num_values(layout)
    content[CONFIG] = ConfigRecord({**content.config_records[CONFIG], NUM_VALUES: 10**12})
    assert server.num_values(answer(request, content)) == sent
    assert server.num_values(reply(other, ones(server))) == (sent if name == "fp32" and not scaffold else 0)
    assert server.num_values(answer(request, RecordDict())) == 0


def test_a_reply_of_an_earlier_round_is_named_and_does_not_count() -> None:
    server = strategy()
    late = reply(ask(server, 1)[1], ones(server, 5.0))
    server.aggregate_train(1, [])
    before, requests = dict(server.server_state.state), ask(server, 2)
    server.aggregate_train(2, [reply(requests[0], ones(server)), late])
    assert "a message of round 1" in failed(server)[1]
    assert [failure.client_id for failure in server.record.failed] == [1, 2, 3]
    assert sorted(server.record.clients) == [0]
    assert all(torch.equal(t, before[name] + 1) for name, t in server.server_state.state.items())


def test_a_late_reply_does_not_keep_its_client_from_answering() -> None:
    server = strategy()
    late = reply(ask(server, 1)[1], ones(server, 5.0))
    server.aggregate_train(1, [])
    requests = ask(server, 2)
    server.aggregate_train(2, [late, *(reply(requests[i], ones(server)) for i in range(4))])
    assert sorted(server.record.clients) == [0, 1, 2, 3]
    assert set(failed(server)) == {1}


@pytest.mark.parametrize("lie", ["message id", "message type"])
def test_a_reply_must_be_to_the_message_that_was_sent(lie: str) -> None:
    """The content says the right round, as a client that is late in the same round may."""
    server = strategy()
    requests = ask(server)
    for client_id, request in requests.items():
        request.metadata.__dict__["_message_id"] = f"message {client_id}"
    wrong = reply(requests[1], ones(server, 7.0))
    wrong.metadata.__dict__.update(
        {"_reply_to_message_id": "message 0"} if lie == "message id" else {"_message_type": "evaluate"}
    )
    server.aggregate_train(1, [reply(requests[0], ones(server)), wrong])
    assert "not to the one that it was sent in this round" in failed(server)[1]
    assert sorted(server.record.clients) == [0]


def test_an_error_of_an_earlier_round_is_no_failure_of_this_one() -> None:
    server = strategy()
    late = answer(ask(server, 1)[1], Error(0, "out of memory"))
    server.aggregate_train(1, [])
    requests = ask(server, 2)
    server.aggregate_train(2, [late, *(reply(requests[i], ones(server)) for i in range(4))])
    assert sorted(server.record.clients) == [0, 1, 2, 3]
    assert "earlier round" in failed(server)[1]


def evaluation(request: Message, **metrics: float) -> Message:
    record = MetricRecord({CLIENT_ID: 0, NUM_EXAMPLES: 7, "accuracy": 0.5, "loss": 1.5, **metrics})
    return answer(request, RecordDict({METRICS: record}))


def evaluated(server: LoRAStrategy, server_round: int = 1) -> list[Message]:
    return list(
        server.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), None)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "metrics",
    [
        {"train_loss": 0.0},
        {"num_examples": 10**9},
        {"eval_examples": 10**9},
        {"\x1b[2J": 1.0},
        {"accuracy": float("nan")},
        {"accuracy": 1e6},
        {"image_to_text_recall_at_5": -0.5},
        {"loss": float("inf")},
        {NUM_EXAMPLES: 0},
        {NUM_EXAMPLES: 10**12},
    ],
)
def test_an_evaluation_cannot_write_what_is_not_its_own(metrics: dict[str, float]) -> None:
    sizes = ShardSizes(test=lambda client_id: 7)
    server = strategy(evaluates=lambda server_round: [0, 1], shard_sizes=sizes)
    requests = ask(server)
    server.aggregate_train(1, [reply(requests[i], ones(server)) for i in range(4)])
    trained = {client_id: dict(entry) for client_id, entry in server.record.clients.items()}
    messages = evaluated(server)
    server.aggregate_evaluate(1, [evaluation(messages[0], **metrics), evaluation(messages[1])])
    assert server.record.clients[0] == trained[0]
    assert server.record.clients[1] == {**trained[1], "eval_examples": 7, "accuracy": 0.5, "eval_loss": 1.5}
    assert set(failed(server)) == {0}
    assert "\x1b" not in failed(server)[0]


def test_an_evaluation_of_an_earlier_round_and_a_second_one_are_named() -> None:
    server = strategy(evaluates=lambda server_round: [0, 1])
    ask(server, 1)
    late = evaluated(server, 1)
    ask(server, 2)
    now = evaluated(server, 2)
    replies = [evaluation(late[0], accuracy=0.9), evaluation(now[1]), evaluation(now[1], accuracy=0.7)]
    server.aggregate_evaluate(2, replies)
    assert list(server.record.clients) == [1]
    assert server.record.clients[1]["accuracy"] == 0.5
    assert "earlier round" in failed(server)[0]
    assert "again" in failed(server)[1]


def test_an_update_knows_what_its_client_changed() -> None:
    server = strategy()
    sent = {name: 0.5 * value for name, value in ones(server).items()}
    content, start = reply(ask(server)[0], sent).content, server._start_of(0)
    update = read_training_reply(0, content, codec_from_name("fp32"), start).update
    for name, change in sent.items():
        torch.testing.assert_close(update.delta[name], change)
        torch.testing.assert_close(update.state[name], start.state[name] + change)
    unchanged = update.with_delta({name: torch.zeros_like(change) for name, change in sent.items()})
    assert all(torch.equal(unchanged.state[name], start.state[name]) for name in sent)


def test_more_examples_than_the_shard_has_are_refused_and_fewer_are_not() -> None:
    server = strategy(shard_sizes=ShardSizes(train=lambda client_id: 10 * (client_id + 1)))
    requests = ask(server)
    told = [10, 21, 1, 40]
    server.aggregate_train(1, [reply(requests[i], ones(server), num_examples=n) for i, n in enumerate(told)])
    assert set(failed(server)) == {1}
    assert "trained on 21 examples, but its shard has 20" in failed(server)[1]


@pytest.mark.parametrize("value", [float("inf"), 1e30])
def test_a_control_variate_that_cannot_be_meant_is_refused(value: float) -> None:
    server = strategy(scaffold=True)
    requests = ask(server)
    names = server.aggregator.uplink(server.server_state.state, 1)
    honest = {**ones(server), **{f"control/{name}": torch.ones_like(ones(server)[name]) for name in names}}
    spoilt = {**honest, f"control/{names[0]}": torch.full_like(ones(server)[names[0]], 1e30)}
    bad = reply(requests[1], spoilt)
    if value == float("inf"):
        flat = bad.content.array_records[ARRAYS][FLAT].numpy().copy()
        flat[flat == np.float32(1e30)] = value
        bad.content[ARRAYS] = ArrayRecord({FLAT: Array(flat)})
    server.aggregate_train(1, [reply(requests[0], honest), bad])
    assert sorted(server.record.clients) == [0]
    assert failed(server)[1]
    assert all(bool((t.abs() <= 1).all()) for t in server.server_state.memory.values())


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

"""Payload packing: what goes in comes out, mismatches are named, and byte counts are Flower's own."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.task_identity import TaskIdentity

from federated.communication.byte_counts import payload_bytes, wire_bytes
from federated.communication.codec import codec_from_name
from federated.communication.messages import SERVER_ROUND, read_broadcast, read_state, write_state
from federated.communication.payload import (
    ARRAYS,
    CONFIG,
    FLAT,
    METRICS,
    Layout,
    PayloadError,
    check_finite,
    flatten,
    layout_digest,
    layout_from_bytes,
    layout_to_bytes,
    pack,
    unflatten,
    unpack,
)
from models.errors import UserError
from models.state import layout_of, num_values

CLIP_TEXT_R16: Layout = tuple(
    sorted(
        (f"clip.text_model.encoder.layers.{layer}.self_attn.{target}.{factor}.weight", shape)
        for layer in range(12)
        for target in ("q_proj", "k_proj", "v_proj", "out_proj")
        for factor, shape in (("lora_A", (16, 512)), ("lora_B", (512, 16)))
    )
)


def state_of(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"tensor.{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


def packed(num_bytes: int = 100, *, send_layout: bool = True) -> RecordDict:
    buffer = np.random.default_rng(0).integers(0, 256, num_bytes).astype(np.uint8)
    return pack(buffer, (("w", (num_bytes,)),), "int8", meta={"server-round": 3}, send_layout=send_layout)


def serialised_by_flower(content: RecordDict | Message) -> int:
    """Serialise everything, data included: the slow way that wire_bytes avoids."""
    with no_object_id_recompute():
        return sum(len(item.deflate()) for item in get_all_nested_objects(content).values())


@pytest.fixture
def message(monkeypatch: pytest.MonkeyPatch) -> Message:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    content = packed()
    content[METRICS] = MetricRecord({"num-examples": 7, "loss": [0.5, 0.25]})
    return Message(content, dst_node_id=1000, message_type="train")


# ---- layout and flat vector


def test_layout_is_sorted_whatever_the_insertion_order():
    state = state_of((2, 3), (4,))
    assert (
        layout_of(dict(reversed(state.items())))
        == layout_of(state)
        == (("tensor.0", (2, 3)), ("tensor.1", (4,)))
    )


@pytest.mark.parametrize("layout", [(), (("scalar", ()),), (("empty", (0, 5)), ("w", (2, 3))), CLIP_TEXT_R16])
def test_layout_survives_its_bytes(layout: Layout):
    assert layout_from_bytes(layout_to_bytes(layout)) == layout


def test_layout_of_96_adapter_tensors_takes_less_than_half_a_kilobyte():
    assert len(layout_to_bytes(CLIP_TEXT_R16)) < 500


def test_digest_tells_layouts_apart():
    layouts = [(), (("w", (2, 3)),), (("w", (3, 2)),), (("w", (6,)),), (("v", (2, 3)),)]
    assert len({layout_digest(layout) for layout in layouts}) == len(layouts)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zlib",
        zlib.compress(b"{"),
        zlib.compress(b"[1]"),
        zlib.compress(b'[["w",[-1]]]'),
        zlib.compress(b'[["w",[1.5]]]'),
        zlib.compress(b'[["w",[true]]]'),
        zlib.compress(b"[[3,[1]]]"),
        zlib.compress(b'[["w",[1]],["w",[1]]]'),
        zlib.compress(b'[["w",[1]],["v",[1]]]'),
        zlib.compress(b"[" + b" " * 20_000_000),
    ],
)
def test_bytes_that_are_no_layout_are_refused(data: bytes):
    with pytest.raises(PayloadError, match="layout"):
        layout_from_bytes(data)


@pytest.mark.parametrize("shapes", [(), ((),), ((0, 4),), ((3, 5), (7,), (), (0, 2), (2, 3, 4))])
def test_flatten_and_unflatten_are_inverse(shapes: tuple[tuple[int, ...], ...]):
    state = state_of(*shapes)
    layout = layout_of(state)
    vector = flatten(state, layout)
    assert vector.dtype == np.float32
    assert vector.shape == (num_values(layout),)
    back = unflatten(vector, layout)
    assert list(back) == [name for name, _ in layout]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_decoded_state_is_flattened_without_a_copy():
    state = state_of((3, 5), (7,), (), (2, 3, 4))
    vector = flatten(state, layout_of(state))
    assert np.shares_memory(flatten(unflatten(vector, layout_of(state)), layout_of(state)), vector)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "index"), [("tensor.0", 0), ("tensor.0", 5), ("tensor.2", 0), ("tensor.3", 3)]
)
def test_a_value_that_is_not_finite_is_refused_by_tensor_name(name: str, index: int, bad: float):
    state = state_of((2, 3), (0, 2), (1,), (4,))
    state[name].view(-1)[index] = bad
    with pytest.raises(PayloadError, match=f"{name} holds"):
        flatten(state, layout_of(state))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_not_called_too_large(value: float):
    with pytest.raises(PayloadError) as error:
        check_finite(np.array([1.0, value, value], dtype=np.float32), (("a", (1,)), ("b", (2,))), largest=2.0)
    message = str(error.value)
    assert message.startswith(f"tensor b holds {value}, which is not a finite number")
    assert "cannot be sent: 2" in message
    assert "client.learning_rate" in message
    assert "client.clip_norm" in message
    assert "codec" not in message


def test_a_number_that_is_too_large_for_its_codec_has_another_codec_as_a_remedy():
    with pytest.raises(PayloadError, match=r"holds 3\.0, but at most 2 can be sent .*codec of wider range"):
        check_finite(np.array([3.0], dtype=np.float32), (("a", (1,)),), largest=2.0)


def test_check_finite_accepts_an_empty_state():
    check_finite(np.zeros(0, dtype=np.float32), ())


def test_payload_error_is_a_user_error():
    assert issubclass(PayloadError, UserError)


# ---- records


def test_message_holds_one_flat_array_and_one_config_record():
    content = packed()
    assert {key: type(record) for key, record in content.items()} == {
        ARRAYS: ArrayRecord,
        CONFIG: ConfigRecord,
    }
    assert list(content.array_records[ARRAYS]) == [FLAT]
    assert content.array_records[ARRAYS][FLAT].shape == (100,)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.uint8])
@pytest.mark.parametrize("size", [0, 1, 101])
def test_unpack_returns_what_was_packed(dtype: type[np.generic], size: int):
    buffer = np.random.default_rng(1).integers(0, 200, size).astype(dtype)
    layout = (("w", (size,)),)
    payload = unpack(pack(buffer, layout, "some:codec", meta={"server-round": 3, "note": "x"}))
    assert payload.buffer.dtype == buffer.dtype
    np.testing.assert_array_equal(payload.buffer, buffer)
    assert (payload.layout, payload.codec) == (layout, "some:codec")
    assert payload.meta == {"server-round": 3, "note": "x"}
    assert not payload.buffer.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.uint8, np.int64])
@pytest.mark.parametrize("size", [0, 1, 101])
def test_the_array_is_the_one_that_flower_makes(dtype: type[np.generic], size: int):
    buffer = np.random.default_rng(1).integers(0, 200, size).astype(dtype)
    assert pack(buffer, (("w", (size,)),), "x").array_records[ARRAYS][FLAT] == Array(buffer)


def test_unpack_leaves_the_message_as_it_was():
    content = packed()
    before = dict(content.config_records[CONFIG])
    assert unpack(content).meta == unpack(content).meta
    assert dict(content.config_records[CONFIG]) == before


def test_layout_need_not_travel_when_the_receiver_knows_it():
    content = packed(send_layout=False)
    assert unpack(content, (("w", (100,)),)).layout == (("w", (100,)),)
    assert wire_bytes(content) < wire_bytes(packed())
    with pytest.raises(PayloadError, match="carries no layout"):
        unpack(content)


def test_unpack_names_the_tensors_that_differ():
    with pytest.raises(PayloadError, match=r"w \[100\] instead of \[10, 10\]"):
        unpack(packed(), (("w", (10, 10)),))


def test_digest_guards_a_layout_that_did_not_travel():
    with pytest.raises(PayloadError, match="digest"):
        unpack(packed(send_layout=False), (("w", (10, 10)),))


def test_a_shortened_array_is_refused():
    content = packed()
    content[ARRAYS] = ArrayRecord({FLAT: Array(np.zeros(99, dtype=np.uint8))})
    with pytest.raises(PayloadError, match="99 bytes, its manifest says 100"):
        unpack(content)


def test_a_damaged_array_is_refused():
    content = packed()
    array = content.array_records[ARRAYS][FLAT]
    content.array_records[ARRAYS][FLAT] = dataclasses.replace(array, data=array.data[:-3])
    with pytest.raises(PayloadError, match="cannot be read"):
        unpack(content)


@pytest.mark.parametrize("record", [ARRAYS, CONFIG])
def test_a_missing_record_is_refused(record: str):
    content = packed()
    del content[record]
    with pytest.raises(PayloadError, match=record):
        unpack(content)


def test_records_that_pack_did_not_make_are_refused():
    content = packed()
    content[CONFIG] = ConfigRecord({"server-round": 1})
    with pytest.raises(PayloadError, match="payload-codec"):
        unpack(content)


def test_meta_cannot_overwrite_the_manifest():
    with pytest.raises(PayloadError, match="payload-codec"):
        pack(np.zeros(1, dtype=np.float32), (("w", (1,)),), "fp32", meta={"payload-codec": "mine"})


@pytest.mark.parametrize("buffer", [np.zeros((2, 2), np.float32), np.array(["a"]), np.zeros(1, np.complex64)])
def test_only_flat_arrays_of_numbers_are_packed(buffer: np.ndarray):
    with pytest.raises(PayloadError, match="flat array"):
        pack(buffer, (), "fp32")


def test_bf16_reaches_flower_as_uint16():
    state = state_of((3, 5))
    codec = codec_from_name("bf16")
    content = pack(codec.encode(state, np.random.default_rng(0)), layout_of(state), codec.name)
    assert content.array_records[ARRAYS][FLAT].dtype == "uint16"
    back = codec.decode(unpack(content).buffer, layout_of(state))
    assert torch.equal(back["tensor.0"], state["tensor.0"].bfloat16().float())


# ---- byte counts


@pytest.mark.parametrize(("dtype", "expected"), [(np.float32, 400), (np.uint16, 200), (np.uint8, 100)])
def test_payload_bytes_are_those_of_the_buffer(dtype: type[np.generic], expected: int):
    content = pack(np.zeros(100, dtype=dtype), (("w", (100,)),), "some")
    assert payload_bytes(content) == expected == unpack(content).buffer.nbytes


def test_payload_bytes_of_a_message_without_arrays_are_zero(message: Message):
    assert payload_bytes(message) == 100
    assert payload_bytes(RecordDict({METRICS: MetricRecord({"loss": 1.0})})) == 0
    assert payload_bytes(Message(Error(1, "failed"), reply_to=message)) == 0


# 5 MiB is Flower's chunk; np.save writes a 128-byte header before the data.
@pytest.mark.parametrize("size", [0, 1, 9, 10, 1000, 5 * 2**20 - 128, 5 * 2**20 - 127, 11 * 2**20])
def test_wire_bytes_equal_what_flower_serialises(size: int):
    content = packed(size)
    assert wire_bytes(content) == serialised_by_flower(content)


def test_wire_bytes_tell_equal_numbers_of_different_types_apart():
    sizes = []
    for value in (1, 1.0, True, 1):
        content = RecordDict({"config": ConfigRecord({"value": value})})
        assert wire_bytes(content) == serialised_by_flower(content)
        sizes.append(wire_bytes(content))
    assert sizes[1] > sizes[0] == sizes[3]


def test_wire_bytes_of_messages_equal_what_flower_serialises(message: Message):
    assert wire_bytes(message) == serialised_by_flower(message)
    failure = Message(Error(1, "failed"), reply_to=message)
    assert wire_bytes(failure) == serialised_by_flower(failure) > 0


def test_wire_bytes_hold_for_many_arrays_in_several_records():
    arrays = {f"layer.{i}": Array(np.full(i + 1, i, dtype=np.float32)) for i in range(20)}
    content = RecordDict({"first": ArrayRecord(arrays), "second": ArrayRecord({"x": Array(np.ones(3))})})
    assert wire_bytes(content) == serialised_by_flower(content)


def test_wire_bytes_hold_for_records_of_every_size():
    for size in (0, 1, 15, 200):
        content = packed(10)
        content[METRICS] = MetricRecord({"loss": 0.5, "ids": [10 ** (k % 18) for k in range(size)]})
        content["extra"] = ConfigRecord({f"key-{i}": "x" * i for i in range(size)})
        assert wire_bytes(content) == serialised_by_flower(content)


def test_wire_bytes_leave_the_message_as_it_was(message: Message):
    before = message.content
    wire_bytes(message)
    assert message.content is before
    assert unpack(message.content).buffer.nbytes == 100


def test_equal_chunks_count_every_time():
    zeros = pack(np.zeros(17_000_000, dtype=np.uint8), (("w", (17_000_000,)),), "int8")
    assert 17_000_000 <= wire_bytes(zeros) < 17_002_000
    assert serialised_by_flower(zeros) < 17_000_000


def test_flat_payload_costs_at_most_a_thousandth_on_the_wire():
    buffer = np.random.default_rng(0).standard_normal(num_values(CLIP_TEXT_R16), dtype=np.float32)
    raw = 4 * num_values(CLIP_TEXT_R16)
    content = pack(buffer, CLIP_TEXT_R16, "fp32", meta={"server-round": 1})
    assert raw == payload_bytes(content) == 3_145_728  # 48 modules x 16 x (512 + 512) values x 4 bytes
    assert raw < wire_bytes(content) <= 1.001 * raw


# ---- a broadcast


def test_clients_that_receive_the_same_bytes_share_what_they_decode():
    state = state_of((3, 5), (7,))
    codec, layout = codec_from_name("int8"), layout_of(state)
    content = write_state(state, codec, np.random.default_rng(0), {SERVER_ROUND: 3})
    copy = RecordDict({key: record.copy() for key, record in content.items()})
    first, second = (read_broadcast(received, codec, layout) for received in (content, copy))
    alone = read_state(content, codec, layout)
    assert all(first[name] is second[name] for name in state)
    assert all(torch.equal(first[name], alone[name]) and first[name] is not alone[name] for name in state)


def test_a_broadcast_is_decoded_anew_when_anything_about_it_differs():
    state = state_of((3, 5), (7,))
    codec, layout = codec_from_name("fp32"), layout_of(state)
    first = read_broadcast(write_state(state, codec, np.random.default_rng(0), {}), codec, layout)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    second = read_broadcast(write_state(changed, codec, np.random.default_rng(0), {}), codec, layout)
    assert all(torch.equal(second[name], first[name] + 1) for name in state)
    other = {"tensor.0": state["tensor.0"].T, "tensor.1": state["tensor.1"]}
    content = write_state(other, codec, np.random.default_rng(0), {}, send_layout=True)
    assert read_broadcast(content, codec, layout)["tensor.0"].shape == (5, 3)
    with pytest.raises(PayloadError, match="digest"):
        read_broadcast(write_state(other, codec, np.random.default_rng(0), {}), codec, layout)
    rounding = codec_from_name("int8:sr")  # of the layout and length of int8
    sent = write_state(state, rounding, np.random.default_rng(0), {})
    assert read_broadcast(sent, rounding, layout).keys() == state.keys()
    with pytest.raises(PayloadError, match="the configuration says int8"):
        read_broadcast(sent, codec_from_name("int8"), layout)


def test_a_broadcast_without_its_records_is_refused():
    codec, layout = codec_from_name("fp32"), layout_of(state_of((2,)))
    with pytest.raises(PayloadError, match="needs one array"):
        read_broadcast(RecordDict(), codec, layout)

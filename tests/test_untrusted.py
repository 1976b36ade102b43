"""What files and messages claim is checked before there is memory for it, and refused by file and field."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors.torch import save

from federated.communication.codec import codec_from_name
from federated.communication.payload import PayloadError, layout_from_bytes, layout_to_bytes
from federated.config.config_files import load_config
from federated.data.dataset import load_data
from federated.methods import unpack_downlink
from federated.methods.base_delta import BaseUpdate
from federated.methods.lowrank import LowRank
from federated.results.records import read_run
from federated.rounds.base_weights import BaseWeights
from federated.tools.embeddings import find_images
from lora.adapter_files import CONFIG_FILE, read_adapter
from lora.adapter_saving import save_lora_adapters
from lora.base_delta_file import BASE_DELTA_FILE, fitting_base_delta
from lora.config import LoRAConfig
from lora.conversion import read_converted
from lora.injection import inject_lora
from models.errors import UserError, printable, shortened
from models.untrusted import (
    check,
    checked_name,
    parse_json,
    parse_yaml,
    parsing,
    read_bytes,
    read_json,
    read_tensors,
)
from tests.command import fedlora
from tests.fake_run import FakeRun
from tests.lora_models import small_clip


@contextmanager
def little_memory(most_bytes: int = 20_000_000) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


def adapted() -> torch.nn.Module:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    return model


# ---- text, JSON, YAML

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "aliases written out"),
        (MERGES, "aliases written out"),
        ("a: &a [*a]", "inside itself"),
        ("a: " + "[" * 100_000, "nested too deep"),
        ("- " * 100_000, "recursion"),
        ("a: .nan", "a: nan is no finite number"),
        ("a: {b: [.inf]}", r"a\.b: inf is no finite number"),
        ("a: 2024-02-01", "a: a date"),
        ("a: 2024-99-99", "month"),
        ("a: !!binary xyz", "valid YAML"),
        ("a: !!int ''", "valid YAML"),
        ("1: x", "the key 1 is no text"),
        ('a: "\\0"', r"a: '\\x00' holds a character"),
        ('a: "\\ud800"', "holds a character"),
        (f"a: {'9' * 5000}", "valid YAML"),
        (f"a: {10**30}", "bits is too large"),
        ("b: 1\na: [1, 2\nc: 3", "line 3, column 2"),
        ("x" * 1_000_001, "at most 1000000"),
    ],
)
def test_yaml_that_explodes_or_is_not_plain_is_refused(text: str, reason: str) -> None:
    with little_memory(), pytest.raises(UserError, match=f"(?s)the file .*{reason}"):
        parse_yaml(text, "the file")


def test_anchors_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 'é\u200d'}", "f") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": "é\u200d"},
    }


def test_a_configuration_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"seed: 1\nname: \xb6")
    with pytest.raises(UserError, match=r"a\.yaml is not UTF-8 text"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.r=1000000000", "lora.r"),
        ("lora.r=1e9", "lora.r"),
        ("lora.vision={r: 1000000000}", "lora.vision.r"),
        ("lora.lora_alpha=1e308", "lora.lora_alpha"),
        ("client.ranks=[4, 1000000000]", "client.ranks"),
        ('output.name="a\\0b"', "output.name"),
        ("output.name=" + "a" * 300, "output.name"),
        ("output.root=runs/" + "ä" * 150, "output.root"),
        ('data.path="a\\nb"', "data.path"),
        ("client.learning_rate=.inf", "client.learning_rate"),
        ("communication.uplink=topk:1e-9", "communication.uplink|density"),
    ],
)
def test_a_value_that_nobody_can_compute_with_is_refused_at_the_door(override: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        codec_from_name(load_config("quickstart", [override]).communication.uplink)


@pytest.mark.parametrize(
    "data", [b"\xff", b"[" * 100_000, b'"\\ud800"', b"1" * 5000, b"{", b"{} {}", b"", b"\xef\xbb\xbf{}"]
)
def test_json_that_is_none_is_refused_with_its_source(data: bytes) -> None:
    with pytest.raises(UserError, match="the file is not valid JSON"):
        parse_json(data, "the file")


def test_a_field_of_another_kind_is_named_and_nothing_is_converted() -> None:
    kind = TypeAdapter(dict[str, list[int]])
    with pytest.raises(UserError, match=r"the file: a\.1: .*integer.*'2'"):
        parse_json(b'{"a": [1, "2"]}', "the file", kind)
    with pytest.raises(UserError, match=r"the file: a\.0"):
        check(kind, {"a": [1.0]}, "the file")
    assert parse_json(b'{"a": [1, 2]}', "the file", kind) == {"a": [1, 2]}


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "pipe",
        tmp_path,
        tmp_path / "nowhere",
        Path("/dev/zero"),
        tmp_path / ("a" * 300),
    ):
        with pytest.raises(UserError, match=shortened(path)[:60]):
            read_json(path)
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(UserError, match="at most 4"):
        read_bytes(tmp_path / "a", most=4)


def test_a_parser_s_exception_becomes_one_line_and_a_user_error_stays_as_it_is() -> None:
    with pytest.raises(UserError, match=r"^f is odd \(one\); mend it$"), parsing("f", "is odd", "mend it"):
        raise ValueError("one\ntwo")
    with pytest.raises(UserError, match=r"^mine$"), parsing("f", "is odd", "mend it"):
        raise UserError("mine")


# ---- names


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[2J", "a\nb", "caf\udce9", "\ud800", "a" * 256, "ä" * 128])
def test_a_name_that_cannot_be_stored_or_shown_is_refused_in_words_that_can(name: str) -> None:
    with pytest.raises(UserError) as refused:
        checked_name(name, "the class")
    assert printable(str(refused.value)) == str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_an_error_quotes_cannot_clear_the_screen() -> None:
    assert str(UserError("no file a\0b\x1b[2J\udce9, line 1\nline 2")) == (
        r"no file a\x00b\x1b[2J\udce9, line 1" + "\nline 2"
    )


def test_names_of_all_languages_pass() -> None:
    for name in ("T-shirt/top", "猫", "👩‍🔬", "a" * 255, "é"):
        assert checked_name(name) == name


def folder_of_classes(root: Path, *classes: bytes) -> Path:
    for split in (b"train", b"test"):
        for name in classes:
            folder = os.path.join(os.fsencode(root), split, name)
            os.makedirs(folder)
            Image.new("RGB", (4, 4)).save(os.fsdecode(os.path.join(folder, b"a.png")))
    return root


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[2Jb", b"a\nb"])
def test_a_class_folder_whose_name_is_not_text_is_refused(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(UserError, match="rename it") as refused:
        load_data("imagefolder", path=str(folder_of_classes(tmp_path, b"cat", name)))
    assert printable(str(refused.value)) == str(refused.value)


def test_an_image_whose_name_is_not_utf8_is_refused_before_it_is_encoded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")))
    with pytest.raises(UserError, match="rename it"):
        find_images(tmp_path)


def test_a_class_of_300_letters_in_a_csv_file_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = "".join(f"a.png,{name},{split}\n" for name in ("cat", "d" * 300) for split in ("train", "test"))
    (tmp_path / "a.csv").write_text(f"image,label,split\n{rows}")
    with pytest.raises(UserError, match="300 bytes"):
        load_data("csv", path=str(tmp_path / "a.csv"))


@pytest.mark.parametrize("command", ["report", "compare", "evaluate", "show-config", "info"])
def test_a_path_of_300_letters_is_an_error_and_no_traceback(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = fedlora(capsys, command, "a" * 300)
    assert code == 2
    assert error.startswith("error:")


# ---- tensors


def test_factors_whose_product_would_not_fit_in_memory_are_refused_before_it_is_made(tmp_path: Path) -> None:
    model = adapted()
    module = "vision_model.encoder.layers.0.self_attn.q_proj"
    for shapes in (((10**6, 1), (1, 10**6)), ((20, 2), (3, 20)), ((20,), (20,))):
        left, right = (torch.ones(shape) for shape in shapes)
        content = save({f"{module}.left": left, f"{module}.right": right})
        (tmp_path / BASE_DELTA_FILE).write_bytes(content)
        with pytest.raises(UserError, match=BASE_DELTA_FILE):
            fitting_base_delta(model, tmp_path)


def test_an_empty_tensor_cannot_claim_a_million_rows(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save({"x": torch.ones(0, 10**12)}))
    with pytest.raises(UserError, match=r"x claims shape"):
        read_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(save({"x": torch.ones(0, 3)}))
    assert read_tensors(tmp_path / "a.safetensors")[0]["x"].shape == (0, 3)


def pt_file(path: Path, factor: torch.Tensor, **config: object) -> Path:
    key = "transformer.resblocks.0.lora_q"
    state = {f"{key}.lora_A": factor, f"{key}.lora_B": torch.ones(20, 2)}
    torch.save({"lora_state_dict": state, "lora_config": {"r": 2, "lora_alpha": 4} | config}, path)
    return path


def test_a_pt_tensor_that_repeats_one_value_a_billion_times_is_refused(tmp_path: Path) -> None:
    path = pt_file(tmp_path / "a.pt", torch.ones(1, 1).expand(2, 10**9))
    with little_memory(), pytest.raises(UserError, match="claims shape"):
        read_converted(path, small_clip())


def test_a_compressed_pt_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    path = pt_file(tmp_path / "a.pt", torch.zeros(2, 10**6))
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(UserError, match="claims to hold"):
        read_converted(tmp_path / "b.pt", small_clip())


@pytest.mark.parametrize(
    "config",
    [
        {"r": 1e9},
        {"r": 2.5},
        {"r": True},
        {"lora_alpha": "x"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": {}},
    ],
)
def test_a_pt_setting_that_is_no_number_is_named(tmp_path: Path, config: dict[str, object]) -> None:
    path = pt_file(tmp_path / "a.pt", torch.ones(2, 20), **config)
    with pytest.raises(UserError, match=rf"a\.pt: lora_config (says|has) .*{next(iter(config))}="):
        read_converted(path, small_clip())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 10**9),
        ("r", None),
        ("lora_alpha", None),
        ("alpha_pattern", 7),
        ("rank_pattern", {"x": 10**9}),
        ("rank_pattern", {"(": 2}),
        ("target_modules", "("),
        ("target_modules", "(a+)+$"),
        ("target_modules", 14),
        ("use_rslora", "yes"),
        ("lora_dropout", 2.0),
    ],
)
def test_a_peft_setting_of_another_kind_is_refused_by_its_name(
    tmp_path: Path, key: str, value: object
) -> None:
    save_lora_adapters(adapted(), tmp_path)
    settings = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(settings | {key: value}))
    with pytest.raises(UserError, match=rf"{CONFIG_FILE}: {key}"):
        read_adapter(tmp_path)


# ---- messages


@pytest.mark.parametrize(
    "name", ["fp32", "int8", "int4:sr", "ternary", "topk:0.1+int8", "topk:0.1:ef+ternary"]
)
def test_a_layout_of_a_billion_rows_costs_no_memory_before_its_bytes_are_there(name: str) -> None:
    codec = codec_from_name(name)
    layout = (("a.lora_A.weight", (10**9, 2)), ("b.lora_B.weight", (4, 10**9)))
    with little_memory():
        assert codec.num_bytes(layout) > 10**8
        with pytest.raises(PayloadError, match="has 12 bytes where"):
            codec.decode(np.zeros(12, dtype=np.uint8), layout)


def test_a_layout_that_claims_more_than_any_model_is_refused() -> None:
    for shape in ((10**12,), (0, 10**12), (10**6, 10**6), (1,) * 9):
        with pytest.raises(PayloadError, match="layout"):
            layout_from_bytes(layout_to_bytes((("a", shape),)))
    assert layout_from_bytes(layout_to_bytes((("a", (0, 5)), ("b", ())))) == (("a", (0, 5)), ("b", ()))


@pytest.mark.parametrize("value", [None, "", b"", [1], float("inf"), -2, 2**63, True, 1.0])
@pytest.mark.parametrize("key", ["version", "fresh-seed"])
def test_a_downlink_s_numbers_are_whole_or_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=key):
        unpack_downlink({}, {"version": 1, "fresh-seed": 2, key: value})


@pytest.mark.parametrize(
    "names",
    [
        ["base_update/m"],
        ["base_update/m/x/left"],
        ["base_update/m/1/left"],
        ["base_update/m/1/middle"],
        ["base_update"],
    ],
)
def test_a_base_update_with_a_part_missing_is_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="base weight"):
        unpack_downlink({name: torch.ones(2, 2) for name in names}, {"version": 1})


def test_a_base_update_of_another_shape_is_refused_and_not_spread_over_the_weight() -> None:
    base = BaseWeights(adapted())
    module, before = next(iter(base.current().items()))
    for update in (
        BaseUpdate(total=torch.ones(1, 1)),
        BaseUpdate(terms=((0, LowRank(torch.ones(10**6, 1), torch.ones(1, 10**6))),)),
    ):
        with pytest.raises(UserError, match=module):
            base.check({module: update})
    assert torch.equal(base.current()[module], before)


# ---- run folders


@pytest.mark.parametrize(
    ("name", "old", "new", "field"),
    [
        ("metrics.jsonl", '"accuracy": 0.512', '"accuracy": {}', "accuracy"),
        ("metrics.jsonl", '"server_round": 2', '"server_round": 1000000000', "server_round"),
        ("metrics.jsonl", '"seconds": 0.4', '"seconds": "x"', "seconds"),
        ("communication.csv", "1,0,downlink", "1000000000,0,downlink", "line"),
        ("communication.csv", "131072", "1" * 40, "line"),
        ("summary.json", '"final": 0.708', '"final": []', "final"),
        ("summary.json", '"communication": {', '"communication": 3, "x": {', "communication"),
        ("partition.json", '"class_counts": [', '"class_counts": [1, ', "class_counts"),
        ("partition.json", '"class_names": [', '"class_names": [7, ', "class_names"),
        ("partition.json", '"class_names": [', r'"class_names": ["\u001b[2J", ', "class_names"),
        ("config.yaml", "partition:\n", "partition: 3\nx:\n", "partition"),
    ],
)
def test_a_run_file_with_another_kind_of_value_is_refused_by_file_and_field(
    tmp_path: Path, name: str, old: str, new: str, field: str
) -> None:
    path = FakeRun().write(tmp_path / "run") / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=rf"{name}.*{field}"):
        assert read_run(tmp_path / "run").config


def test_infinity_and_nan_of_an_older_run_count_as_not_recorded(tmp_path: Path) -> None:
    path = FakeRun().write(tmp_path / "run") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"accuracy": 0.708', '"accuracy": NaN'))
    run = read_run(tmp_path / "run")
    assert run.metrics[-1]["accuracy"] is None

"""Files and messages that once ended in a raw exception, or took long: each is refused, or read.

A file of ``fuzz_cases`` holds what was raised in its first line, and then the case.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from federated.communication.codec import codec_from_name
from federated.communication.messages import read_broadcast, read_state
from federated.config.config_files import load_config
from federated.methods import unpack_downlink
from federated.tools.embedding_files import read_index
from lora.adapter_files import read_adapter
from lora.adapter_saving import save_lora_adapters
from lora.config import LoRAConfig
from lora.conversion import read_converted
from lora.injection import inject_lora
from models.errors import UserError
from tests.fake_run import FakeRun
from tests.lora_models import small_clip
from tests.test_fuzz import summed_up

CASES = sorted((Path(__file__).parent / "fuzz_cases").glob("*.json"))
VALID = {"adapter__slow"}
"""Cases that were not wrong, but slow."""


def _file_in_folder(folder: Path, case: list[Any]) -> Path:
    path = folder / ast.literal_eval(case[0])
    path.write_bytes(ast.literal_eval(case[1]))
    return path


def _adapter(folder: Path, case: list[Any]) -> None:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_lora_adapters(model, folder)
    (folder / "manifest.json").unlink()  # it would refuse every other file
    _file_in_folder(folder, case)
    read_adapter(folder)


def _config(folder: Path, case: list[Any]) -> None:
    (folder / "a.yaml").write_bytes(ast.literal_eval(case[0]))
    load_config(folder / "a.yaml", case[1])


def _manifest(folder: Path, case: list[Any]) -> None:
    path = folder / f"a{ast.literal_eval(case[0])}"
    path.write_bytes(ast.literal_eval(case[1][0]))
    path.with_name(f"{path.name}.json").write_bytes(ast.literal_eval(case[1][1]))
    read_index(path)


def _pt(folder: Path, case: list[Any]) -> None:
    (folder / "a.pt").write_bytes(ast.literal_eval(case[1]))
    read_converted(folder / "a.pt", small_clip())


def _run_record(folder: Path, case: list[Any]) -> None:
    FakeRun().write(folder)
    _file_in_folder(folder, case)
    summed_up(folder)


def _value(text: str) -> Any:
    return math.inf if text == "inf" else ast.literal_eval(text)


def _message(case: list[Any]) -> RecordDict:
    records = case[0]["records"]
    dtype, shape, stype, data = ast.literal_eval(records["arrays"][1]["state"])
    config = {key: _value(text) for key, text in records["config"][1].items()}
    array = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return RecordDict({"arrays": ArrayRecord({"state": array}), "config": ConfigRecord(config)})


LAYOUT = (("head.bias", (51,)),)


def _read_broadcast(folder: Path, case: list[Any]) -> None:
    content = _message(case)
    received = read_broadcast(content, codec_from_name(ast.literal_eval(case[1])), LAYOUT)
    unpack_downlink(received, content["config"])


def _read_state(folder: Path, case: list[Any]) -> None:
    read_state(_message(case), codec_from_name(ast.literal_eval(case[1])), None)


READERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "adapter": _adapter,
    "adapter_bare": _adapter,
    "config": _config,
    "manifest": _manifest,
    "pt": _pt,
    "read_broadcast": _read_broadcast,
    "read_state": _read_state,
    "run_record": _run_record,
}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_what_once_ended_in_a_traceback_is_refused(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    case = json.loads(text[text.index("\n[") :])
    read = READERS[path.stem.partition("__")[0]]
    if path.stem in VALID:
        read(tmp_path, case)
        return
    with pytest.raises(UserError) as refused:
        read(tmp_path, case)
    assert len(str(refused.value)) < 1000

"""Whatever bytes a reader meets, it gives a valid result or a UserError, without memory that is only claimed.

Each case changes a valid file or message at random, from a seed that is fixed (``derandomize``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import RecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from federated.communication.codec import codec_from_name
from federated.communication.ledger import Ledger
from federated.communication.messages import read_broadcast, read_state, write_state
from federated.communication.payload import _npy_header, layout_digest, layout_from_bytes, layout_to_bytes
from federated.config.config_files import config_folder, load_config
from federated.data.partition import load_partition
from federated.data.sources.csv_source import csv
from federated.data.sources.folder_scan import content_hash
from federated.methods import NEVER, receive, unpack_downlink
from federated.methods.base_delta import BaseDelta, BaseUpdate, updates_to_state
from federated.methods.lowrank import LowRank
from federated.methods.protocol import ServerState
from federated.results.compare import compare_runs, comparison_table
from federated.results.records import read_run
from federated.results.report import write_report
from federated.results.report_cards import base_note, cards, notices, subtitle
from federated.results.tables import failure_table, round_table, saving_table
from federated.rounds.base_weights import BaseWeights
from federated.rounds.checkpoint import (
    SERVER_FILE,
    ServerCheckpoint,
    load_server_checkpoint,
    save_server_checkpoint,
)
from federated.tools.embedding_files import read_index
from lora.adapter_files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    FULL_FILE,
    HEAD_FILE,
    read_adapter,
    read_full_checkpoint,
)
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.base_delta_file import BASE_DELTA_FILE, fitting_base_delta
from lora.config import LoRAConfig
from lora.conversion import read_converted
from lora.injection import inject_lora
from models.committed_folders import MANIFEST_FILE
from models.errors import UserError, printable
from models.state import layout_of
from tests.fake_run import FakeRun
from tests.lora_models import small_clip
from tests.mutations import (
    mutated_archive,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_zlib,
)

MOST_MORE_BYTES = 400_000_000
"""By so much at most a target may raise the process's peak of memory."""

Target = Callable[[random.Random], Any]
Maker = Callable[[Path], Target]


def _config(folder: Path) -> Target:
    texts = [path.read_bytes() for path in sorted(config_folder().glob("*.yaml"))]
    trees = [json.dumps(yaml.safe_load(text)).encode() for text in texts]
    keys = (
        "lora.r",
        "client.ranks",
        "seed",
        "output.name",
        "data.options",
        "partition.options.alpha",
        "x.y",
        "",
    )
    values = (
        "1e9",
        "1000000000",
        "[1, 2, 10000000000]",
        ".nan",
        "'\\0'",
        '"\\ud800"',
        "a" * 300,
        "{a: *b}",
        "&a [*a]",
    )

    def target(rng: random.Random) -> None:
        text = mutated_json(rng, rng.choice(trees)) if rng.random() < 0.4 else rng.choice(texts)
        text = text if rng.random() < 0.9 else text.decode(errors="replace").encode("utf-16")
        (folder / "a.yaml").write_bytes(mutated_bytes(rng, text) if rng.random() < 0.5 else text)
        overrides = [f"{rng.choice(keys)}={rng.choice(values)}"] if rng.random() < 0.3 else []
        load_config(folder / "a.yaml", overrides)

    return target


def _file(path: Path, change: Callable[[random.Random, bytes], bytes], read: Callable[[], Any]) -> Target:
    valid = path.read_bytes()

    def target(rng: random.Random) -> None:
        path.write_bytes(change(rng, valid))
        try:
            read()
        finally:
            path.write_bytes(valid)

    return target


def _one_of(*targets: Target) -> Target:
    return lambda rng: rng.choice(targets)(rng)


def _adapter(folder: Path) -> Target:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_lora_adapters(model, folder, server_round=3, metrics={"accuracy": 0.5})
    (folder / MANIFEST_FILE).unlink()  # it would refuse every other file
    (folder / HEAD_FILE).write_bytes(save({"head.weight": torch.ones(2, 3)}, {"server_round": "3"}))
    files = {CONFIG_FILE: mutated_json, ADAPTER_FILE: mutated_safetensors, HEAD_FILE: mutated_safetensors}
    return _one_of(
        *(_file(folder / name, change, lambda: read_adapter(folder)) for name, change in files.items())
    )


def _bare_adapter(folder: Path) -> Target:
    """As plain PEFT writes it: without our metadata."""
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    save_lora_adapters(model, folder)
    (folder / MANIFEST_FILE).unlink()  # it would refuse every other file
    tensors = read_adapter(folder).state
    (folder / ADAPTER_FILE).write_bytes(save({f"base_model.model.{n}": t for n, t in tensors.items()}))
    files = {CONFIG_FILE: mutated_json, ADAPTER_FILE: mutated_safetensors}
    return _one_of(
        *(_file(folder / name, change, lambda: read_adapter(folder)) for name, change in files.items())
    )


def _manifest_of_a_commit(folder: Path) -> Target:
    save_full_checkpoint(small_clip(), folder, server_round=1)
    return _file(folder / MANIFEST_FILE, mutated_json, lambda: read_full_checkpoint(folder))


def _full_checkpoint(folder: Path) -> Target:
    save_full_checkpoint(small_clip(), folder, server_round=1)
    (folder / MANIFEST_FILE).unlink()  # it would refuse every other file
    return _file(folder / FULL_FILE, mutated_safetensors, lambda: read_full_checkpoint(folder))


def _base_delta(folder: Path) -> Target:
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    module = "vision_model.encoder.layers.0.self_attn.q_proj"
    width = model.get_submodule(module).in_features
    tensors = {f"{module}.left": torch.ones(width, 2), f"{module}.right": torch.ones(2, width)}
    tensors[f"{module.replace('layers.0', 'layers.1')}.dense"] = torch.ones(width, width)
    (folder / BASE_DELTA_FILE).write_bytes(save(tensors, {"server_round": "2"}))
    fitting_base_delta(model, folder)
    return _file(folder / BASE_DELTA_FILE, mutated_safetensors, lambda: fitting_base_delta(model, folder))


def _converted(folder: Path) -> Target:
    """``.pt`` files, in torch's archives and in the format before them."""
    model, targets = small_clip(), []
    for old in (False, True):
        factors = {"lora_A": torch.ones(2, 20), "lora_B": torch.ones(20, 2)}
        state = {f"transformer.resblocks.0.lora_q.{name}": value for name, value in factors.items()}
        content = {"lora_state_dict": state, "lora_config": {"r": 2, "lora_alpha": 4}, "epoch": 3}
        path = folder / f"{old}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        change = mutated_bytes if old else mutated_archive
        targets.append(_file(path, change, lambda path=path: read_converted(path, model)))
    return _one_of(*targets)


def _checkpoint(folder: Path) -> Target:
    state = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}
    server = ServerState(
        state=state, scaling={"a": 2.0}, server_round=3, memory={"momentum/a": torch.ones(2)}
    )
    save_server_checkpoint(folder, ServerCheckpoint(server, {0: 3, 1: 2}, {1: 2}))
    load_server_checkpoint(folder)
    return _file(folder / SERVER_FILE, mutated_safetensors, lambda: load_server_checkpoint(folder))


def _embeddings(folder: Path) -> Target:
    array = np.ones((3, 4), dtype=np.float32)
    np.save(folder / "a.npy", array)
    (folder / "a.safetensors").write_bytes(save({"embeddings": torch.from_numpy(array)}))
    about = {"kind": "image", "rows": ["a", "b", "c"], "folder": "/x", "model": "tiny", "adapter": None}
    about |= {"run": None, "weights_sha256": "0", "dimension": 4, "normalised": True, "dtype": "float32"}
    targets = []
    for name, change in (("a.npy", mutated_bytes), ("a.safetensors", mutated_safetensors)):
        path, manifest = folder / name, folder / f"{name}.json"

        def describe(path: Path = path, manifest: Path = manifest) -> None:
            manifest.write_text(json.dumps({**about, "array_sha256": content_hash(path), "corrupt": []}))

        def read_described(path: Path = path, describe: Callable[[], None] = describe) -> None:
            describe()
            read_index(path)

        describe()
        targets.append(_file(manifest, mutated_json, lambda path=path: read_index(path)))
        targets.append(_file(path, change, read_described))
    return _one_of(*targets)


def summed_up(folder: Path) -> None:
    """All that the report and the comparison make of a run folder, but for the pictures."""
    run = read_run(folder)
    rows = run.summary.get("communication", {}).get("comparison") or []
    subtitle(run), notices(run), cards(run), base_note(run)
    (
        round_table(run.metrics, run.metric, run.ledger),
        failure_table(run.metrics, run.ledger),
        saving_table(rows),
    )
    comparison_table(compare_runs([folder, folder]).rows)


RUN_FILES = {
    "metrics.jsonl": mutated_bytes,
    "communication.csv": mutated_bytes,
    "partition.json": mutated_json,
    "summary.json": mutated_json,
    "environment.json": mutated_json,
    "config.yaml": mutated_bytes,
}


def _lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(rng, lines[at]) + b"\n"
    return b"".join(lines)


def _run(folder: Path, read: Callable[[Path], Any] = summed_up) -> Target:
    FakeRun(accuracies=(0.1, 0.5, 0.6), num_clients=3, cohort_size=2, failures={(1, 1): "gone"}).write(folder)
    read(folder)
    targets = [_file(folder / name, change, lambda: read(folder)) for name, change in RUN_FILES.items()]
    targets += [_file(folder / "metrics.jsonl", _lines, lambda: read(folder))] * 3
    return _one_of(*targets)


def _partition(folder: Path) -> Target:
    document = {
        "partitioner": "iid",
        "seed": 0,
        "clients": [{"client_id": 0, "num_examples": 2, "indices": [1, 3]}],
    }
    path = folder / "partition.json"
    path.write_text(json.dumps(document))
    load_partition(path)
    return _file(path, mutated_json, lambda: load_partition(path))


def _ledger(folder: Path) -> Target:
    FakeRun(accuracies=(0.1, 0.5), num_clients=3, cohort_size=2).ledger().write_csv(folder / "a.csv")
    return _file(folder / "a.csv", mutated_bytes, lambda: Ledger.read_csv(folder / "a.csv"))


def _layout(folder: Path) -> Target:
    data = layout_to_bytes((("a.lora_A.weight", (2, 4)), ("b", ())))
    return lambda rng: layout_from_bytes(mutated_zlib(rng, data))


CODECS = ("fp32", "bf16", "int8", "int4:sr", "ternary", "topk:0.1+fp32", "topk:0.3:ef+int8", "topk:1+ternary")


def _downlink(folder: Path) -> Target:
    """A message as a client reads it, with a base update, and as the server does."""
    model = small_clip()
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    base = BaseWeights(model)
    module, weight = next(iter(base.current().items()))
    term = LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]))
    state = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}
    sent = dict(sorted({**state, **updates_to_state({module: BaseUpdate(((0, term),))})}.items()))

    def target(rng: random.Random) -> None:
        codec = codec_from_name(rng.choice(CODECS))
        meta = {"server-round": 1, "version": 0, "fresh-seed": 3}
        content = write_state(sent, codec, np.random.default_rng(0), meta, send_layout=True)
        _change_message(rng, content)
        received = read_broadcast(content, codec, layout_of(state))
        downlink = unpack_downlink(received, content["config"])
        receive(downlink, state)
        base.reset()
        base.check(downlink.base_updates)
        base.hold({m: BaseDelta().received(update, NEVER) for m, update in downlink.base_updates.items()})
        read_state(content, codec, layout_of(sent))

    return target


def _change_message(rng: random.Random, content: RecordDict) -> None:
    config, array = content["config"], content["arrays"]["state"]
    key = rng.choice(["array", *config])
    if key == "array":
        array.data = mutated_bytes(rng, array.data)
    elif rng.random() < 0.2:
        del config[key]
    elif key == "payload-layout":
        config[key] = mutated_zlib(rng, config[key])
        if rng.random() < 0.8:
            with contextlib.suppress(UserError):  # a sender that lies consistently
                layout = layout_from_bytes(config[key])
                config["payload-digest"] = layout_digest(layout)
                size = codec_from_name(config["payload-codec"]).num_bytes(layout) if len(layout) else 0
                if size < 10_000:
                    array.data = _npy_header(np.dtype("uint8"), (size,)) + rng.randbytes(size)
                    array.dtype, array.shape, config["payload-bytes"] = "uint8", (size,), size
    else:
        config[key] = rng.choice(
            (0, -1, 2**62, 0.5, float("inf"), float("nan"), "", "x", b"", b"\xff", [1], [b"x"], True)
        )


def _csv(folder: Path) -> Target:
    (folder / "a.png").write_bytes(b"")
    rows = "".join(f"a.png,class {i % 2},text {i},{'test' if i > 7 else 'train'}\n" for i in range(10))
    (folder / "a.csv").write_text(f"image,label,caption,split\n{rows}")

    def read() -> None:
        csv(np.random.default_rng(0), path=str(folder / "a.csv"), check_images=False)

    read()
    return _file(folder / "a.csv", mutated_bytes, read)


def _codec_names(folder: Path) -> Target:
    layout = (("a.lora_A.weight", (10**9, 2)), ("b.lora_B.weight", (4, 10**9)), ("c", (0, 10**9)))

    def target(rng: random.Random) -> None:
        name = mutated_bytes(rng, rng.choice(CODECS).encode()).decode(errors="surrogateescape")
        codec = codec_from_name(name)
        codec.decode(np.zeros(codec.num_bytes(()), dtype=np.uint8), layout)

    return target


MAKERS: dict[str, Maker] = {
    "config": _config,
    "adapter": _adapter,
    "bare adapter": _bare_adapter,
    "full checkpoint": _full_checkpoint,
    "manifest": _manifest_of_a_commit,
    "base delta": _base_delta,
    "pt": _converted,
    "checkpoint": _checkpoint,
    "embeddings": _embeddings,
    "run files": _run,
    "partition": _partition,
    "ledger": _ledger,
    "layout": _layout,
    "downlink": _downlink,
    "csv": _csv,
    "codec names": _codec_names,
}


def fuzz(target: Target, num_cases: int) -> tuple[int, int]:
    """Run cases; return how many were read and how many refused."""
    outcomes = {"read": 0, "refused": 0, "unprintable": 0}

    @settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def case(seed: int) -> None:
        try:
            target(random.Random(seed))
        except UserError as error:
            outcomes["refused" if str(error) and printable(str(error)) == str(error) else "unprintable"] += 1
        else:
            outcomes["read"] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case()
    more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert more < MOST_MORE_BYTES
    assert not outcomes["unprintable"]
    return outcomes["read"], outcomes["refused"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of small files are written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield Path(name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_hostile_bytes_are_refused_or_read(name: str, folder: Path) -> None:
    read, refused = fuzz(MAKERS[name](folder), 300)
    assert refused > 30
    assert read + refused >= 250


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_ten_thousand_hostile_files_are_refused_or_read(name: str, folder: Path) -> None:
    fuzz(MAKERS[name](folder), 10_000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_report_with_its_pictures_is_made_or_refused(folder: Path) -> None:
    fuzz(_run(folder, write_report), 300)

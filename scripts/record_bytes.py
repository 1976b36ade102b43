"""Record what short runs leave, byte for byte, so that a change of structure can show that no result changes.

    python scripts/record_bytes.py before.json     # on the code as it was
    python scripts/record_bytes.py after.json --against before.json

Every shipped offline configuration is cut short and run with every aggregation rule, three uplink codecs, and
SCAFFOLD, mixed ranks and FedAdam on the quick start. A refused combination is recorded by its message.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from models.errors import UserError

CONFIGS = ("quickstart", "head_only", "full_finetune", "domain_shift", "retrieval_vi", "augmented")
AGGREGATORS = (
    *("fedavg", "ffa", "rolora", "flora", "fedex", "flexlora"),
    *("hetlora", "fedsa", "lora_fair", "fedsvd", "fed_sb", "dual"),
)
CODECS = ("fp32", "int8", "topk:0.25:ef+int8")
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "scaffold": ["client.scaffold=true"],
    "mixed ranks": ["client.ranks=[2,4,8]"],
    "fedadam": ["aggregation.server_optimizer={name: fedadam}"],
}
SHORT = [
    *("federation.rounds=3", "federation.cohort_size=2", "client.local_steps=2", "client.batch_size=8"),
    *("client.micro_batch_size=null", "data.max_train_samples=150", "data.max_test_samples=20"),
    *("evaluation.max_samples=20", "output.report=false", "partition.local_test_fraction=0.2"),
]
PARTITIONS = {"domain_shift": []}
FEW_CLIENTS = ["partition.name=iid", "partition.options={}", "partition.num_clients=3"]


def find(*places: str) -> Any:
    """Return the first of these functions that exists; the folders of the packages move."""
    for place in places:
        module, _, name = place.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    sys.exit(f"none of {', '.join(places)}: tell this script the new name")


load_config = find("federated.config.config_files.load_config", "federated.config.load_config")
run_experiment = find("federated.engines.simulation.run_experiment", "federated.simulation.run_experiment")


def combinations() -> Iterator[tuple[str, str, str, str]]:
    """Yield configuration, aggregator, codec and variant."""
    for config, aggregator, codec in itertools.product(CONFIGS, AGGREGATORS, CODECS):
        for variant in VARIANTS if config == "quickstart" else ("plain",):
            yield config, aggregator, codec, variant


def record(config: str, aggregator: str, codec: str, variant: str, root: Path) -> dict[str, str]:
    """Run one combination; return a digest of the numbers in each file that must not change."""
    overrides = [
        *SHORT,
        *PARTITIONS.get(config, FEW_CLIENTS),
        *(f"aggregation.name={aggregator}", f"communication.uplink={codec}", f"output.root={root}"),
        *VARIANTS[variant],
    ]
    try:
        folder = run_experiment(load_config(config, overrides))
    except UserError as error:
        return {"refused": str(error).replace(str(root), "ROOT")}
    digests = {
        "metrics": digest(metrics(folder, without=("seconds",)).encode()),
        "metrics without bytes": digest(metrics(folder, without=("seconds", "bytes")).encode()),
        "communication.csv": digest((folder / "communication.csv").read_bytes()),
    }
    for path in sorted((folder / "adapter").rglob("*.safetensors")):
        tensors = load_file(path)
        parts = (f"{n} {tensors[n].shape}".encode() + tensors[n].tobytes() for n in sorted(tensors))
        digests[str(path.relative_to(folder))] = digest(b"".join(parts))
    shutil.rmtree(folder)
    return digests


def metrics(folder: Path, *, without: tuple[str, ...]) -> str:
    """Return the lines of ``metrics.jsonl`` without the keys that hold one of these words."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ({k: v for k, v in line.items() if not any(word in k for word in without)} for line in lines)
    return "\n".join(json.dumps(line, sort_keys=True) for line in kept)


def digest(data: bytes) -> str:
    """Return 16 hex digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each combination and file that is not as it was."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, {}), after.get(key, {})
        changed = (file for file in sorted(was.keys() | now.keys()) if was.get(file) != now.get(file))
        found += [f"{key}: {file}" for file in changed]
    return found


def main() -> None:
    """Record every combination, or those whose name holds a word, and compare with an earlier record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier record; differences end with exit code 1")
    parser.add_argument("--only", default="", help="combinations that hold this word")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as root:
        for combination in combinations():
            key = " | ".join(combination)
            if arguments.only in key:
                found[key] = record(*combination, Path(root))
                print(f"{len(found):4} {key}: {found[key].get('refused', 'recorded')[:90]}", flush=True)
    arguments.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if arguments.against is not None:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
        changed = differences({k: v for k, v in before.items() if arguments.only in k}, found)
        print("\n".join(changed) or "every byte is as it was")
        sys.exit(bool(changed))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

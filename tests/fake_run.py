"""Builds run folders in the format of a real run, without training: what the display tests read.

Accuracies are those of the quick start's feasibility study; sizes are the bundled model's (1,731,201 values,
32,768 of them exchanged, 825 bytes of message around a flat payload).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from federated.communication.ledger import Ledger, Transfer
from federated.communication.savings import Bandwidth, ModelSizes, communication_summary
from federated.results.round_record import CLIENTS, SCORED_BY

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
ACCURACIES = (0.192, 0.512, 0.608, 0.651, 0.684, 0.708)
TOTAL, EXCHANGED = 1_731_201, 32_768
OVERHEAD_BYTES = 825
CONFIG = """\
seed: 0
model:
  type: clip_lora
  model_name: tiny
lora:
  enabled: true
  r: 8
task:
  name: classification
data:
  source: fashion_mnist
partition:
  name: dirichlet
  num_clients: 10
  options:
    alpha: 0.5
aggregation:
  name: fedavg
communication:
  uplink: fp32
  base_preinstalled: false
"""


@dataclass(frozen=True)
class FakeRun:
    """What a fake run is made from; ``write`` makes the folder."""

    accuracies: Sequence[float] = ACCURACIES
    num_clients: int = 10
    cohort_size: int = 10
    class_names: tuple[str, ...] = FASHION
    exchanged: int = EXCHANGED
    failures: dict[tuple[int, int], str] = field(default_factory=dict)  # (round, client) -> reason
    metric: str = "accuracy"
    client_metrics: bool = True
    personal: bool = False  # no global model: from round 1 on clients score their own models
    central: bool = False  # epochs in one place: no clients, nothing sent
    seed: int = 0

    def ledger(self) -> Ledger:
        """Return one downlink and one uplink for each client and round; evaluation after the last round."""
        ledger = Ledger()
        if self.central:
            return ledger
        payload = 4 * self.exchanged
        for server_round, cohort in self.cohorts().items():
            for client in cohort:
                status = "failed" if (server_round, client) in self.failures else "ok"
                sent = (self.exchanged, payload, payload + OVERHEAD_BYTES)
                ledger.append(Transfer(server_round, client, "downlink", "train", status, *sent))
                back = sent if status == "ok" else (0, 0, 0)
                ledger.append(Transfer(server_round, client, "uplink", "train", status, *back))
        if self.client_metrics:
            last = len(self.accuracies) - 1
            for client in range(self.num_clients):
                sent = (self.exchanged, payload, payload + OVERHEAD_BYTES)
                ledger.append(Transfer(last, client, "downlink", "evaluate", "ok", *sent))
                ledger.append(Transfer(last, client, "uplink", "evaluate", "ok", 0, 0, 412))
        return ledger

    def cohorts(self) -> dict[int, list[int]]:
        """Return each training round's clients."""
        rng = np.random.default_rng(self.seed)
        rounds = range(1, len(self.accuracies))
        return {t: sorted(rng.permutation(self.num_clients)[: self.cohort_size].tolist()) for t in rounds}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``."""
        if self.central:
            return [
                {
                    "server_round": t,
                    "steps": 13 * t,
                    self.metric: a,
                    f"validation_{self.metric}": a,
                    "seconds": 1.0,
                }
                for t, a in enumerate(self.accuracies)
            ]
        ledger, cohorts = self.ledger(), self.cohorts()
        rng = np.random.default_rng(self.seed)
        lines = []
        for server_round, accuracy in enumerate(self.accuracies):
            line: dict[str, Any] = {"server_round": server_round, self.metric: accuracy}
            line |= {"loss": 2.4 - 2 * accuracy, "seconds": 0.4 if server_round == 0 else 7.5 + rng.random()}
            if server_round:
                failed = {c: why for (t, c), why in self.failures.items() if t == server_round}
                line |= {SCORED_BY: CLIENTS} if self.personal else {}
                line |= {
                    "train_loss": 2.1 - 1.9 * accuracy,
                    **({} if self.personal else {"aggregation_error": 0.1 / server_round}),
                    "cohort": cohorts[server_round],
                    "failed": [{"client_id": client, "reason": why} for client, why in failed.items()],
                    "clients": {
                        str(c): {"train_loss": 1.0, "num_examples": 400} for c in cohorts[server_round]
                    },
                }
                for direction in ("uplink", "downlink"):
                    totals = ledger.total(server_round=server_round, direction=direction)
                    line[f"{direction}_payload_bytes"] = totals.payload_bytes
                    line[f"{direction}_wire_bytes"] = totals.wire_bytes
            lines.append(line)
        if self.client_metrics:
            own = np.clip(rng.normal(self.accuracies[-1], 0.09, self.num_clients), 0.05, 1)
            for client, value in enumerate(own):
                entry = {self.metric: float(value), "eval_loss": 1.1, "eval_examples": 20 + client % 30}
                lines[-1]["clients"].setdefault(str(client), {}).update(entry)
        return lines

    def partition(self) -> dict[str, Any]:
        """Return ``partition.json``: a Dirichlet(0.5) split of 400 examples a client on average."""
        rng = np.random.default_rng(self.seed)
        shares = rng.dirichlet([0.5] * self.num_clients, len(self.class_names))  # (classes, clients)
        per_class = 400 * self.num_clients / len(self.class_names)
        counts = np.round(shares * per_class).astype(int).T  # (clients, classes)
        clients = [
            {"client_id": i, "num_examples": int(row.sum()), "class_counts": row.tolist(), "indices": []}
            for i, row in enumerate(counts)
        ]
        return {
            "partitioner": "dirichlet",
            "seed": self.seed,
            "num_clients": self.num_clients,
            "class_names": list(self.class_names),
            "clients": clients,
        }

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json``."""
        if self.central:
            return self._headline() | {
                "training": {"mode": "central", "kept_epoch": len(self.accuracies) - 1}
            }
        sizes = ModelSizes(full_model_bytes=4 * TOTAL, head_bytes=4 * 10 * 129, base_bytes=4 * TOTAL)
        return self._headline() | {
            "communication": communication_summary(self.ledger(), sizes, Bandwidth()),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """Return the classes' accuracies around the final one, some 200 rows each."""
        last, middle = self.accuracies[-1], (len(self.class_names) - 1) / 2
        return [
            {
                "name": name,
                "num_examples": 200 + i,
                "accuracy": min(1.0, max(0.0, last + 0.02 * (i - middle))),
            }
            for i, name in enumerate(self.class_names)
        ]

    def _headline(self) -> dict[str, Any]:
        by_class = {} if self.personal or self.metric != "accuracy" else {"per_class": self.per_class()}
        return by_class | {
            "headline_metric": self.metric,
            "zero_shot": self.accuracies[0],
            "final": self.accuracies[-1],
            "best": max(self.accuracies),
            "rounds": len(self.accuracies) - 1,
            "seconds": 41.25,
            "peak_memory_bytes": 812_000_000,
            "parameters": {"total": TOTAL, "trainable": EXCHANGED, "exchanged": self.exchanged},
        }

    def write(self, folder: Path) -> Path:
        """Write every file of the run folder; return ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.metrics()))
        self.ledger().write_csv(folder / "communication.csv")
        (folder / "config.yaml").write_text(CONFIG)
        environment = {
            "fedlora": "0.1.0",
            "python": "3.11",
            "torch": "2.13.0",
            "commit": "0" * 40,
            "started": "2026-01-02 03:04 UTC",
            "command": "fedlora run quickstart output.name='a b'",
            "gpu": None,
        }
        for name, content in (
            ("partition", self.partition()),
            ("summary", self.summary()),
            ("environment", environment),
        ):
            (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
        return folder

"""Clients that fail in every way at once, against clients that do not: ``python -m benchmarks.unreliable``.

The quick start with four local steps, 50 rounds, twice: without faults, and with a fifth of the training
messages struck, each fault by the same share. The command ends with an error unless the run completes and
each message that was sent has exactly one outcome: in the ledger, in ``metrics.jsonl`` and by the plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Row, write_results
from benchmarks.silent import SilentDisplay
from federated.communication.ledger import Ledger, Transfer
from federated.config.config_files import load_config
from federated.config.faults_and_clock import FaultsSection
from federated.config.schema import ExperimentConfig
from federated.engines.simulation import run_experiment
from federated.rounds.faults import fault_plan

FAULTS = tuple(FaultsSection.model_fields)
SETTING = ("client.local_steps=4", "data.max_test_samples=1000", "evaluation.every=10", "output.report=false")
DEADLINE = "clock.deadline_seconds=60"

STATUSES = {
    "dropout": [],
    "crash_before_training": ["failed"],
    "crash_after_training": ["failed"],
    "duplicate": ["ok", "ok"],
}
"""Fault -> the replies in the ledger; of any other, and of none: one that arrived."""


def faulty(share: float) -> list[str]:
    """Return the overrides that strike a share of the training messages, by each fault alike."""
    return [DEADLINE, *(f"faults.{fault}={share / len(FAULTS)}" for fault in FAULTS)]


def outcomes(config: ExperimentConfig, folder: Path) -> Counter[str]:
    """Return how many messages had which outcome: ``used``, ``evaluated`` or the name of a fault.

    Raises:
        ValueError: A message has no outcome, more than one, or another than planned; or bytes are missing.
    """
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    ledger = Ledger.read_csv(folder / "communication.csv")
    found: Counter[str] = Counter()
    for line in map(json.loads, text.splitlines()):
        rows = list(ledger.select(server_round=line["server_round"]))
        for direction in ("uplink", "downlink"):
            counted = sum(row.wire_bytes for row in rows if row.direction == direction)
            if counted != line[f"{direction}_wire_bytes"]:
                raise ValueError(
                    f"round {line['server_round']}: {counted} bytes of {direction} in the ledger"
                )
        found.update(_of_round(config, line, rows))
    if found.total() != sum(row.direction == "downlink" for row in ledger.rows):
        raise ValueError(f"{found.total()} outcomes, {len(ledger)} rows")
    return found


def _of_round(config: ExperimentConfig, line: Mapping[str, Any], rows: Sequence[Transfer]) -> Iterator[str]:
    """Yield the outcome of each message of a round."""
    plan, server_round = fault_plan(config), line["server_round"]
    sent = {"train": line.get("cohort") or [], "evaluate": _evaluated(line)}
    for phase, clients in sent.items():
        reached = sorted(r.client_id for r in rows if r.phase == phase and r.direction == "downlink")
        if reached != sorted(clients):
            raise ValueError(f"round {server_round}: {phase} was sent to {reached}, not to {clients}")
    for client_id in sent["train"]:
        planned = plan.of(server_round, client_id)
        replies = [r for r in rows if (r.client_id, r.phase, r.direction) == (client_id, "train", "uplink")]
        _check_outcome(planned, line, client_id, replies)
        yield planned or "used"
    yield from ["evaluated"] * len(sent["evaluate"])


def _check_outcome(
    planned: str | None, line: Mapping[str, Any], client_id: int, replies: Sequence[Transfer]
) -> None:
    """Raise ValueError where a training message ended in another way than planned, or in two ways."""
    where = f"round {line['server_round']}, client {client_id}, {planned} was planned"
    failures = [failure for failure in line["failed"] if failure["client_id"] == client_id]
    if [failure.get("fault", "other") for failure in failures] != ([planned] if planned else []):
        raise ValueError(f"{where}: failed are {failures}")
    if ("train_loss" in line["clients"].get(str(client_id), {})) != (planned in (None, "duplicate")):
        raise ValueError(f"{where}: its update was used or missed against that")
    if [reply.status for reply in replies] != STATUSES.get(planned or "", ["ok"]):
        raise ValueError(f"{where}: the ledger has {replies}")


def _evaluated(line: Mapping[str, Any]) -> list[int]:
    return [int(client_id) for client_id, entry in line["clients"].items() if "eval_examples" in entry]


def compare(rounds: int, share: float, root: Path) -> tuple[list[Row], Counter[str]]:
    """Run with and without faults; return a row each, and the outcomes of the run with them."""
    rows, found = [], Counter[str]()
    for name, overrides in {"none": [], f"{share:.0%} of the messages": faulty(share)}.items():
        place = [f"output.root={root}", f"output.name={'faulty' if overrides else 'clean'}"]
        settings = [*SETTING, f"federation.rounds={rounds}", *place, *overrides]
        config = load_config("quickstart", settings)
        folder = run_experiment(config, display=SilentDisplay())  # type: ignore[arg-type]
        found = outcomes(config, folder)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        sent = summary["communication"]["total_wire_bytes"]
        rows.append(
            {
                "workload": f"quickstart, {rounds} rounds, 4 local steps",
                "faults": name,
                "rounds completed": str(summary["rounds"]),
                "final accuracy": f"{summary['final']:.1%}",
                "updates used": f"{found['used'] + found['duplicate']:,}",
                "messages with one outcome": f"{found.total():,} of {found.total():,}",
                "MB sent": f"{sent / 1e6:.1f}",
            }
        )
    return rows, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, check, and write ``docs/results/unreliable.md``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.2, help="of the training messages that are struck")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        try:
            rows, found = compare(given.rounds, given.share, Path(root))
        except ValueError as error:
            sys.exit(f"a message is not accounted for: {error}")
    counts = ", ".join(f"{name} {found[name]}" for name in (*FAULTS, "used", "evaluated"))
    command = f"python -m benchmarks.unreliable --rounds {given.rounds} --share {given.share}"
    print(write_results("unreliable", command, rows, notes=f"Outcomes: {counts}."))


if __name__ == "__main__":
    main()

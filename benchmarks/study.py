"""What the studies share: one run without a run folder, its figures, and tables with mean and spread.

``benchmarks.aggregators`` and ``benchmarks.codecs`` name settings and variants; this file trains each of them
with several seeds through the same server, client app and ledger as ``fedlora run``, and writes
``docs/results/<study>.json`` after every run, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes

from benchmarks.machine import RESULTS, describe_machine
from federated.communication.ledger import Ledger
from federated.communication.metered_grid import MeteredGrid
from federated.config.config_files import load_config
from federated.engines.inprocess import InProcessGrid, node_id_of
from federated.rounds.batches import evaluate_server
from federated.rounds.client import client_app
from federated.rounds.global_model import clients_mean, load_global_state
from federated.rounds.run import Run, build_run
from federated.rounds.run_strategy import build_strategy
from federated.rounds.strategy import LoRAStrategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One row of a table: a name, and what it changes in the configuration."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One task: a shipped configuration and what the study changes in it."""

    name: str
    config: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The figures of one run.

    Attributes:
        setting: Name of the setting.
        variant: Name of the variant.
        seed: Of the run.
        zero_shot: Accuracy of the pre-trained model on the server's test rows.
        accuracy: Of the global model at the end; None where there is none.
        clients_accuracy: Mean of the clients on their own test rows, weighted by rows.
        uplink_mb: Payload of all training messages to the server, 10^6 bytes.
        downlink_mb: Likewise to the clients.
        aggregation_error: Mean over the rounds; None without a global model or adapters.
        server_ms: Median processor time of ``Aggregator.apply`` in a round, milliseconds.
        seconds: Processor time of the whole run.
    """

    setting: str
    variant: str
    seed: int
    zero_shot: float
    accuracy: float | None
    clients_accuracy: float
    uplink_mb: float
    downlink_mb: float
    aggregation_error: float | None
    server_ms: float
    seconds: float


def run_once(setting: Setting, variant: Variant, seed: int) -> Outcome:
    """Train one variant with one seed."""
    started = time.process_time()
    config = load_config(setting.config, [*setting.overrides, *variant.overrides, f"seed={seed}"])
    experiment = build_run(config)
    experiment.reset()
    zero_shot = evaluate_server(experiment)["accuracy"]
    ledger = Ledger()
    clients = {i: node_id_of(i) for i in range(experiment.num_clients)}
    of_node = {node_id: i for i, node_id in clients.items()}
    grid = InProcessGrid(client_app(experiment), experiment.num_clients)
    strategy = build_strategy(experiment, clients)
    apply_ms, errors = _watch(strategy)
    strategy.start(
        MeteredGrid(grid, ledger, of_node.__getitem__),
        initial_arrays=strategy.packed_state(),
        num_rounds=config.federation.rounds,
        timeout=config.federation.timeout_seconds,
    )
    totals = {d: ledger.total(phase="train", direction=d).payload_bytes for d in ("uplink", "downlink")}
    return Outcome(
        setting=setting.name,
        variant=variant.name,
        seed=seed,
        zero_shot=zero_shot,
        accuracy=global_accuracy(experiment, strategy),
        clients_accuracy=clients_mean(strategy.record, "accuracy").get("accuracy", float("nan")),
        uplink_mb=totals["uplink"] / 1e6,
        downlink_mb=totals["downlink"] / 1e6,
        aggregation_error=statistics.fmean(errors) if errors else None,
        server_ms=statistics.median(apply_ms),
        seconds=time.process_time() - started,
    )


def global_accuracy(experiment: Run, strategy: LoRAStrategy) -> float | None:
    """Return the final accuracy of the global model; None where there is none."""
    if not experiment.aggregator.has_global_model:
        return None
    load_global_state(experiment, strategy.server_state)
    return evaluate_server(experiment)["accuracy"]


def _watch(strategy: LoRAStrategy) -> tuple[list[float], list[float]]:
    """Record the processor time of each aggregation and its error, as the rounds go by."""
    times: list[float] = []
    errors: list[float] = []
    apply, close = strategy.aggregator.apply, strategy._close

    def timed_apply(*arguments: Any) -> Any:
        started = time.process_time()
        result = apply(*arguments)
        times.append(1e3 * (time.process_time() - started))
        return result

    def noted_close(*arguments: Any) -> None:
        close(*arguments)
        if "aggregation_error" in strategy.record.metrics:
            errors.append(strategy.record.metrics["aggregation_error"])

    strategy.aggregator = replace(strategy.aggregator, apply=timed_apply)
    strategy._close = noted_close  # type: ignore[method-assign]
    return times, errors


# ---- a study


def run_study(
    name: str,
    settings: Sequence[Setting],
    variants: Sequence[Variant],
    seeds: Iterable[int],
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Train what ``<name>.json`` lacks, and return its content.

    Args:
        name: Of the study and its file.
        settings: Tasks.
        variants: Rows.
        seeds: Each variant is run once with each.
        folder: Where the file is.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    study = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"outcomes": []}
    done = {(row["setting"], row["variant"], row["seed"]) for row in study["outcomes"]}
    for seed in seeds:  # seeds outermost: an interrupted study is complete for the seeds it has
        for setting in settings:
            for variant in variants:
                if (setting.name, variant.name, seed) in done:
                    continue
                outcome = run_once(setting, variant, seed)
                study["outcomes"].append(asdict(outcome))
                study["machine"] = describe_machine()
                study.setdefault("settings", {})[setting.name] = [setting.config, *setting.overrides]
                path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
                log.info("%s", outcome)
    return study


# ---- tables


def values_of(study: dict[str, Any], setting: str, variant: str, figure: str) -> list[float]:
    """Return one figure of all seeds, in seed order; without those that have none."""
    rows = [r for r in study["outcomes"] if (r["setting"], r["variant"]) == (setting, variant)]
    rows.sort(key=lambda row: row["seed"])
    return [row[figure] for row in rows if row[figure] is not None]


def paired_differences(study: dict[str, Any], setting: str, variant: str, baseline: str) -> list[float]:
    """Return accuracy minus the baseline's with the same seed, in points, for the seeds that both have."""
    found = {
        (row["variant"], row["seed"]): row["accuracy"]
        for row in study["outcomes"]
        if row["setting"] == setting and row["accuracy"] is not None
    }
    seeds = sorted(seed for name, seed in found if name == variant and (baseline, seed) in found)
    return [100 * (found[variant, seed] - found[baseline, seed]) for seed in seeds]


def mean_and_spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Return mean ± sample standard deviation as text; a dash for no values."""
    if not values:
        return "–"
    mean = statistics.fmean(values) * scale
    spread = statistics.stdev(values) * scale if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def table(
    study: dict[str, Any],
    setting: str,
    variants: Sequence[str],
    columns: Sequence[tuple[str, Callable[[str], str]]],
) -> str:
    """Return a Markdown table, one row a variant.

    Args:
        study: Content of the JSON file.
        setting: Which setting.
        variants: Rows in order.
        columns: Heading, and variant -> text of the cell.
    """
    present = [v for v in variants if values_of(study, setting, v, "seconds")]
    lines = ["| " + " | ".join(["", *(heading for heading, _ in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for variant in present:
        lines.append("| " + " | ".join([variant, *(cell(variant) for _, cell in columns)]) + " |")
    return "\n".join(lines)


# ---- plots


def draw_differences(
    panel: Axes, study: dict[str, Any], setting: str, payload_of: Mapping[str, float], baseline: str
) -> None:
    """Draw each variant's paired difference in accuracy against its payload on a logarithmic axis.

    Variants of one payload stand side by side, so that none hides another.

    Args:
        panel: Where.
        study: Content of the JSON file.
        setting: Which setting.
        payload_of: Variant -> payload, in the order of the legend.
        baseline: What accuracies are compared with; the dotted line.
    """
    panel.axhline(0.0, color="grey", lw=0.8, ls=":")
    positions = _side_by_side(payload_of)
    for index, name in enumerate(payload_of):
        points = paired_differences(study, setting, name, baseline)
        if points:
            panel.errorbar(
                [positions[name]], [statistics.fmean(points)], fmt="os^Dv"[index % 5], ms=5, lw=0.8,
                yerr=[statistics.stdev(points) if len(points) > 1 else 0.0], label=name, capsize=2,
                color=colormaps["tab20"](2 * index % 20 + (index >= 10)), alpha=0.85,
            )  # fmt: skip
    panel.set(xscale="log")
    panel.minorticks_off()
    panel.grid(visible=True, which="major", lw=0.3)


def _side_by_side(payload_of: Mapping[str, float], step: float = 1.07) -> dict[str, float]:
    """Return payloads with those that agree to 3 % moved apart by the factor ``step``, around their place."""
    positions: dict[str, float] = {}
    for name, payload in payload_of.items():
        group = [other for other, near in payload_of.items() if abs(near / payload - 1) < 0.03]
        positions[name] = payload * step ** (group.index(name) - (len(group) - 1) / 2)
    return positions


def machine_line(study: dict[str, Any]) -> str:
    """Return the sentence that names machine and versions."""
    seeds = sorted({row["seed"] for row in study["outcomes"]})
    return (
        f"{len(seeds)} seeds, mean ± sample standard deviation, on {study['machine']}. Times are those "
        "of the processor."
    )

"""The aggregators against each other: accuracy, megabytes, aggregation error and server time.

Run with ``python -m benchmarks.aggregators`` (about a quarter of an hour on one core; ``--quick`` for a
look). Domain shift between emoji vendors, and Fashion-MNIST split by Dirichlet(0.5) and Dirichlet(0.1), on
the bundled model. All methods have the same rank, learning rate and number of steps; none was tuned. Writes
``docs/results/aggregators.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.machine import RESULTS
from benchmarks.study import (
    Setting,
    Variant,
    draw_differences,
    machine_line,
    mean_and_spread,
    paired_differences,
    run_study,
    table,
    values_of,
)

SEEDS = (0, 1, 2)

COMMON = (
    "lora.layers=[2, 3]",
    "federation.rounds=6",
    "client.local_steps=6",
    "client.batch_size=16",
    "evaluation.every=6",
)

FASHION = (
    *COMMON,
    "task.templates=['a photo of a {}.']",
    "client.learning_rate=3e-3",
    "partition.num_clients=8",
    "federation.cohort_size=4",
    "data.max_train_samples=1600",
    "data.max_test_samples=500",
    "partition.options.min_samples=10",
)

SETTINGS = (
    Setting(
        "emoji vendors", "domain_shift", (*COMMON, "data.max_train_samples=1600", "data.max_test_samples=500")
    ),
    Setting("Dirichlet 0.5", "quickstart", (*FASHION, "partition.options.alpha=0.5")),
    Setting("Dirichlet 0.1", "quickstart", (*FASHION, "partition.options.alpha=0.1")),
)

METHODS = (
    "fedavg", "ffa", "rolora", "flora", "fedex", "flexlora", "hetlora", "lora_fair", "fedsvd", "fed_sb",
    "fedsa", "dual",
)  # fmt: skip

VARIANTS = (
    Variant("head only", ("model.type=clip", "model.fine_tuning=head_only")),
    *(Variant(name, (f"aggregation.name={name}",)) for name in METHODS),
    Variant("fedex, rank_cap 8", ("aggregation={name: fedex, options: {rank_cap: 8}}",)),
)
NAMES = tuple(variant.name for variant in VARIANTS)
BASELINE = "fedavg"


def report(study: dict[str, Any]) -> str:
    """Return the study as Markdown."""
    parts = [f"{machine_line(study)}\n"]
    for setting in SETTINGS:
        figures = dict.fromkeys(NAMES, setting.name)
        if not any(values_of(study, setting.name, name, "seconds") for name in figures):
            continue
        zero_shot = [row["zero_shot"] for row in study["outcomes"] if row["setting"] == setting.name]
        parts.append(
            f"### {setting.name}\n\nThe pre-trained model (zero-shot, 0 bytes): "
            f"{100 * statistics.fmean(zero_shot):.1f} %.\n"
        )
        parts.append(_table(study, setting.name) + "\n")
    return "\n".join(parts)


def _table(study: dict[str, Any], setting: str) -> str:
    def cell(figure: str, scale: float = 1.0, digits: int = 1) -> Any:
        return lambda variant: mean_and_spread(values_of(study, setting, variant, figure), scale, digits)

    def mean_of(figure: str, digits: int) -> Any:
        return lambda variant: mean_and_spread(values_of(study, setting, variant, figure), 1.0, digits).split(
            " ± "
        )[0]

    def error(variant: str) -> str:
        values = values_of(study, setting, variant, "aggregation_error")
        return f"{sum(values) / len(values):.1e}" if values else "–"

    def difference(variant: str) -> str:
        return mean_and_spread(paired_differences(study, setting, variant, BASELINE))

    return table(
        study,
        setting,
        NAMES,
        (
            ("global accuracy, %", cell("accuracy", 100)),
            ("minus fedavg, paired", difference),
            ("clients' own, %", cell("clients_accuracy", 100)),
            ("MB up", mean_of("uplink_mb", 3)),
            ("MB down", mean_of("downlink_mb", 3)),
            ("aggregation error", error),
            ("server, ms a round", mean_of("server_ms", 1)),
        ),
    )


def plot(study: dict[str, Any], path: Path) -> None:
    """Draw the paired difference in global accuracy against total payload, one panel a setting."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    settings = [s.name for s in SETTINGS if any(row["setting"] == s.name for row in study["outcomes"])]
    figure, panels = plt.subplots(1, len(settings), figsize=(4.0 * len(settings), 3.6), squeeze=False)
    names = [name for name in NAMES if name not in ("fedavg", "fedsa")]  # fedsa has no global model
    for panel, setting in zip(panels[0], settings, strict=True):
        payload_of = {name: payload for name in names if (payload := _payload(study, setting, name))}
        draw_differences(panel, study, setting, payload_of, BASELINE)
        panel.set(xlabel="payload of all rounds, up and down, MB", title=setting)
        panel.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    panels[0][0].set_ylabel("global accuracy minus fedavg,\nsame seed, points")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _payload(study: dict[str, Any], setting: str, variant: str) -> float:
    """Return megabytes up and down; 0 for what has not been run."""
    figures = [values_of(study, setting, variant, figure)[:1] for figure in ("uplink_mb", "downlink_mb")]
    return sum(sum(values) for values in figures)


def main() -> None:
    """Run the study and write its tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, Dirichlet 0.5 alone, not written to docs/"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings, seeds = (SETTINGS[1:2], SEEDS[:1]) if arguments.quick else (SETTINGS, SEEDS)
    folder = arguments.output or (Path("runs/benchmarks") if arguments.quick else RESULTS)
    study = run_study("aggregators", settings, VARIANTS, seeds, folder)
    (folder / "aggregators.md").write_text(report(study), encoding="utf-8")
    plot(study, folder / "aggregators.png")


if __name__ == "__main__":
    main()

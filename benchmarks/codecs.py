"""The uplink codecs against each other: accuracy, bytes, and what a codec loses of an update.

Run with ``python -m benchmarks.codecs`` (some ten minutes on one core; ``--quick`` for a look).
Fashion-MNIST split by Dirichlet(0.5) on the bundled model, ``fedavg``, AdamW clients; only the uplink is
compressed. Then the quick start as it is shipped, with fp32 and with int8. Writes
``docs/results/codecs.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.aggregators import FASHION
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
from federated.communication.codec import codec_from_name
from models.state import State, layout_of

SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4, 5, 6)

CODECS = (
    "fp32", "int8", "fp16", "bf16", "int8:sr", "int4", "int4:sr", "ternary", "topk:0.1", "topk:0.1:ef",
    "topk:0.25:ef+int8", "topk:0.1:ef+int8",
)  # fmt: skip

SETTING = Setting(
    "Dirichlet 0.5", "quickstart", (*FASHION, "partition.options.alpha=0.5", "data.max_test_samples=1000")
)
VARIANTS = tuple(Variant(name, (f"communication.uplink={name}",)) for name in CODECS)
CLAIM = VARIANTS[:2]
"""fp32 and int8, which more seeds compare."""

SHIPPED = Setting("quick start as shipped", "quickstart", ())
"""The run that the README shows, with nothing changed but the codec."""


def update_error(name: str, *, seed: int = 0) -> float:
    """Return ||decoded - sent|| / ||sent|| of one update with the shape of ViT-B/32's text adapters, r = 16.

    The values are normal, with a magnitude of its own for each rank component.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for module in ("q_proj", "k_proj", "v_proj", "out_proj"):
        sizes = torch.rand(16, generator=generator) * 2
        state[f"{module}.lora_A.weight"] = torch.randn(16, 512, generator=generator) * sizes[:, None]
        state[f"{module}.lora_B.weight"] = torch.randn(512, 16, generator=generator) * sizes
    codec = codec_from_name(name)
    decoded = codec.decode(codec.encode(state, np.random.default_rng(seed)), layout_of(state))
    lost = sum(float((decoded[n] - t).square().sum()) for n, t in state.items())
    return (lost / sum(float(t.square().sum()) for t in state.values())) ** 0.5


def differences(study: dict[str, Any], name: str, setting: str = SETTING.name) -> list[float]:
    """Return accuracy minus that of fp32 with the same seed, in points."""
    return paired_differences(study, setting, name, "fp32")


def report(study: dict[str, Any]) -> str:
    """Return the study as Markdown."""
    full = values_of(study, SETTING.name, "fp32", "uplink_mb")[0]

    def accuracy(name: str) -> str:
        return mean_and_spread(values_of(study, SETTING.name, name, "accuracy")[: len(SEEDS)], 100)

    def share(name: str) -> str:
        return f"{100 * values_of(study, SETTING.name, name, 'uplink_mb')[0] / full:.1f}"

    rows = table(
        study,
        SETTING.name,
        CODECS,
        (
            (f"accuracy, %, seeds 0 to {SEEDS[-1]}", accuracy),
            ("minus fp32, points, paired", lambda name: mean_and_spread(differences(study, name), digits=2)),
            ("seeds", lambda name: str(len(differences(study, name)))),
            ("MB up", lambda name: f"{values_of(study, SETTING.name, name, 'uplink_mb')[0]:.3f}"),
            ("of fp32, %", share),
            ("error of one update", lambda name: f"{update_error(name):.1e}"),
        ),
    )
    claims = [text for text in (claim(study), claim_as_shipped(study)) if text]
    return "\n\n".join([machine_line(study), rows, *claims]) + "\n"


def claim(study: dict[str, Any], setting: str = SETTING.name) -> str:
    """Say whether int8 keeps within 0.5 points and 26 % of the bytes, with the uncertainty of the answer."""
    points = differences(study, "int8", setting)
    mean = statistics.fmean(points)
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else float("nan")
    full, small = (values_of(study, setting, name, "uplink_mb")[0] for name in ("fp32", "int8"))
    holds = "holds" if mean >= -0.5 and small / full <= 0.26 else "does not hold"
    return (
        f"int8 against fp32: {mean:+.2f} points (standard error {error:.2f}, {len(points)} paired seeds) at "
        f"{100 * small / full:.1f} % of the uplink payload, scales counted. The claim of at most 0.5 "
        f"points lost and at most 26 % {holds} in the mean."
    )


def claim_as_shipped(study: dict[str, Any]) -> str:
    """Say the same of the quick start with nothing else changed; empty where it has not been run."""
    if not differences(study, "int8", SHIPPED.name):
        return ""
    accuracies, traffic = (
        [values_of(study, SHIPPED.name, variant.name, figure) for variant in CLAIM]
        for figure in ("accuracy", "uplink_mb")
    )
    return (
        f"The quick start as it is shipped (`fedlora run quickstart`, and with `communication.uplink=int8`): "
        f"{mean_and_spread(accuracies[0], 100)} % with fp32 ({traffic[0][0]:.3f} MB up), "
        f"{mean_and_spread(accuracies[1], 100)} % with int8 ({traffic[1][0]:.3f} MB up); "
        + claim(study, SHIPPED.name)
    )


def plot(study: dict[str, Any], path: Path) -> None:
    """Draw the paired difference in accuracy against the uplink payload."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, panel = plt.subplots(figsize=(5.6, 3.4))
    traffic = {name: values_of(study, SETTING.name, name, "uplink_mb")[:1] for name in CODECS}
    shares = {name: 100 * mb[0] / traffic["fp32"][0] for name, mb in traffic.items() if mb}
    shares.pop("fp32")
    draw_differences(panel, study, SETTING.name, shares, "fp32")
    panel.set(xlabel="uplink payload, % of fp32", ylabel="accuracy minus fp32, same seed, points")
    panel.set_xticks([5, 10, 25, 50, 100], ["5", "10", "25", "50", "100"])
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the study and write its table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fp32 and int8, not written to docs/")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = arguments.output or (Path("runs/benchmarks") if arguments.quick else RESULTS)
    if arguments.quick:
        study = run_study("codecs", [SETTING], CLAIM, SEEDS[:1], folder)
    else:
        run_study("codecs", [SETTING], VARIANTS, SEEDS, folder)
        run_study("codecs", [SETTING], CLAIM, MORE_SEEDS, folder)
        study = run_study("codecs", [SHIPPED], CLAIM, SEEDS, folder)
    (folder / "codecs.md").write_text(report(study), encoding="utf-8")
    plot(study, folder / "codecs.png")


if __name__ == "__main__":
    main()

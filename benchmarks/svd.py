"""QR-core SVD of a sum of low-rank products against the SVD of the dense matrix: time and agreement.

Run with ``python -m benchmarks.svd``. One thread, since that is what a server beside clients has; each pair
of timings is taken in turn, and medians with quartiles are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from federated.methods.lowrank import LowRank, svd, truncate

SIZES = ((768, 768, 10, 8), (768, 768, 10, 16), (768, 768, 32, 16), (3072, 768, 10, 16))
"""(d_out, d_in, clients, rank)"""


@dataclass(frozen=True)
class Comparison:
    """Timings of one size, in milliseconds: (first quartile, median, third quartile)."""

    d_out: int
    d_in: int
    num_clients: int
    rank: int
    qr_core: tuple[float, float, float]
    dense: tuple[float, float, float]
    relative_difference: float

    @property
    def ratio(self) -> float:
        """How many times faster the QR core is."""
        return self.dense[1] / self.qr_core[1]


def compare(d_out: int, d_in: int, num_clients: int, rank: int, *, repeats: int = 7) -> Comparison:
    """Time both ways to the best rank-r approximation of a sum of ``num_clients`` rank-r products.

    The factors are float32; the QR core computes in float64 as in a run, the dense SVD in float32 to its
    advantage. The difference is that of the two truncations, relative to the dense one.
    """
    generator = torch.Generator().manual_seed(0)
    columns = num_clients * rank
    matrix = LowRank(
        torch.randn(d_out, columns, generator=generator) / columns,
        torch.randn(columns, d_in, generator=generator),
    )
    core_times, dense_times = [], []
    for _ in range(repeats + 1):
        core_times.append(_milliseconds(lambda: svd(matrix, rank)))
        dense_times.append(_milliseconds(lambda: torch.linalg.svd(matrix.dense(), full_matrices=False)))
    u, singular_values, vt = torch.linalg.svd(
        matrix.left.double() @ matrix.right.double(), full_matrices=False
    )
    best = (u[:, :rank] * singular_values[:rank]) @ vt[:rank]
    difference = float((truncate(matrix, rank).dense().double() - best).norm() / best.norm())
    quartiles = (_quartiles(core_times[1:]), _quartiles(dense_times[1:]))  # the first one warms up
    return Comparison(d_out, d_in, num_clients, rank, *quartiles, difference)


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def main() -> None:
    """Print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("d_out x d_in, K, r: QR core ms (quartiles), dense ms (quartiles), dense / QR core, difference")
    for size in SIZES:
        result = compare(*size, repeats=repeats)
        spread = [f"{t[1]:.1f} ({t[0]:.1f}-{t[2]:.1f})" for t in (result.qr_core, result.dense)]
        print(
            f"{result.d_out}x{result.d_in}, {result.num_clients}, {result.rank}: {spread[0]}, {spread[1]}, "
            f"{result.ratio:.1f}x, {result.relative_difference:.1e}"
        )


if __name__ == "__main__":
    main()

"""Everything about speed, one table: ``python -m benchmarks.speed`` (about an hour on two cores).

Runs the benchmarks named below one after another, each in a process of its own, and joins their rows in
``docs/results/speed.{json,md}``. Every ratio is to something measured in the same run. ``--join`` only joins
what earlier runs left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks.machine import RESULTS, Row, write_results

NAMES = ("limit", "batched", "caches", "peers", "scaling")
COLUMNS = ("workload", "contender", "time", "ratio", "against")


def joined() -> list[Row]:
    """Return the rows of all benchmarks: the columns that they share, and memory where it is measured."""
    rows: list[Row] = []
    for name in NAMES:
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row in content["rows"]:
            rows.append(
                {
                    "benchmark": name,
                    **{column: row[column] for column in COLUMNS},
                    "peak memory": row.get("peak memory", ""),
                }
            )
    return rows


def main() -> None:
    """Run and join."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--join", action="store_true", help="only join what is in docs/results")
    if not parser.parse_args().join:
        for name in NAMES:
            print(f"== benchmarks.{name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    print(write_results("speed", "python -m benchmarks.speed", joined()))


if __name__ == "__main__":
    main()

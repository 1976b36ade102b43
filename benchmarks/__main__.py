"""Every benchmark in turn: ``python -m benchmarks`` (``make bench``); takes hours on two cores."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("svd", "speed", "lora_vs_full", "codecs", "aggregators")


def main() -> None:
    """Run them one after another and stop at the first failure."""
    for name in NAMES:
        print(f"== benchmarks.{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()

"""Memory does not grow with the number of clients: one base model, and a context only once it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
run_experiment(load_config("quickstart", sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory_kb(folder: Path, num_clients: int) -> int:
    overrides = [
        f"partition.num_clients={num_clients}",
        "partition.name=iid",
        "partition.options={}",
        "federation.cohort_size=4",
        "federation.rounds=2",
        "client.local_steps=2",
        "evaluation.clients=false",
        f"output.root={folder}",
        f"output.name=clients{num_clients}",
    ]
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, *overrides], check=True, capture_output=True, text=True
    ).stdout
    return int(output.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("num_clients", [100, 2000])
def test_peak_memory_is_within_ten_per_cent_of_a_run_with_four_clients(
    tmp_path: Path, num_clients: int
) -> None:
    assert peak_memory_kb(tmp_path, num_clients) < 1.1 * peak_memory_kb(tmp_path, 4)

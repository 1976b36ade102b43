"""What the files of examples/ compute is what the framework computes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from federated.config.schema import load_config
from federated.data.dataset import load_data
from federated.data.partition import partition
from federated.engines.simulation import run_experiment
from lora.loading import load_lora_adapters

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """Import one file of examples/."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_a_run_computes_what_the_plain_loops_of_one_round_compute(tmp_path: Path) -> None:
    one_round = example("one_round")
    how = one_round.LocalSteps(num_steps=3, batch_size=8)
    data = load_data("fashion_mnist", max_train_samples=60, max_test_samples=20)
    split = partition(data.train, name="iid", num_clients=3, seed=0, label_column=data.label_column)
    model = one_round.build_model(data.class_names, seed=0)
    pixels, labels = one_round.load_pixels(data, "train", model)
    start = dict(model.get_state())
    server = start
    for server_round in (1, 2):
        server = one_round.one_round(
            model, server, split.indices, pixels, labels, how=how, seed=0, server_round=server_round
        )

    overrides = [
        *("data.max_train_samples=60", "data.max_test_samples=20", "partition.local_test_fraction=0"),
        *("partition.name=iid", "partition.options={}", "partition.num_clients=3", "federation.rounds=2"),
        *("client.local_steps=3", "client.batch_size=8", "output.report=false", f"output.root={tmp_path}"),
    ]
    folder = run_experiment(load_config("quickstart", overrides))
    load_lora_adapters(model, folder / "adapter")
    learnt = torch.cat([(server[name] - start[name]).flatten() for name in server])
    differs = torch.cat([(model.get_state()[name] - server[name]).flatten() for name in server])
    assert float(differs.norm() / learnt.norm()) < 1e-3  # AdamW makes whole steps of gradients near 0

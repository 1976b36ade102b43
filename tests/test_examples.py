"""What the files of examples/ compute is what the framework computes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from federated import load_plugins
from federated.config.config_files import load_config
from federated.data.dataset import load_data
from federated.data.partition import partition
from federated.engines.simulation import run_experiment
from federated.methods import Update, aggregator_from_name
from lora.loading import load_lora_adapters
from models.errors import UserError
from models.tasks import TASKS
from tests.command import fedlora, forget_plugins
from tests.small_run import SMALL

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


# ---- plugins

OWN = sorted(path for path in EXAMPLES.glob("own_*.py"))


@pytest.fixture
def plugin(request: pytest.FixtureRequest) -> Iterator[None]:
    """Load a file of examples/ for a test."""
    load_plugins([EXAMPLES / f"{request.param}.py"])
    yield
    forget_plugins()


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_the_command_at_the_top_of_a_plugin_runs_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    monkeypatch.chdir(EXAMPLES.parent)
    (command,) = [line.split() for line in text.splitlines() if line.startswith("    fedlora run ")]
    status, _, error = fedlora(capsys, *command[1:], *SMALL, f"output.root={tmp_path}", "output.report=false")
    assert status == 0, error
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "plugins.json").read_text())[0]["path"] == str(path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in lines if line.get("failed") or line.get("skipped")]
    forget_plugins()


@pytest.mark.parametrize("plugin", ["own_aggregator"], indirect=True)
def test_a_trimmed_mean_lies_between_the_honest_clients(plugin: None) -> None:
    rule = aggregator_from_name("trimmed_mean", {"share": "0.2"})
    rng = torch.Generator().manual_seed(0)
    names = {"m.lora_A.weight": (2, 5), "m.lora_B.weight": (4, 2)}
    states = [{n: torch.randn(shape, generator=rng) for n, shape in names.items()} for _ in range(4)]
    states.append({name: torch.full(shape, 1e6) for name, shape in names.items()})
    server = rule.init({name: torch.zeros(shape) for name, shape in names.items()}, {"m": 1.0})
    updates = [
        Update(k, num_examples=k + 1, state=state, scaling={"m": 1.0}) for k, state in enumerate(states)
    ]
    after = rule.apply(server, updates).state
    for name in names:
        values = np.sort(np.stack([state[name].numpy() for state in states]), axis=0)
        np.testing.assert_allclose(after[name].numpy(), values[1:-1].mean(axis=0), rtol=1e-6)
    with pytest.raises(UserError, match=r"aggregation\.options\.share: .*0\.5"):
        aggregator_from_name("trimmed_mean", {"share": 0.5})


@pytest.mark.parametrize("plugin", ["own_data"], indirect=True)
def test_stripes_are_a_function_of_the_seed(plugin: None) -> None:
    first, again, other = (load_data("stripes", seed=seed, num_images=40, noise=0.1) for seed in (0, 0, 1))
    pixels = [np.stack([np.asarray(image) for image in data.test["image"]]) for data in (first, again, other)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    with pytest.raises(UserError, match=r"data\.options\.num_images"):
        load_data("stripes", num_images=3)


@pytest.mark.parametrize("plugin", ["own_task"], indirect=True)
def test_the_smoothed_loss_is_the_cross_entropy_with_a_tenth_spread_over_the_classes(plugin: None) -> None:
    class Fake:
        def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["logits"]

    rng = torch.Generator().manual_seed(0)
    batch = {"logits": torch.randn(6, 3, generator=rng), "labels": torch.tensor([0, 0, 0, 0, 1, 2])}
    target = 0.9 * torch.eye(3)[batch["labels"]] + 0.1 / 3
    expected = -(target * batch["logits"].log_softmax(dim=1)).sum(dim=1).mean()
    task = TASKS["smoothed"]
    torch.testing.assert_close(task.loss(Fake(), batch), expected)
    always_zero = {**batch, "logits": torch.tensor([[1.0, 0, 0]]).expand(6, 3)}
    metrics = task.evaluate(Fake(), [always_zero])
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["balanced_accuracy"] == pytest.approx(1 / 3)


# ---- the notebook


def cells(kind: str) -> list[str]:
    """Return the text of a kind of cells of the notebook, in order."""
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_keeps_no_outputs() -> None:
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_the_notebook_has_the_steps_of_the_tutorial() -> None:
    page = (EXAMPLES.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
    steps = [line for text in cells("markdown") for line in text.splitlines() if line.startswith("## ")]
    assert steps == [line for line in page.splitlines() if line.startswith("## ")]


def test_every_cell_of_the_notebook_runs_and_plain_peft_finds_what_the_run_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *others = cells("code")
    names: dict[str, Any] = {}
    exec(first, names)
    assert {"OUTPUT", "SETTINGS"} <= names.keys()
    names["OUTPUT"]["report"] = False
    names["SETTINGS"] = {
        "federation": {"rounds": 1},
        "partition": {"num_clients": 2},
        "client": {"local_steps": 1},
        "data": {"max_train_samples": 100, "max_test_samples": 50},
    }
    for code in others:
        exec(code, names)
    assert abs(names["accuracy"] - names["lora"].summary["final"]) < 0.021  # one image in fifty
    assert [row.name for row in names["comparison"].rows] == ["lora", "lora_int8", "head"]
    assert names["lora"]._repr_html_().count("<img") == 7

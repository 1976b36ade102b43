"""Exported models, as people who do not have this package use them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from federated.engines.simulation import run_experiment
from federated.tools.export import export_model
from federated.tools.prediction import make_classifier
from federated.tools.trained_models import open_model
from lora import quick_clip_lora, save_lora_adapters
from models.clip import FederatedCLIPModel
from models.clip_loading import TINY_FOLDER
from models.errors import UserError
from tests.command import fedlora
from tests.small_run import small_config

FAST = (
    *("federation.rounds=1", "output.report=false", "client.learning_rate=0.02"),
    *("data.max_train_samples=100", "data.max_test_samples=20", "evaluation.clients=false"),
)
RUNS = {
    "fedavg": ("lora.train_temperature=true", "lora.bias=lora_only"),
    "flora": ("aggregation.name=flora",),
    "fedex": ("aggregation.name=fedex",),
    "full": ("model.type=clip",),
    "zero_shot": ("task.name=zero_shot", "lora.target_components=[vision,text]"),
    "fedsa": ("aggregation.name=fedsa", "evaluation.clients=true"),
    "adapted_head": ("lora.target_components=[vision,classifier]",),
    "retrieval": (),
}
MERGED = ("fedavg", "flora", "fedex", "full", "zero_shot", "adapted_head", "retrieval")
ADAPTERS = ("fedavg", "zero_shot", "adapted_head")
TEXTS = ["một con mèo", "a red car"]
_runs: dict[str, Path] = {}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Give the folder of a run of this module, made once."""
    root = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        if name not in _runs:
            shipped = "retrieval_vi" if name == "retrieval" else "quickstart"
            _runs[name] = run_experiment(
                small_config(root, shipped, [*FAST, *RUNS[name], f"output.name={name}"])
            )
        return _runs[name]

    yield made
    _runs.clear()


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def our_logits(model: FederatedCLIPModel) -> torch.Tensor:
    batch = {"pixel_values": torch.stack([model.preprocess(image) for image in pictures()])}
    with torch.no_grad():
        return model.logits(batch) if model.task.uses_head else model.zero_shot_logits(batch)


def card_code(folder: Path) -> str:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[
        0
    ]


@pytest.fixture(scope="module")
def by_cards(
    run_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], torch.Tensor]:
    """Logits by (run, merged) of the cards' own code, in a process that cannot import this package."""
    root = tmp_path_factory.mktemp("exports")
    np.save(root / "pictures.npy", np.stack([np.asarray(image) for image in pictures()]))
    cases = [*((name, True) for name in MERGED), *((name, False) for name in ADAPTERS)]
    parts = []
    for name, merged in cases:
        folder = export_model(run_of(name), root / f"{name}_{merged}", merge=merged)
        code = card_code(folder).replace('base = "path/to/tiny"', f"base = {str(TINY_FOLDER)!r}")
        call = f"similarities(images, {TEXTS!r})" if name == "retrieval" else "class_logits(images)"
        parts += [f"os.chdir({str(folder)!r})", code, f"numpy.save('logits.npy', {call}.numpy())"]
    start = """
import os, sys, numpy
from PIL import Image
for name in ("federated", "lora", "models"):
    sys.modules[name] = None
images = [Image.fromarray(values) for values in numpy.load("pictures.npy")]
"""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([start, *parts])],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        (name, merged): torch.from_numpy(np.load(root / f"{name}_{merged}" / "logits.npy"))
        for name, merged in cases
    }


@pytest.mark.parametrize("name", [name for name in MERGED if name != "retrieval"])
def test_a_merged_export_gives_our_logits_in_transformers_alone(name: str, by_cards, run_of) -> None:
    wanted = our_logits(open_model(run_of(name)).model)
    torch.testing.assert_close(by_cards[name, True], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_exported_adapter_gives_our_logits_in_peft_alone(name: str, by_cards, run_of) -> None:
    wanted = our_logits(open_model(run_of(name)).model)
    torch.testing.assert_close(by_cards[name, False], wanted, atol=1e-5, rtol=1e-5)


def test_a_merged_export_predicts_with_the_head_that_it_brings(run_of, tmp_path: Path) -> None:
    folder = export_model(run_of("fedavg"), tmp_path / "out", merge=True)
    trained, exported = open_model(run_of("fedavg")), open_model(folder)
    assert exported.model.class_names == trained.model.class_names
    assert make_classifier(exported).method == make_classifier(trained).method == "head"
    torch.testing.assert_close(our_logits(exported.model), our_logits(trained.model), atol=1e-5, rtol=1e-5)
    (folder / "classifier.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"classifier\.safetensors"):
        open_model(folder)


def test_a_head_that_names_no_classes_is_given_their_names(tmp_path: Path) -> None:
    wrapper = quick_clip_lora("tiny", 2, lora_r=2)
    opened = open_model(save_lora_adapters(wrapper, tmp_path / "own"))
    assert make_classifier(opened, ["circle", "square"]).method == "head"
    assert make_classifier(opened, ["circle", "square", "star"]).method != "head"
    with pytest.raises(UserError, match="--classes"):
        make_classifier(opened)


def test_captions_are_matched_by_the_card_of_a_retrieval_run(by_cards, run_of) -> None:
    model = open_model(run_of("retrieval")).model
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(image) for image in pictures()])
        images, words = (
            F.normalize(f, dim=-1) for f in (model.encode_image(pixels), model.encode_text(TEXTS))
        )
        wanted = model.temperature_scale() * images @ words.T
    torch.testing.assert_close(by_cards["retrieval", True], wanted, atol=1e-5, rtol=1e-5)


def test_a_merged_export_is_a_model_for_our_own_commands_too(run_of, tmp_path: Path) -> None:
    trained = open_model(run_of("zero_shot")).model
    folder = export_model(run_of("zero_shot"), tmp_path / "out", merge=True)
    again = FederatedCLIPModel(
        str(folder), 10, class_names=trained.class_names, templates=trained.templates, task="zero_shot"
    )
    torch.testing.assert_close(our_logits(again), our_logits(trained), atol=1e-5, rtol=1e-5)
    assert again.clip.config.id2label == dict(enumerate(trained.class_names))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever reads one reads all


def test_an_exported_adapter_opens_like_the_run_s_own(run_of, tmp_path: Path) -> None:
    folder = export_model(run_of("fedavg"), tmp_path / "out")
    assert torch.equal(our_logits(open_model(folder).model), our_logits(open_model(run_of("fedavg")).model))


def test_the_card_has_figures_and_settings_and_no_place_of_this_machine(run_of, tmp_path: Path) -> None:
    run = run_of("fedavg")
    card = (export_model(run, tmp_path / "out", merge=True) / "README.md").read_text(encoding="utf-8")
    for said in (
        "library_name: transformers",
        "accuracy before training",
        "sent in the whole run",
        "Ankle boot",
    ):
        assert said in card
    assert "learning_rate: 0.02" in card
    assert str(run.parent) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_an_adapter_that_is_not_the_whole_model_is_refused_with_the_remedy(
    name: str, run_of, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="into the base weights .* with --merge"):
        export_model(run_of(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_adapters_or_without_a_global_model_is_refused(run_of, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every weight .* --merge"):
        export_model(run_of("full"), tmp_path / "out")
    with pytest.raises(UserError, match="aggregated by fedsa.*no global model.*aggregation.name"):
        export_model(run_of("fedsa"), tmp_path / "out", merge=True)
    with pytest.raises(UserError, match="nothing trained"):
        export_model("tiny", tmp_path / "out", merge=True)


def test_the_command_lists_the_files_and_replaces_its_own_exports_alone(
    run_of, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of("fedavg"), tmp_path / "out"
    code, printed, _ = fedlora(capsys, "export", run, out)
    assert code == 0
    assert str(out / "README.md") in printed
    (out / "note.txt").write_text("mine", encoding="utf-8")
    code, _, errors = fedlora(capsys, "export", run, out, "--merge")
    assert code == 2
    assert "--overwrite" in errors
    assert fedlora(capsys, "export", run, out, "--merge", "--overwrite")[0] == 0
    assert (out / "model.safetensors").is_file()
    assert not (out / "adapter_model.safetensors").exists()
    assert (out / "note.txt").read_text(encoding="utf-8") == "mine"
    taken = shutil.copytree(run, tmp_path / "taken")
    code, _, errors = fedlora(capsys, "export", run, taken, "--overwrite")
    assert code == 2
    assert "is no export" in errors

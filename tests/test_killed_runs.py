"""Claims about runs that ended early, and about folders of theirs that lost a file: never another model."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.engines.simulation import run_experiment
from federated.rounds.checkpoint import latest_checkpoint
from federated.tools.evaluation import evaluate_source
from federated.tools.trained_models import open_model
from models import committed_folders
from models.errors import UserError
from tests.small_run import small_config

FLORA = ("aggregation.name=flora", "output.report=false")


@pytest.fixture(scope="module")
def flora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_experiment(small_config(tmp_path_factory.mktemp("runs"), overrides=FLORA))


@pytest.mark.parametrize("folder", ["adapter", "adapter_best"])
@pytest.mark.parametrize("file", ["base_delta.safetensors", "head.safetensors", "adapter_config.json"])
def test_an_adapter_that_lost_a_file_is_refused_and_the_file_named(
    flora: Path, folder: str, file: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(flora, run)
    (run / folder / file).unlink()
    for source in (run / folder, run if folder == "adapter" else run / folder):
        with pytest.raises(UserError, match=file):
            open_model(source)


def test_a_checkpoint_that_lost_a_file_is_refused_and_the_file_named(flora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flora, run)
    (latest_checkpoint(run) / "server.safetensors").unlink()
    with pytest.raises(UserError, match=r"server\.safetensors"):
        evaluate_source(run, output=tmp_path / "out")


def test_a_file_of_another_round_is_noticed(flora: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(flora, run)
    path = run / "adapter" / "base_delta.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"base_delta\.safetensors is not the file"):
        open_model(run)


@pytest.mark.parametrize(("folder", "call"), [(".commit_001_000001.part", 1), (".adapter.part", 1)])
def test_a_killed_run_is_evaluated_as_of_its_last_round_or_not_at_all(
    folder: str, call: int, tmp_path: Path
) -> None:
    config = small_config(tmp_path, overrides=[*FLORA, "federation.rounds=1", "client.local_steps=1"])
    child = os.fork()
    if child == 0:
        original, calls = committed_folders.write_json, 0

        def die(path: Path, value: Any) -> None:
            nonlocal calls
            calls += path.parent.name == folder
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, value)

        committed_folders.write_json = die
        try:
            run_experiment(config)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run = tmp_path / "quickstart"
    with pytest.raises(UserError, match="did not come to its end"):
        open_model(run)
    _, report = evaluate_source(run, output=tmp_path / "out")
    assert "100 samples" in report
    assert not (run / "summary.json").exists()
    run_experiment(config, overwrite=True)  # the dead run's lock and half-written files are no obstacle
    assert torch.isfinite(open_model(run).model.temperature_scale())
    assert not [name for name in os.listdir(run) if name.startswith(".") or name == "run.lock"]

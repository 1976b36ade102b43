"""The command line: what it prints, and that bad input ends with exit code 2 and leaves nothing behind."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import federated.engines.simulation
from federated.cli import main
from federated.commands.importing import modules_that_stay
from federated.config.config_files import shipped_names
from tests.small_run import SMALL


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def image_folder(root: Path) -> Path:
    for split in ("train", "val", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32), (40 * number + i, 100, 30 * i)).save(folder / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def test_run_prints_a_row_a_round_and_a_saving(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("run", "quickstart", *SMALL) == 0
    shown = capsys.readouterr().out
    for words in ("round 1/2", "round 2/2", "full model FedAvg", "accuracy", "runs/quickstart/report.html"):
        assert words in shown


def test_show_config_prints_what_the_run_will_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("show-config", "quickstart", "lora.r=4") == 0
    assert "r: 4" in capsys.readouterr().out


def test_show_config_alone_lists_the_shipped_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("show-config") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in shipped_names():
        assert name in shown
    assert "Baseline of quickstart: the same run, but the whole model trains and travels." in shown


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"fedlora {importlib.metadata.version('fedlora')}\n"


def test_info_states_the_documented_figures_of_vit_b32(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("info", "clip_lora") == 0
    shown = capsys.readouterr().out
    assert "491,520" in shown
    assert "151,277,313" in shown
    assert "1.97 MB" in shown
    assert "605.1 MB" in shown


def test_a_run_without_a_usable_update_ends_with_code_2_the_cause_and_its_folder(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run_command("run", "quickstart", *SMALL, "client.learning_rate=1e30") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: no update could be used in any round")
    assert "client.learning_rate" in shown.err
    assert "round 1, client 0: " in shown.err
    assert Path("runs/quickstart/report.html").is_file()
    assert "client 0: " in shown.out
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [message for message in warned if "not a finite number" in message]


def test_rounds_that_were_skipped_are_counted_at_the_end(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = federated.engines.simulation.train_locally

    def breaks_in_round_1(experiment: Any, assignment: Any, held: Any) -> Any:
        if assignment.server_round == 1:
            raise MemoryError("no memory left in [/tmp/x] of [client]")
        return original(experiment, assignment, held)

    monkeypatch.setattr(federated.engines.simulation, "train_locally", breaks_in_round_1)
    assert run_command("run", "quickstart", *SMALL) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("1 of 2 rounds were skipped")
    assert last.endswith("round 1, client 0: MemoryError: no memory left in [/tmp/x] of [client]")
    logging.getLogger("federated.engines.inprocess").warning("heard again")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "heard again"
    ]


def test_report_can_be_written_again() -> None:
    assert run_command("run", "quickstart", *SMALL) == 0
    Path("runs/quickstart/report.html").unlink()
    assert run_command("report", "runs/quickstart") == 0
    assert Path("runs/quickstart/report.html").is_file()


def test_a_run_folder_is_not_overwritten_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("run", "quickstart", *SMALL) == 0
    before = Path("runs/quickstart/metrics.jsonl").read_bytes()
    assert run_command("run", "quickstart", *SMALL) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("runs/quickstart/metrics.jsonl").read_bytes() == before
    assert run_command("run", "quickstart", *SMALL, "--overwrite") == 0


def test_a_folder_that_is_no_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/thesis.txt").write_text("years of work", encoding="utf-8")
    assert run_command("run", "quickstart", *SMALL, "--overwrite") == 2
    assert "not a run folder" in capsys.readouterr().err
    assert Path("runs/quickstart/thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quickstart", "client.learning_rte=1"], ["client.learning_rte", "client.learning_rate"]),
        (["quickstart", "federation.rounds=three"], ["federation.rounds"]),
        (["nowhere.yaml"], ["nowhere.yaml", "quickstart"]),
        (["quickstart", "federation.cohort_size=11"], ["cohort_size"]),
        (["quickstart", "partition.num_clients=5000"], ["5000", "4000"]),
        (["quickstart", "partition.num_clients=5000"], ["partition.num_clients: "]),
        (["quickstart", "partition.options.min_samples=401"], ["partition.options.min_samples: ", "400"]),
        (["quickstart", "partition.options.alpha=0"], ["partition.options.alpha: ", "above 0"]),
        (["quickstart", "partition.options.alpha=x"], ["partition.options.alpha: ", "valid number"]),
        (["quickstart", "partition.options.alfa=1"], ["partition.options.alfa: ", "alpha"]),
        (["quickstart", "partition.name=dirchlet"], ["partition.name: ", "dirchlet", "dirichlet"]),
        (["quickstart", "partition.name=iid"], ["partition.options.alpha: ", "partition.options={}"]),
        (["quickstart", "data.source=fashion_mnst"], ["data.source: ", "fashion_mnst", "fashion_mnist"]),
        (["quickstart", "data.source=csv"], ["data.path: ", "csv"]),
        (["quickstart", "data.path=pets"], ["data.path: ", "data.source"]),
        (["quickstart", "model.model_name=openai/clip-vit-base-patch32"], ["openai/clip-vit-base-patch32"]),
        (["quickstart", "model.num_classes=12"], ["12", "10 classes"]),
        (["quickstart", "lora.target_modules=[query]"], ["query", "q_proj"]),
        (["quickstart", "aggregation.name=fedavgg"], ["aggregation.name: ", "fedavgg", "fedavg"]),
        (["quickstart", "aggregation.name=fedprox"], ["aggregation.name=fedprox", "client.proximal_mu"]),
        (["quickstart", "aggregation.name=scaffold"], ["client.scaffold=true"]),
        (["quickstart", "aggregation.name=fedyogi"], ["aggregation.server_optimizer.name=fedyogi"]),
        (["quickstart", "aggregation.options.rank_cap=2"], ["aggregation.options.rank_cap: "]),
        (
            ["quickstart", "aggregation.server_optimizer={name: fedadam, eta: -1e-3}"],
            ["aggregation.server_optimizer.eta: ", "positive"],
        ),
        (["quickstart", "communication.uplink=int7"], ["communication.uplink: ", "int7", "int8"]),
        (["quickstart", "communication.downlink=int7"], ["communication.downlink: ", "int7", "int8"]),
        (["quickstart", "data.source=imagefolder", "data.path=missing"], ["data.path: ", "missing"]),
    ],
)
def test_bad_input_ends_with_code_2_a_remedy_and_no_run_folder(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("run", *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert os.listdir(".") == []


def test_a_corrupt_image_is_named_and_skipped_only_when_the_configuration_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "pets")
    (folder / "train" / "cat" / "3.png").write_bytes(b"this is no image")
    small = ["partition.num_clients=2", "federation.rounds=1", "client.local_steps=1", "client.batch_size=4"]
    small += ["model.num_classes=2", "partition.name=iid", "partition.options={}", "output.name=pets"]
    arguments = ["run", "quickstart", "data.source=imagefolder", f"data.path={folder}", *small]
    assert run_command(*arguments) == 2
    message = capsys.readouterr().err
    assert "3.png" in message
    assert "data.options.skip_corrupt: " in message
    assert not Path("runs").exists()
    assert run_command(*arguments, "data.options.skip_corrupt=true") == 0


def test_an_empty_class_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "pets")
    for image in (folder / "train" / "dog").iterdir():
        image.unlink()
    assert run_command("run", "quickstart", "data.source=imagefolder", f"data.path={folder}") == 2
    assert "dog" in capsys.readouterr().err


def test_a_wrong_key_is_told_before_torch_is_imported() -> None:
    script = (
        "import atexit, sys; from federated.cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules)); main(['run', 'quickstart', 'lora.rank=4'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "did you mean lora.r?" in done.stderr


def test_what_a_command_imports_is_left_out_of_the_search_for_garbage() -> None:
    before = gc.get_freeze_count()
    with modules_that_stay():
        assert not gc.isenabled()
        kept: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    with pytest.raises(ImportError), modules_that_stay():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.device=gpu",), "model.device=cpu"),
        (("engine.workers=2", "engine.threads=2"), "engine.threads=1"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_a_folder_is_made(
    overrides: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    assert run_command("run", "quickstart", *SMALL, f"output.root={root}", *overrides) == 2
    assert message in capsys.readouterr().err
    assert not root.exists()

"""Every command has an example in its help that runs, and --json where it prints a table.

The commands are those of the application, so that a new one is either covered here or named below.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from PIL import Image

from federated.cli import app
from federated.config.config_files import load_config
from federated.engines.simulation import run_experiment
from tests.command import fedlora
from tests.small_run import SMALL, small_config

WITHOUT_JSON = {
    "run": "RUN/summary.json and metrics.jsonl have its results",
    "train": "as run",
    "resume": "as run",
    "fork": "as run",
    "report": "it writes a page",
    "encode": "it writes a manifest beside the embeddings",
    "export": "it writes a folder",
    "sweep": "study.json and the tables of its folder have its results",
}
"""Commands without --json, and where their results are."""
TRAINING = ("run", "train", "sweep")
"""Commands whose examples are run with the fewest steps."""
SMALLER = ("data.max_train_samples=100", "data.max_test_samples=40")
SLOW = {"clip_lora": "a real CLIP is built", "fedlora sweep": "a study", "rounds=20": "many rounds"}
"""Words of examples that take long."""


def commands(
    group: click.Group | None = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Yield each command of the application by what one types."""
    for name, command in (group or typer.main.get_command(app)).commands.items():  # type: ignore[attr-defined]
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())
EXAMPLES = [
    (name, example)
    for name, command in COMMANDS.items()
    for example in re.findall(r"Example: (fedlora .*)", command.help or "")
]


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_an_example_of_it(name: str) -> None:
    examples = [example for command, example in EXAMPLES if command == name]
    assert examples
    assert all(example.startswith(f"fedlora {name}") for example in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_prints_a_table_has_json(name: str) -> None:
    assert ("--json" in options_of(COMMANDS[name])) != (name in WITHOUT_JSON)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: runs, photos, captions, folders of images."""
    root = tmp_path_factory.mktemp("examples")
    overrides = ["federation.rounds=4", "output.keep_checkpoints=4", "output.report=false"]
    run_experiment(small_config(root / "runs", overrides=[*SMALLER, *overrides]))
    small = [
        "partition={name: iid, num_clients: 2, options: {}}",
        "federation={rounds: 1, cohort_size: null}",
    ]
    run_experiment(
        load_config(
            "easy_vqa",
            [*SMALLER, *small, "client.local_steps=1", "output.report=false", "engine.workers=1"]
            + [f"output.root={root / 'runs'}"],
        )
    )
    for name in ("full_finetune", "head_only"):
        shutil.copytree(root / "runs" / "quickstart", root / "runs" / name)
    (root / "photos").mkdir()
    for number in range(1, 4):
        Image.new("RGB", (28, 28), (60 * number, 20, 90)).save(root / "photos" / f"{number}.png")
    (root / "captions.txt").write_text("a red bag\na boot\n")
    for split, offset in (("train", 0), ("test", 100)):
        for place, name in enumerate(("cat", "dog")):
            for number in range(4):
                file = root / "my_images" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (50 * number, 120 * place, offset)).save(file)
                flat = root / "downloads" / name / f"{split}{number}.png"
                flat.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, flat)
    (root / "pictures").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number}.png")
    asked = [
        f"{n}.png,what is it?,{'cat' if n % 2 else 'dog'},{'animal' if n % 3 else 'pet'}" for n in range(40)
    ]
    table = "\n".join(["image,question,answer,question_type", *asked])
    (root / "questions.csv").write_text(f"{table}\n")
    rows = "".join(f"test/cat/{number}.png,cat {number},test\n" for number in range(4))
    rows += "".join(f"train/dog/{number}.png,dog {number},train\n" for number in range(4))
    (root / "my_images" / "all.csv").write_text(f"image,text,split\n{rows}")
    return root


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to type in."""
    shutil.copytree(prepared, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def typed(example: str) -> list[str]:
    """The arguments of an example, with the smallest data where it trains, offline."""
    _, *arguments = shlex.split(example)
    if arguments[0] in TRAINING:
        short = [setting for setting in (*SMALL, *SMALLER) if setting.split("=")[0] not in example]
        arguments += [*short, "output.report=false"]
    elif arguments[0] == "evaluate":
        arguments += ["--overwrite"]
    return ["1" if each == "5" else each for each in arguments]  # seeds of a study


def prepare_for(name: str, example: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Make what an example reads and another command writes, or make room for what it writes."""
    if name == "search":
        assert (
            fedlora(capsys, "encode", "runs/quickstart", "photos", "--output", "photos.safetensors")[0] == 0
        )
    if name == "data prepare":
        shutil.rmtree(place / "my_images")
    if name == "resume":  # as if it had been stopped before its last round
        run = place / "runs" / "quickstart"
        (run / "summary.json").unlink()
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("\n  rounds: 4\n", "\n  rounds: 5\n"))


@pytest.mark.parametrize(
    ("name", "example"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * any(word in pair[1] for word in SLOW))
        for pair in EXAMPLES
    ],
)
def test_the_examples_of_the_help_run(
    name: str, example: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_for(name, example, place, capsys)
    code, output, error = fedlora(capsys, *typed(example))
    assert code == 0, f"{example}\n{output}{error}"
    assert output.strip()
    if "--json" in shlex.split(example):
        json.loads(output)


JSON_CALLS = {
    "show-config": (["quickstart", "lora.r=4"], lambda found: found["lora"]["r"] == 4),
    "info": (["quickstart"], lambda found: found["counts"]["adapter"] == 32_768),
    "evaluate": (["runs/quickstart"], lambda found: len(found["per_class"]) == 10),
    "predict": (
        ["runs/quickstart", "photos"],
        lambda found: {row["rank"] for row in found} == set(range(1, 6)),
    ),
    "search": (["photos.safetensors", "a bag"], lambda found: [row["rank"] for row in found] == [1, 2, 3]),
    "compare": (
        ["runs/quickstart", "runs/head_only"],
        lambda found: [row["name"] for row in found["runs"]] == ["quickstart", "head_only"],
    ),
    "status": (["runs/quickstart"], lambda found: (found["rounds"], found["server_round"]) == (4, 4)),
    "doctor": ([], lambda found: all(each["ok"] for findings in found.values() for each in findings)),
    "data check": (["my_images"], lambda found: found["counts"]["train"] == {"cat": 4, "dog": 4}),
    "data prepare": (
        ["my_images", "--from", "downloads"],
        lambda found: sum(sum(classes.values()) for classes in found["counts"].values()) == 16,
    ),
}


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if "--json" in options_of(command)]
)
def test_json_is_all_that_a_command_prints_and_has_its_values(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_for(name, name, place, capsys)
    arguments, holds = JSON_CALLS[name]
    code, output, error = fedlora(capsys, *name.split(), *arguments, "--json")
    assert code == 0, error
    assert holds(json.loads(output))


def test_json_of_what_goes_wrong_in_part_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, error = fedlora(capsys, "compare", "runs/quickstart", "photos", "--json")
    assert code == 1
    assert len(json.loads(output)["left_out"]) == 1
    assert "photos is not a run folder" in error
    os.truncate("my_images/train/cat/0.png", 10)
    code, output, error = fedlora(capsys, "data", "check", "my_images", "--json")
    assert code == 2
    found = json.loads(output)
    assert (found["usable"], len(found["corrupt"])) == (False, 1)
    assert "cannot be decoded" in error

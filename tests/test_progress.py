"""What commands show while they work: the first line, bars in a terminal, and -v and --quiet everywhere."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
import typer
from rich.console import Console

from federated.cli import app
from federated.engines.simulation import run_experiment
from federated.results.console import RunDisplay
from federated.tools.trained_models import open_model
from lora.adapters import get_lora_state_dict
from models.progress import counted, doing, is_quiet, set_quiet, watched_by
from tests.command import fedlora
from tests.small_run import SMALL, small_config

LOADING = ["loading data", "loading model", "checking the rows"]
QUICK = ("federation.rounds=1", "output.report=false", "data.max_train_samples=100")
FIRST_LINE = """
import sys
import typer
shown = typer.echo
def echo(text, **options):
    print("torch" in sys.modules, text)
    shown(text, **options)
    sys.exit()
typer.echo = echo
from federated.cli import main
main(["run", "quickstart"])
"""


@pytest.fixture
def told() -> Iterator[list[tuple[str, int, int | None]]]:
    lines: list[tuple[str, int, int | None]] = []
    with watched_by(lambda *line: lines.append(line)):
        yield lines


def commands(group: click.Command, name: str = "fedlora") -> Iterator[tuple[str, click.Command]]:
    if not isinstance(group, click.Group):
        yield name, group
        return
    for each, command in group.commands.items():
        yield from commands(command, f"{name} {each}")


def test_the_first_line_is_there_before_torch_is() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_LINE], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("False fedlora run: loading")
    assert done.stderr.startswith("fedlora run: loading")


def test_things_are_counted_as_they_are_done(told: list[tuple[str, int, int | None]]) -> None:
    for number in counted("steps", iter("ab"), 2):
        told.append((number, 0, 0))
    assert told == [("steps", 0, 2), ("a", 0, 0), ("steps", 1, 2), ("b", 0, 0), ("steps", 2, 2)]
    with doing("loading"):
        assert told[-1] == ("loading", 0, None)
    assert told[-1] == ("loading", 1, 1)


def test_nothing_is_counted_where_nobody_watches_and_in_forked_processes(
    told: list[tuple[str, int, int | None]],
) -> None:
    child = os.fork()
    if child == 0:
        things = [1]
        os._exit(0 if counted("steps", things, 1) is things else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert told == []


def test_a_terminal_shows_loading_round_0_s_evaluation_steps_and_the_time_left(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    display = RunDisplay(console)
    display._progress.live.auto_refresh = False
    seen: list[str] = []
    told = display.work_done

    def work_done(what: str, done: int, total: int | None) -> None:
        told(what, done, total)
        seen.append(what)
        display._progress.refresh()

    display.work_done = work_done  # type: ignore[method-assign]
    with display:
        run_experiment(small_config(tmp_path, overrides=QUICK), display=display)
    assert list(dict.fromkeys(seen)) == [*LOADING, "evaluation", "steps"]
    assert seen.index("evaluation") < seen.index("steps")
    for word in ("loading data", "loading model", "evaluation", "steps", "left"):
        assert word in screen.getvalue()


def test_bars_change_no_result_and_a_pipe_shows_none(tmp_path: Path) -> None:
    pipe, states = io.StringIO(), []
    for name in ("shown", "silent"):
        display = RunDisplay(Console(file=pipe)) if name == "shown" else None
        config = small_config(tmp_path, overrides=[*QUICK, f"output.name={name}"])
        states.append(get_lora_state_dict(open_model(run_experiment(config, display=display)).model))
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert "round 1/1" in pipe.getvalue()
    assert not {"\x1b", "━"} & set(pipe.getvalue())


def test_every_command_has_both_options_and_says_so() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 10
    for name, command in found.items():
        names = {option for parameter in command.params for option in parameter.opts}
        assert {"-v", "--verbose", "-q", "--quiet"} <= names, name


def test_quiet_leaves_the_folder_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "quickstart", *SMALL, *QUICK, f"output.root={tmp_path}")
    status, output, errors = fedlora(capsys, *arguments, "--quiet")
    assert (status, output, errors) == (0, f"{tmp_path / 'quickstart'}\n", "")
    assert is_quiet()
    status, output, errors = fedlora(capsys, *arguments, "-q")
    assert (status, output) == (2, "")
    assert "already exists" in errors
    assert fedlora(capsys, "show-config", "quickstart")[0] == 0
    assert not is_quiet()


def test_verbose_says_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, level in (((), logging.NOTSET), (("-v",), logging.INFO)):
        assert fedlora(capsys, "show-config", "quickstart", *options)[0] == 0
        assert logging.getLogger("federated").level == level
    assert fedlora(capsys, "show-config", "quickstart")[0] == 0
    set_quiet(False)

"""The pages for people who come from elsewhere: what they name exists, what they show runs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from federated.cli import app
from federated.config.schema import ExperimentConfig
from federated.data.sources.source_registry import SOURCES
from federated.engines.simulation import run_experiment
from models.registration import added, remove
from tests.small_run import lines_without_times, small_config
from tests.test_docs import DOCS, blocks, keys_of
from tests.test_lora_counts import MLP, PER_RANK, QKVO

PAGES = ("recipes.md", "troubleshooting.md", "python.md")
KEYS = {*keys_of(ExperimentConfig().model_dump())}
SECTIONS = "|".join(name for name in ExperimentConfig.model_fields if name != "seed")
EMBEDDED = {"data.options", "partition.options", "aggregation.options"}


def spans(page: str) -> list[str]:
    """Return what the page shows as code, in a recipe's table the right column alone."""
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    if page == "recipes.md":
        rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
        text = "\n".join(row[2] for row in rows)
    return re.findall(r"`([^`]+)`", text)


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield (words, command) of the application."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_the_page_names_exists(page: str) -> None:
    named = [
        key
        for span in spans(page)
        for key in re.findall(rf"\b(?:{SECTIONS})\.[a-z_.]+[a-z]", span)
        if ".py" not in span
    ]
    known = KEYS | {f"data.options.{name}" for name in inspect.signature(SOURCES["csv"]).parameters}
    modules = ("lora.factory", "model.precision", "model.encode_image")
    assert not [key for key in named if key not in known and key not in modules]
    assert named


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_that_the_page_names_exists(page: str) -> None:
    found = 0
    for span in spans(page):
        if not span.startswith("fedlora "):
            continue
        words = span.split()[1:]
        path = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
        assert path in COMMANDS, span
        options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, span
        found += 1
    assert found


def test_the_python_page_runs_from_top_to_bottom_and_its_metric_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    before = set(added())
    try:
        for _, code in blocks(DOCS / "python.md", "python"):
            exec(code, names)
        lines = lines_without_times(
            run_experiment(
                small_config(tmp_path, overrides=("task.name=with_confidence", "output.report=false"))
            )
        )
    finally:
        remove([each for each in added() if each not in before])
    assert 0 < lines[-1]["confidence"] <= 1
    assert all(0 < values["confidence"] <= 1 for values in lines[-1]["clients"].values())


@pytest.mark.parametrize(
    ("claim", "nearest"),
    [
        ({8: 1.2e6, 16: 2.4e6, 32: 4.8e6}, (MLP, "both")),
        ({4: 0.6e6, 16: 1.2e6, 32: 2.4e6, 64: 4.8e6}, (QKVO, "vision")),
    ],
    ids=["three ranks", "four ranks"],
)
def test_the_target_set_beside_a_quoted_claim_is_the_nearest(
    claim: dict[int, float], nearest: tuple[list[str], str]
) -> None:
    """By the sum of the logarithms' distances, over the sets whose exact counts are tested."""
    per_rank = {
        ("-".join(targets), towers): count
        for targets, vision, text in PER_RANK
        for towers, count in (("vision", vision), ("text", text), ("both", vision + text))
    }
    distance = {
        key: sum(abs(math.log(rank * count / quoted)) for rank, quoted in claim.items())
        for key, count in per_rank.items()
    }
    key = ("-".join(nearest[0]), nearest[1])
    assert min(distance, key=distance.__getitem__) == key
    page = (DOCS / "lora.md").read_text(encoding="utf-8")
    assert all(f"{rank * per_rank[key] / 1e6:.3f} M" in page for rank in claim)

"""The documentation: written from the code where it can be, and true where a machine can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import configuration_reference
import pytest
import reference_pages
import station_drawing
import torch
import yaml
from pydantic import AfterValidator, Field

from federated.communication.codec import codec_from_name
from federated.communication.codings import CODINGS
from federated.config.plugins import load_plugins
from federated.config.schema import ExperimentConfig
from federated.data.partitioners import PARTITIONERS
from federated.data.sources import scene_vocabulary
from federated.data.sources.source_registry import SOURCES
from federated.engines.simulation import run_experiment
from federated.methods import AGGREGATORS
from federated.methods.server_optimizers import SERVER_OPTIMIZERS
from models.state import layout_of
from models.tasks import TASKS
from tests.command import forget_plugins
from tests.small_run import lines_without_times, small_config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return (language, code) of a page's fenced blocks, those inside lists too."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [(language, textwrap.dedent(code)) for _, language, code in found if language in languages]


# ---- the configuration reference


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a resolved configuration."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int | None, "integer, or null"),
        (Literal["a", "b"], "`a`, `b`"),
        (Literal["off"] | Annotated[int, Field(ge=2)], "`off` or integer ≥ 2"),
        (Annotated[str, AfterValidator(str.strip)] | None, "text, or null"),
        (list[Annotated[int, Field(le=9)]], "list of integers ≤ 9"),
        (tuple[float, float], "list of 2 numbers"),
        (dict[str, Any], "mapping"),
    ],
)
def test_types_are_said_in_words(annotation: object, words: str) -> None:
    assert configuration_reference.in_words(annotation) == words


def test_every_key_of_the_schema_has_a_meaning() -> None:
    rows = list(configuration_reference.rows_of(ExperimentConfig))
    assert not [row.key for row in rows if not row.meaning]
    assert {*keys_of(ExperimentConfig().model_dump())} <= {row.key for row in rows}


@pytest.mark.parametrize("registry", [SOURCES, PARTITIONERS, AGGREGATORS, SERVER_OPTIMIZERS])
def test_every_option_of_a_choice_by_name_has_a_meaning(registry: dict[str, Any]) -> None:
    options = {name: configuration_reference.options_of(function) for name, function in registry.items()}
    assert not [(name, row.key) for name, rows in options.items() for row in rows if not row.meaning]


def test_the_configuration_page_names_every_key_and_every_choice() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    choices = (*TASKS, *SOURCES, *PARTITIONERS, *AGGREGATORS, *SERVER_OPTIMIZERS)
    named = (f"`{name}`" for name in (*keys_of(ExperimentConfig().model_dump()), *choices))
    assert not [name for name in named if name not in page]
    assert all(name in page for name in CODINGS)


def test_the_configuration_page_is_what_the_code_says() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_reference.page(), "run `make docs` and commit docs/configuration.md"


# ---- the picture of the stations


def test_no_import_between_stations_runs_back() -> None:
    assert not [arrow for arrow in station_drawing.arrows() if station_drawing.runs_back(arrow)]


@pytest.mark.parametrize("arrow", [("models", "lora"), ("methods", "rounds"), ("data", "methods")])
def test_an_import_of_a_later_station_or_of_one_beside_it_would_run_back(arrow: tuple[str, str]) -> None:
    assert station_drawing.runs_back(arrow)
    assert not station_drawing.runs_back(("cli", arrow[1]))


def test_the_stations_are_the_folders_of_the_packages() -> None:
    folders = {path.parent.name for path in (ROOT / "federated").glob("*/__init__.py")}
    assert {*station_drawing.STATIONS} == {"models", "lora", *folders, "cli"}
    assert [*reference_pages.STATIONS] == [name for name in station_drawing.STATIONS if name != "cli"]


def test_the_picture_shows_the_imports_of_the_code() -> None:
    picture = station_drawing.PICTURE.read_text(encoding="utf-8")
    shown = re.findall(r'id="arrow (\w+) (\w+)"', picture)
    assert sorted(shown) == sorted(station_drawing.arrows()), "run `make docs` and commit docs/images"
    assert all(station_drawing.station(name).folder in picture for name in station_drawing.STATIONS)


# ---- pages


def test_the_site_has_every_page_and_no_other() -> None:
    entries = re.findall(r"[\w/-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    generated = {"api/index.md", *(f"api/{page}.md" for page in reference_pages.STATIONS)}
    assert sorted(entries) == sorted({*(str(page.relative_to(DOCS)) for page in PAGES), *generated})


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    folders = "benchmarks|configs|docs|federated|flower|lora|models|scripts|tests"
    named = re.findall(
        rf"(?<![\w/])(?:{folders})/[\w/.-]+\.(?:py|md|yaml|svg|png|json)", page.read_text("utf-8")
    )
    assert not [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]


@pytest.fixture
def added_by_the_page(tmp_path: Path) -> Iterator[None]:
    """The code of the page on extending, loaded as one plugin."""
    plugin = tmp_path / "page.py"
    plugin.write_text("\n\n".join(code for _, code in blocks(DOCS / "extending.md", "python")))
    load_plugins([plugin])
    yield
    forget_plugins()


@pytest.mark.usefixtures("added_by_the_page")
def test_what_the_page_on_extending_adds_takes_part_in_a_run(tmp_path: Path) -> None:
    chosen = (
        "aggregation={name: trimmed_mean, options: {share: 0.3}}",
        "communication.uplink=sign:ef",
        "data={source: colours, options: {num_images: 80}}",
        "model.num_classes=null",
        "partition={name: one_class, num_clients: 4}",
        "output.report=false",
    )
    lines = lines_without_times(run_experiment(small_config(tmp_path, overrides=chosen)))
    assert not lines[-1]["failed"]
    assert sorted(lines[-1]["clients"]) == ["0", "1", "2", "3"]


@pytest.mark.usefixtures("added_by_the_page")
def test_the_codec_of_the_page_on_extending_keeps_signs_and_states_its_bytes() -> None:
    codec = codec_from_name("sign")
    state = {"m.lora_A.weight": torch.randn(3, 7, generator=torch.Generator().manual_seed(0))}
    buffer = codec.encode(state, None)
    decoded = codec.decode(buffer, layout_of(state))["m.lora_A.weight"]
    assert buffer.nbytes == codec.num_bytes(layout_of(state)) == 4 * 3 + 3
    assert torch.equal(decoded.sign(), state["m.lora_A.weight"].sign())
    torch.testing.assert_close(decoded.abs().mean(dim=1), state["m.lora_A.weight"].abs().mean(dim=1))


# ---- slow: whole snippets, the whole site


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "tutorial.md"])
def test_every_snippet_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, where `models` is the repository's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {}
    for language, code in blocks(DOCS / page, "bash", "python"):
        if language == "bash":
            subprocess.run(["bash", "-euc", code], check=True)
        else:
            exec(code, names)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    architecture = (tmp_path / "architecture.html").read_text(encoding="utf-8")
    assert "images/stations.svg" in architecture
    assert "federated.methods.registry.aggregator_from_name" in (tmp_path / "api/methods.html").read_text()


def test_the_page_of_questions_names_every_word_and_question_of_the_scenes() -> None:
    page = " ".join((DOCS / "questions.md").read_text(encoding="utf-8").replace("`", "").split())
    objects = [f"{thing.vi} ({thing.en})" for thing in scene_vocabulary.OBJECTS]
    colours = [f"{name['vi']} ({name['en']})" for _, name in scene_vocabulary.COLOURS]
    questions = [
        f"| {kind} | {vi} | {en} |"
        for kind in scene_vocabulary.KINDS
        for vi, en in zip(
            *(scene_vocabulary.TEMPLATES[language][kind] for language in ("vi", "en")), strict=True
        )
    ]
    assert not [words for words in (*objects, *colours, *questions) if words not in page]

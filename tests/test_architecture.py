"""What keeps the architecture easy to see: import direction, forbidden names, the wheel's content."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("models", "lora", "federated")
"""Each may import itself and what stands before it."""

STATIONS = (
    *("models", "lora", "federated.config", "federated.communication", "federated.data", "federated.methods"),
    *("federated.results", "federated.rounds", "federated.engines", "federated.tools", "federated.commands"),
    "federated.cli",
)
"""The stations of a round, in order: each imports itself and what stands before it."""

SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_no_tests_no_benchmarks_and_no_later_package(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not imported_packages(path) & (later | {"tests", "benchmarks", "scripts", "examples"})


def imported_modules(path: Path) -> set[str]:
    """Return the modules of this project that a module imports, in functions too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING")]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & MODULES.keys()


def test_no_two_modules_import_each_other() -> None:
    """Not through others, either: read in this order, nothing is used before it was explained."""
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the modules


def station_of(module: str) -> int | None:
    """Return the number of a module's station; None for ``federated`` itself, which hands names on."""
    if module == "federated":
        return None
    parts = module.split(".")
    return STATIONS.index(parts[0] if parts[0] in STATIONS else ".".join(parts[:2]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_station_imports_only_stations_before_it(module: str) -> None:
    own = station_of(module)
    if own is None:
        return
    stations = {name: station_of(name) for name in imported_modules(MODULES[module])}
    assert [name for name, station in stations.items() if station is not None and station > own] == []


def test_the_root_of_federated_holds_the_door_and_nothing_else() -> None:
    assert {path.name for path in (ROOT / "federated").glob("*.py")} == {"__init__.py", "cli.py"}


def test_no_two_modules_share_a_base_name() -> None:
    names = [path.stem for path in SOURCES if path.stem != "__init__"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


TOOLS = sorted(
    path
    for folder in ("benchmarks", "scripts", "flower", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_benchmarks_and_scripts_import_exists(path: Path) -> None:
    """They run by hand and need extras, so that nothing else would notice a name that was renamed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in LAYERS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or f"{node.module}.{alias.name}" in MODULES


def test_no_module_is_a_drawer_for_everything() -> None:
    forbidden = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in forbidden or path.name.startswith("legacy_")]


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"pickle\.(load|dump)", set()),
        (r"yaml\.load\(", set()),
        # what clients raise becomes an error reply, what plugins raise a message that names them
        (r"except Exception|except:", {"federated/engines/inprocess.py", "federated/config/plugins.py"}),
        (r"np\.random\.(seed|rand|randn|randint|shuffle|choice)\(|(^|[^.\w])random\.seed\(", set()),
        (r"""["']lora_?[AB]?["'] in """, {"lora/adapters.py"}),
    ],
)
def test_what_must_not_exist_does_not(pattern: str, allowed: set[str]) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(re.search(pattern, line) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert found <= allowed


def test_torch_load_is_always_restricted_to_weights() -> None:
    for path in SOURCES:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path


@pytest.mark.slow
def test_the_wheel_holds_exactly_the_three_packages_and_their_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top_level = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == set(LAYERS)
    weights = [f"models/{name}/model.safetensors" for name in ("tiny_clip", "tiny_mbart")]
    for needed in ("federated/configs/quickstart.yaml", *weights):
        assert needed in names
    for folder in ("federated/data/embedded_data/", "federated/results/templates/"):
        assert any(name.startswith(folder) for name in names)

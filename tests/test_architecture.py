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

PARTS = ("aggregators", "codecs", "data", "engines", "speed", "reporting", "standalone", "commands")
"""Folders of ``federated``, in the same sense."""

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
def test_imports_never_go_backwards(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not imported_packages(path) & (later | {"tests", "benchmarks", "scripts"})


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


def test_the_parts_of_federated_are_its_folders() -> None:
    folders = {path.parent.name for path in (ROOT / "federated").glob("*/*.py")}
    assert folders == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_federated_import_only_earlier_parts(part: str) -> None:
    later = set(PARTS[PARTS.index(part) + 1 :])
    for path in (ROOT / "federated" / part).rglob("*.py"):
        imported = {module.split(".")[1] for module in imported_modules(path) if "." in module}
        assert not imported & later, path


TOOLS = sorted(
    path for folder in ("benchmarks", "scripts", "flower") for path in (ROOT / folder).rglob("*.py")
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
        (r"except Exception|except:", {"federated/engines/inprocess.py"}),
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


def test_readme_names_every_module_of_the_packages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = []
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        shown = str(relative.parent) + "/" if relative.parts[1:-1] else str(relative)
        if path.name != "__init__.py" and shown not in readme:
            missing.append(shown)
    assert not missing


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
    for needed in ("federated/configs/quickstart.yaml", "models/tiny_clip/model.safetensors"):
        assert needed in names
    for folder in ("federated/data/embedded_data/", "federated/results/templates/"):
        assert any(name.startswith(folder) for name in names)

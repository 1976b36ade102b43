"""A hook of mkdocs: the pages of the API reference, one a station, made from the modules that there are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

STATIONS = {
    "models": "models",
    "lora": "lora",
    **{
        name: f"federated.{name}"
        for name in (
            "config", "communication", "data", "methods", "results", "rounds", "engines", "tools", "commands"
        )
    },
}  # fmt: skip
"""Page -> package, in the order of the rule: a station imports only those before it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; mkdocs calls this before it reads any page."""
    from mkdocs.structure.files import File  # here: the tests read this module without the extra `docs`

    files.append(File.generated(config, "api/index.md", content=index_page()))
    for page, package in STATIONS.items():
        files.append(File.generated(config, f"api/{page}.md", content=station_page(package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep formulas such as ``[w B][A]`` from being read as links to a definition; no page has such links."""
    return markdown if page.file.src_uri.startswith("api/") else markdown.replace("][", "]\\[")


def modules_of(package: str) -> list[str]:
    """Return the modules of a package, subpackages included, in alphabetical order."""
    folder = ROOT.joinpath(*package.split("."))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in folder.rglob("*.py"))
    return sorted(name for name in names if not name.endswith("__init__"))


def index_page() -> str:
    """Return the page that lists every module with the first sentence of its docstring."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings. A station imports only stations before it.",
        "",
    ]
    for page, package in STATIONS.items():
        lines += [f"## [{package}]({page}.md)", "", "| module | what it is for |", "|---|---|"]
        for module in modules_of(package):
            lines.append(f"| [`{module}`]({page}.md#{module}) | {first_sentence(module)} |")
        lines.append("")
    return "\n".join(lines)


def station_page(package: str) -> str:
    """Return a station's page: one block of mkdocstrings a module."""
    return "\n\n".join([f"# {package}", *(f"::: {module}" for module in modules_of(package))])


def first_sentence(module: str) -> str:
    """Return the first paragraph of a module's docstring."""
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")

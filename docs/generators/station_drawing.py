"""docs/images/stations.svg: the stations of a round and their imports, drawn from the code.

`make docs` draws the picture by running this file; a test holds that it shows the arrows of the code, and
that no arrow runs back.
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "stations.svg"

LEVELS = (
    ("models",),
    ("lora",),
    ("config", "communication"),
    ("data", "methods", "results"),
    ("rounds",),
    ("engines",),
    ("tools",),
    ("commands",),
    ("cli",),
)
"""The order of the rule: a station imports only stations before it."""

STATIONS = tuple(station for level in LEVELS for station in level)

COLOURS = ("#5b6770", "#5b6770", "#2f6f8f", "#2c7a5b", "#b4552d", "#8a6d1f", "#6b5b95", "#44546a", "#44546a")
"""One a level."""

Arrows = dict[tuple[str, str], int]
"""(importing station, imported station) -> how many imports there are between them."""


@dataclass(frozen=True)
class Station:
    """A box.

    Attributes:
        folder: Where it is in the repository.
        meaning: First sentence of the package's docstring.
    """

    folder: str
    meaning: str


# ---- what the code says


def modules() -> dict[str, Path]:
    """Return every module of the three packages by its dotted name."""
    paths = (path for package in ("models", "lora", "federated") for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def station_of(module: str) -> str | None:
    """Return the station that a module is in; None for the package `federated` itself."""
    package, *rest = module.split(".")
    if package != "federated":
        return package
    return rest[0] if rest else None


def imported_by(path: Path, known: dict[str, Path]) -> list[str]:
    """Return the modules of this project that a file imports, inside functions and for types too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(inner & known.keys()) or [node.module]
    return [name for name in found if name in known]


def arrows() -> Arrows:
    """Return the imports between stations."""
    known, counts = modules(), Counter[tuple[str, str]]()
    for module, path in known.items():
        station = station_of(module)
        for imported in imported_by(path, known):
            other = station_of(imported)
            if station and other and station != other:
                counts[station, other] += 1
    return dict(counts)


def runs_back(arrow: tuple[str, str]) -> bool:
    """Whether an arrow leads to a station that does not stand before the importing one."""
    level = {station: number for number, stations in enumerate(LEVELS) for station in stations}
    importing, imported = arrow
    return level[imported] >= level[importing]


def station(name: str) -> Station:
    """Return what stands in a station's box."""
    folder = {"models": "models", "lora": "lora", "cli": "federated/cli.py"}.get(name, f"federated/{name}")
    path = ROOT / folder
    source = path if path.suffix else path / "__init__.py"
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return Station(folder, docstring.partition("\n")[0].replace("`", ""))


# ---- the picture

HEIGHT = 0.62
"""Of a box; boxes stand one apart along a diagonal."""


def draw(found: Arrows) -> Figure:
    """Draw boxes down a diagonal: what a station imports lies to its left and above.

    An arrow leaves a box to the left and ends, upwards, in the box that is imported. One that ran back would
    leave to the right, in red.
    """
    figure = Figure(figsize=(12.5, 7.6))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(-0.75, len(STATIONS) + 4.9)
    axes.set_ylim(-len(STATIONS) + 0.35, 0.65)
    for arrow in sorted(found):
        draw_arrow(axes, arrow)
    for position, name in enumerate(STATIONS):
        draw_box(axes, position, name)
    return figure


def draw_arrow(axes: Axes, arrow: tuple[str, str]) -> None:
    """Draw one arrow: a line along the row of the importing box, and a head below the imported one."""
    row, column = (STATIONS.index(name) for name in arrow)
    colour = "#c0392b" if runs_back(arrow) else colour_of(arrow[0])
    towards = 1 if column < row else -1
    style = {"color": colour, "linewidth": 1.1, "alpha": 0.75, "zorder": 1, "solid_capstyle": "round"}
    (line,) = axes.plot([row, column, column], [-row, -row, -column - towards * HEIGHT / 2], **style)
    line.set_gid(f"arrow {arrow[0]} {arrow[1]}")
    axes.plot(column, -row, marker="o", markersize=4.2, color=colour, zorder=3)
    head = "^" if towards > 0 else "v"
    axes.plot(
        column, -column - towards * (HEIGHT / 2 + 0.06), marker=head, markersize=6, color="#333333", zorder=2
    )


def draw_box(axes: Axes, position: int, name: str) -> None:
    """Draw one box with its name, and its meaning to the right, where no arrow runs."""
    shown, half = station(name), 0.2 + 0.053 * len(name)
    shape = FancyBboxPatch(
        (position - half, -position - HEIGHT / 2),
        2 * half,
        HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.1",
        color=colour_of(name),
        zorder=4,
    )
    axes.add_patch(shape)
    style = {"va": "center", "zorder": 5}
    axes.text(position, -position, name, color="white", size=10, weight="bold", ha="center", **style)
    left = position + half + 0.12
    axes.text(left, -position + 0.14, shown.folder, size=7.5, color="#666666", **style)
    axes.text(left, -position - 0.12, shown.meaning, size=8.5, color="#111111", **style)


def colour_of(name: str) -> str:
    """Return the colour of a station's level."""
    return next(colour for level, colour in zip(LEVELS, COLOURS, strict=True) if name in level)


def save(figure: Figure, path: Path) -> None:
    """Write the picture; the same figure gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "stations", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, format=path.suffix[1:], metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    save(draw(arrows()), PICTURE)

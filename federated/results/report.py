"""The report of a run: one self-contained HTML page and its pictures, from the run folder's files alone.

The page needs nothing from outside, follows the reader's light or dark setting, and every word from the run
(class names, reasons, configuration) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from federated.communication.savings import FULL_MODEL
from federated.config.config_files import dotted
from federated.results import plots
from federated.results.byte_reasons import byte_reasons
from federated.results.plot_style import inline_svg, remove_figure, save_figure
from federated.results.records import RunRecord, read_run
from federated.results.report_cards import base_note, cards, notices, provenance, subtitle
from federated.results.report_pictures import Drawing, drawings
from federated.results.tables import class_table, failure_table, round_table, saving_table
from federated.results.wording import MISSING
from models.files import BestEffort, errors_named, write_text

_IN_CARDS = ("zero_shot", "final", "best", "rounds", "seconds", "peak_memory_bytes", "parameters")
_SHOWN_ELSEWHERE = frozenset({"headline_metric", "communication", "per_class", *_IN_CARDS})


@dataclass(frozen=True)
class Picture:
    """A plot in the page, or the reason why there is none."""

    name: str
    title: str
    caption: str
    svg: Markup | None
    missing: str = ""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and ``plots/`` into a run folder.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is no run folder, or one of its files cannot be read.
    """
    run = read_run(run_dir)
    pictures = _pictures(run)
    saving_rows = run.summary.get("communication", {}).get("comparison") or []
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            run=run,
            subtitle=subtitle(run),
            notices=notices(run),
            cards=cards(run),
            pictures=pictures,
            rounds=round_table(run.metrics, run.metric, run.ledger),
            savings=saving_table(saving_rows),
            full_model=FULL_MODEL,
            base_note=base_note(run),
            reasons=byte_reasons(run.ledger),
            per_class=class_table(run.summary.get("per_class") or []),
            provenance=provenance(run),
            failures=failure_table(run.metrics, run.ledger),
            also_recorded=_flatten({k: v for k, v in run.summary.items() if k not in _SHOWN_ELSEWHERE}),
            environment=_flatten(run.environment),
        )
    )
    path = run.directory / "report.html"
    write_text(path, page)
    return path


def templates() -> jinja2.Environment:
    """Return the templates, which escape every word from a run."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("federated.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _pictures(run: RunRecord) -> list[Picture]:
    """Draw every plot, save those that exist, and return them for the page."""
    folder = run.directory / "plots"
    with errors_named(folder):
        folder.mkdir(exist_ok=True)
    return [_picture(folder, drawing) for drawing in drawings(run)]


def _picture(folder: Path, drawing: Drawing) -> Picture:
    name = drawing.name
    with BestEffort(f"drawing {name}"):
        try:
            figure = drawing.make()
        except plots.MissingData as missing:
            remove_figure(folder, name)
            return Picture(name, drawing.title, drawing.caption, None, str(missing))
        svg = Markup(inline_svg(figure, name, drawing.title))
        save_figure(figure, folder, name)
        return Picture(name, drawing.title, drawing.caption, svg)
    return Picture(name, drawing.title, drawing.caption, None, "it could not be drawn; the log says why")


def _flatten(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return dotted key -> lines of text of a tree, in its order: a line for each item of a list."""
    return {
        key: [
            MISSING if item is None else str(item) for item in (value if isinstance(value, list) else [value])
        ]
        for key, value in dotted(tree)
        if value != {}
    }

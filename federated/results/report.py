"""The report of a run: one self-contained HTML page and its pictures, from the run folder's files alone.

The page needs nothing from outside, follows the reader's light or dark setting, and every word from the run
(class names, reasons, configuration) is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from federated.communication.savings import FULL_MODEL
from federated.results import plots
from federated.results.byte_reasons import byte_reasons
from federated.results.plot_style import inline_svg, remove_figure, save_figure
from federated.results.records import RunRecord, read_run
from federated.results.report_cards import base_note, cards, notices, provenance, subtitle
from federated.results.run_settings import leaves
from federated.results.tables import class_table, failure_table, round_table, saving_table
from federated.results.wording import MISSING, format_bytes, metric_label
from models.files import BestEffort, errors_named, write_text

_IN_CARDS = ("zero_shot", "final", "best", "rounds", "seconds", "peak_memory_bytes", "parameters")
_SHOWN_ELSEWHERE = frozenset({"headline_metric", "communication", "per_class", *_IN_CARDS})

_OF_CENTRAL_RUNS = frozenset({"metric_by_epoch", "class_accuracy"})  # the others are of clients and messages
ERROR_MEANING = (
    "How far the round's global model is from the weighted average of the models that its clients trained: "
    "||held − ideal|| ÷ ||ideal|| over all adapted layers. 0 % is the exact average; averaging A and B apart "
    "and cutting to a rank make it larger, and so do lossy codecs."
)


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
        _environment()
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


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("federated.results"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _pictures(run: RunRecord) -> list[Picture]:
    """Draw every plot, save those that exist as PNG, and return them for the page."""
    label = metric_label(run.metric)
    zero_shot = run.headline["zero_shot"]
    makers: tuple[tuple[str, str, str, Callable[[], Figure]], ...] = (
        (
            f"metric_by_{run.kind.step}",
            f"{label} and loss by {run.kind.step}",
            run.kind.caption,
            lambda: plots.metric_by_round(run.metrics, run.metric, zero_shot),
        ),
        (
            "metric_by_bytes",
            f"{label} against bytes sent",
            f"Every point is a round: the {run.kind.model} and what was sent until then, without the base. "
            "What clients were sent to evaluate the last model comes after it.",
            lambda: plots.metric_by_bytes(run.metrics, run.metric, run.ledger),
        ),
        (
            "bytes_by_round",
            "Bytes by round",
            "All clients together, failed transfers included. The bars add up to "
            f"{format_bytes(run.ledger.total().wire_bytes)}.",
            lambda: plots.bytes_by_round(run.ledger),
        ),
        (
            "bytes_by_method",
            "What other ways would send",
            "The same clients and rounds; totals without and with the base model.",
            lambda: plots.bytes_by_method(run.summary.get("communication", {}).get("comparison") or []),
        ),
        (
            "client_metric",
            f"{label} of each client",
            run.kind.client_caption,
            lambda: plots.client_metric(run.metrics, run.metric),
        ),
        (
            "class_accuracy",
            "Accuracy of each class",
            "The final model on the server's test set; in brackets the test rows of the class.",
            lambda: plots.class_accuracy(run.summary.get("per_class") or []),
        ),
        (
            "aggregation_error",
            "Aggregation error by round",
            ERROR_MEANING,
            lambda: plots.aggregation_error(run.metrics),
        ),
        (
            "client_split",
            "How the data is split",
            "Training examples of each client, and what share of them each class has.",
            lambda: plots.client_split(run.partition),
        ),
    )
    folder = run.directory / "plots"
    with errors_named(folder):
        folder.mkdir(exist_ok=True)
    shown = [maker for maker in makers if run.kind.has_clients or maker[0] in _OF_CENTRAL_RUNS]
    return [_picture(folder, name, title, caption, make) for name, title, caption, make in shown]


def _picture(folder: Path, name: str, title: str, caption: str, make: Callable[[], Figure]) -> Picture:
    title = title[0].upper() + title[1:]
    with BestEffort(f"drawing {name}"):
        try:
            figure = make()
        except plots.MissingData as missing:
            remove_figure(folder, name)
            return Picture(name, title, caption, None, str(missing))
        picture = Picture(name, title, caption, Markup(inline_svg(figure, name, title)))
        save_figure(figure, folder, name)
        return picture
    return Picture(name, title, caption, None, "it could not be drawn; the log says why")


def _flatten(tree: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return dotted key -> lines of text of a tree, in its order: a line for each item of a list."""
    return {
        key: [
            MISSING if item is None else str(item) for item in (value if isinstance(value, list) else [value])
        ]
        for key, value in leaves(tree)
        if value != {}
    }

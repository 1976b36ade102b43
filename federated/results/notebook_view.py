"""A run as a notebook shows it: the report's figures, pictures and tables, in HTML that stands by itself."""

from __future__ import annotations

import base64

from markupsafe import Markup, escape

from federated.results import plots
from federated.results.byte_reasons import byte_reasons
from federated.results.plot_style import save_svg
from federated.results.records import RunRecord
from federated.results.report import templates
from federated.results.report_cards import cards, notices, subtitle
from federated.results.report_pictures import Drawing, drawings
from federated.results.tables import class_table, failure_table, round_table, saving_table


def run_html(run: RunRecord) -> str:
    """Return what the report's page shows, without the configuration, for a cell of a notebook."""
    saving_rows = run.summary.get("communication", {}).get("comparison") or []
    tables = {
        f"{run.kind.step.capitalize()}s": round_table(run.metrics, run.metric, run.ledger),
        "What travels, and what it saves": saving_table(saving_rows),
        "Classes": class_table(run.summary.get("per_class") or []),
        "Failed clients": failure_table(run.metrics, run.ledger),
    }
    return (
        templates()
        .get_template("notebook.html.j2")
        .render(
            run=run,
            subtitle=subtitle(run),
            notices=notices(run),
            cards=cards(run),
            pictures=[(drawing, _image(drawing)) for drawing in drawings(run)],
            tables={title: table for title, table in tables.items() if table.rows},
            reasons=byte_reasons(run.ledger),
        )
    )


def _image(drawing: Drawing) -> Markup:
    """Return a picture as an image that needs no other file, or the reason why there is none."""
    try:
        data = base64.b64encode(save_svg(drawing.make(), drawing.name)).decode()
    except plots.MissingData as missing:
        return escape(f"Not shown: {missing}.")
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}" style="width:100%"/>').format(
        drawing.title, data
    )

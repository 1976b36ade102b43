"""Writing what a study found into its folder: tables, frames, pictures and one self-contained page."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from federated.results.plot_style import inline_svg, save_figure
from federated.results.report import Picture, templates
from federated.results.run_frames import load_runs
from federated.results.run_outcome import parse_budget, parse_target
from federated.results.study_plots import study_pictures
from federated.results.study_results import StudyResults
from federated.results.study_tables import study_notes, study_tables, to_latex, to_latex_text
from federated.results.tables import TextTable, to_markdown
from models.errors import UserError
from models.files import BestEffort, errors_named, write_text


def write_tables(
    results: StudyResults,
    folder: Path,
    *,
    target: float | str | None = None,
    budget: int | str | None = None,
) -> tuple[dict[str, TextTable], list[str]]:
    """Write a study's tables in Markdown, LaTeX and CSV; return them, and the notes below them.

    Args:
        results: Of the study.
        folder: The study's.
        target: Value of the headline metric for Cost-to-Target.
        budget: Bytes for Quality-under-Budget.

    Raises:
        UserError: Target or budget is no number, no run finished, or a file cannot be written.
    """
    if not any(variant.runs for variant in results.variants):
        raise UserError(f"no run of {results.name} finished; {folder / 'logs'} has what each of them printed")
    value = None if target is None else parse_target(target, results.metric)
    num_bytes = None if budget is None else parse_budget(budget)
    tables, notes = study_tables(results, value, num_bytes), study_notes(results, value)
    write_text(folder / "tables.md", _markdown(results, tables, notes))
    write_text(folder / "tables.tex", _latex(tables, notes))
    frame = results.frame(value, num_bytes)
    write_text(folder / "results.csv", frame.to_csv(index=False, lineterminator="\n"))
    return tables, notes


def write_page(
    results: StudyResults, folder: Path, tables: Mapping[str, TextTable], notes: Sequence[str]
) -> Path:
    """Write ``study.html`` and what is beside it: pictures, and all runs and rounds as CSV.

    Args:
        results: Of the study.
        folder: The study's, with its runs.
        tables: As ``write_tables`` returns them.
        notes: Likewise.

    Raises:
        UserError: A file cannot be written, or a run's file cannot be read.
    """
    for name, by_round in (("runs", False), ("rounds", True)):
        frame = load_runs(Path(glob.escape(str(folder))) / "runs" / "*", by_round=by_round)
        write_text(folder / f"{name}.csv", frame.to_csv(lineterminator="\n"))
    study_file = folder / "study.yaml"
    page = (
        templates()
        .get_template("study.html.j2")
        .render(
            results=results,
            tables=tables,
            notes=notes,
            pictures=_pictures(results, folder / "plots"),
            study_text=study_file.read_text(encoding="utf-8") if study_file.is_file() else "",
        )
    )
    path = folder / "study.html"
    write_text(path, page)
    return path


def _markdown(results: StudyResults, tables: dict[str, TextTable], notes: list[str]) -> str:
    parts = [f"# {results.name}\n"]
    parts += [f"## {title}\n\n{to_markdown(table)}" for title, table in tables.items()]
    parts += [f"{note}\n" for note in notes]
    return "\n".join(parts)


def _latex(tables: dict[str, TextTable], notes: list[str]) -> str:
    parts = ["% \\usepackage{booktabs}\n"]
    parts += [f"% {to_latex_text(title)}\n{to_latex(table)}" for title, table in tables.items()]
    parts += [f"% {to_latex_text(note)}\n" for note in notes]
    return "\n".join(parts)


def _pictures(results: StudyResults, folder: Path) -> list[Picture]:
    """Draw and save the pictures, best effort; return them for the page."""
    with errors_named(folder):
        folder.mkdir(exist_ok=True)
    found: list[Picture] = []
    with BestEffort("drawing the study's pictures"):
        for name, (words, caption, figure) in study_pictures(results).items():
            title = words[0].upper() + words[1:]
            found.append(Picture(name, title, caption, Markup(inline_svg(figure, name, title))))
            save_figure(figure, folder, name)
    return found

"""The tables of a study as text: terminal, Markdown, LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator

from federated.results.seed_statistics import Spread, spread
from federated.results.study_results import Cost, StudyResults
from federated.results.tables import TextTable
from federated.results.wording import MISSING, format_bytes, format_metric, is_share, metric_label

_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "→": r"$\rightarrow$",
    "≥": r"$\geq$",
    "<": "$<$",
    ">": "$>$",
}


def study_tables(
    results: StudyResults, target: float | None = None, budget_bytes: float | None = None
) -> dict[str, TextTable]:
    """Return title -> table: results, differences, Cost-to-Target and Quality-under-Budget where asked for.

    Args:
        results: Of the study.
        target: Value of the headline metric.
        budget_bytes: Wire bytes.
    """
    metric, found = results.metric, {"Results": _result_table(results)}
    if results.differences:
        found["Differences to the baseline, seed by seed"] = _difference_table(results)
    if target is not None:
        title = f"Cost-to-Target: {metric_label(metric)} {format_metric(metric, target)}"
        found[title] = _cost_table(results, target)
    if budget_bytes is not None:
        found[f"Quality-under-Budget: {format_bytes(budget_bytes)} sent"] = _budget_table(
            results, budget_bytes
        )
    return found


def study_notes(results: StudyResults, target: float | None = None) -> list[str]:
    """Return what a reader of the tables must know, a sentence each."""
    notes = [
        "± is the standard deviation over seeds, [ ] the 95 % confidence interval of the mean (Student's t)."
    ]
    if results.differences:
        number = len(results.corrected_p_values)
        notes.append(
            "Differences pair runs of one seed; p is of the paired t-test, and p (Holm) is corrected for "
            f"the {'one comparison' if number == 1 else f'{number} comparisons'} of this study. Intervals "
            "are not corrected."
        )
    if len(results.seeds) < 3:
        notes.append("With fewer than 3 seeds an interval says next to nothing.")
    notes.append("MB are wire bytes, both ways, client evaluation included.")
    if target is not None:
        notes.append(
            "Until the target: up to the first evaluated model that reached it. Where some seeds did not "
            "reach it, they count with all they sent, and the mean is a lower bound (>)."
        )
    if results.tuned_key is not None:
        notes.append(f"Each variant chose {results.tuned_key} on the validation split, not on test rows.")
    return [*notes, *results.notes]


# ---- tables


def _result_table(results: StudyResults) -> TextTable:
    label, rows = metric_label(results.metric), []
    for variant in results.variants:
        finals = spread(list(variant.finals.values()))
        chosen = () if results.tuned_key is None else (_text(variant.chosen),)
        rows.append(
            (
                variant.name,
                *chosen,
                _seeds(len(variant.finals), len(results.seeds)),
                _with_sd(results.metric, finals),
                _interval(results.metric, finals),
                _megabytes(variant.spread_of(lambda run: run.wire_bytes)),
                _megabytes(variant.spread_of(lambda run: run.wire_bytes_with_base)),
            )
        )
    tuned = () if results.tuned_key is None else (results.tuned_key,)
    columns = ("variant", *tuned, "seeds", label, "95 % interval", "MB sent", "with base")
    return TextTable(columns, tuple(rows), words=frozenset({0}), optional=("with base",))


def _difference_table(results: StudyResults) -> TextTable:
    rows = []
    for variant in results.variants:
        difference = results.differences.get(variant.name)
        if difference is None:
            continue
        rows.append(
            (
                variant.name,
                variant.baseline,
                _difference(results.metric, difference.spread),
                _interval(results.metric, difference.spread, signed=True),
                _p_value(difference.p_value),
                _p_value(results.corrected_p_values.get(variant.name)),
                f"{difference.wins}/{difference.ties}/{difference.losses}",
            )
        )
    unit = " (points)" if is_share(results.metric) else ""
    columns = ("variant", "against", f"difference{unit}", "95 % interval", "p", "p (Holm)", "win/tie/loss")
    return TextTable(columns, tuple(rows), words=frozenset({0, 1}), optional=("p",))


def _cost_table(results: StudyResults, target: float) -> TextTable:
    costs, rows = results.cost_to(target), []
    for variant in results.variants:
        cost = costs.get(variant.name)
        rows.append((variant.name, *(_cost_cells(cost) if cost else (MISSING,) * 5)))
    columns = ("variant", "reached", "rounds", "MB sent", "with base", "simulated s")
    table = TextTable(columns, tuple(rows), words=frozenset({0}))
    timed = any(cost.simulated_seconds is not None for cost in costs.values())
    return table if timed else table.without("simulated s")


def _cost_cells(cost: Cost) -> tuple[str, ...]:
    """Return how many seeds reached a target, and what it took: a bound where not all of them did."""
    units = ((cost.rounds, 1.0), (cost.wire_bytes, 1e6), (cost.wire_bytes_with_base, 1e6))
    cells = []
    for values, unit in (*units, (cost.simulated_seconds, 1.0)):
        if values is None:
            cells.append(MISSING)
        elif not cost.reached:
            cells.append("not reached")
        elif cost.reached < cost.num:
            cells.append(f"> {_number(values.mean / unit)}")
        else:
            cells.append(f"{_number(values.mean / unit)} {_ends(values, unit)}".strip())
    return _seeds(cost.reached, cost.num, always=True), *cells


def _budget_table(results: StudyResults, budget_bytes: float) -> TextTable:
    found, rows = results.quality_under(budget_bytes), []
    for variant in results.variants:
        values = found.get(variant.name)
        num = 0 if values is None else values.num
        seeds = _seeds(num, len(results.seeds))
        rows.append(
            (variant.name, seeds, _with_sd(results.metric, values), _interval(results.metric, values))
        )
    columns = ("variant", "seeds", metric_label(results.metric), "95 % interval")
    return TextTable(columns, tuple(rows), words=frozenset({0}))


# ---- cells


def _seeds(num: int, asked: int, *, always: bool = False) -> str:
    return str(num) if num == asked and not always else f"{num} of {asked}"


def _text(value: object) -> str:
    return MISSING if value is None else str(value)


def _scaled(metric: str, value: float, *, signed: bool = False) -> str:
    """Write a metric without its unit: shares in per cent."""
    text = f"{100 * value:+.1f}" if is_share(metric) else f"{value:+.4g}"
    if not signed or not float(text):
        text = text.lstrip("+" if float(text) else "+-")
    return text.replace("-", "−")


def _with_sd(metric: str, values: Spread | None) -> str:
    if values is None:
        return MISSING
    sd = "" if values.sd is None else f" ± {_scaled(metric, values.sd)}"
    return f"{_scaled(metric, values.mean)}{sd}{' %' if is_share(metric) else ''}"


def _difference(metric: str, values: Spread) -> str:
    return _scaled(metric, values.mean, signed=True)


def _interval(metric: str, values: Spread | None, *, signed: bool = False) -> str:
    if values is None or values.low is None or values.high is None:
        return MISSING
    return f"[{_scaled(metric, values.low, signed=signed)}, {_scaled(metric, values.high, signed=signed)}]"


def _ends(values: Spread, unit: float) -> str:
    if values.low is None or values.high is None:
        return ""
    return f"[{_number(values.low / unit)}, {_number(values.high / unit)}]"


def _number(value: float) -> str:
    return f"{value:,.{2 if abs(value) < 10 else 1}f}".replace("-", "−")


def _megabytes(values: Spread | None) -> str:
    return MISSING if values is None else _number(values.mean / 1e6)


def _p_value(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# ---- files


def to_latex(table: TextTable) -> str:
    """Return a table as a LaTeX tabular with the rules of booktabs."""
    columns = "".join("l" if number in table.words else "r" for number in range(len(table.columns)))
    return "\n".join(_latex_lines(table, columns)) + "\n"


def _latex_lines(table: TextTable, columns: str) -> Iterator[str]:
    yield f"\\begin{{tabular}}{{{columns}}}"
    yield r"\toprule"
    yield " & ".join(map(to_latex_text, table.columns)) + r" \\"
    yield r"\midrule"
    for row in table.rows:
        yield " & ".join(map(to_latex_text, row)) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def to_latex_text(text: str) -> str:
    """Return a text with what LaTeX reads as commands escaped."""
    escaped = "".join(_LATEX.get(mark, mark) for mark in text)
    return re.sub(r"^\[", "{[}", escaped)  # after \\ it would be an argument

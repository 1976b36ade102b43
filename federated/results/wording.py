"""How numbers and metric names are written wherever people read them: terminal, plots, report.

kB, MB and GB are powers of ten. Shares are printed as percentages, all other metrics with four digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_THOUSAND = 1000
_SHARES = ("accuracy", "recall", "precision", "f1", "fraction", "share", "exact_match")
_SHORT_METRICS = {"image_to_text_recall_at_": "I→T R@", "text_to_image_recall_at_": "T→I R@"}
MISSING = "–"


def format_bytes(num_bytes: float | None) -> str:
    """Write a byte count: ``825 B``, ``3.15 MB``, ``605.1 MB``."""
    if num_bytes is None:
        return MISSING
    if abs(num_bytes) < _THOUSAND:
        return f"{num_bytes:.0f} B"
    value, unit = float(num_bytes), 0
    while abs(value) >= _THOUSAND and unit < len(_BYTE_UNITS) - 1:
        value, unit = value / _THOUSAND, unit + 1
    if round(abs(value), 1) >= _THOUSAND and unit < len(_BYTE_UNITS) - 1:  # 999,999 B is 1.00 MB
        value, unit = value / _THOUSAND, unit + 1
    return f"{value:.{_decimals(value)}f} {_BYTE_UNITS[unit]}"


def _decimals(value: float) -> int:
    return 2 if abs(round(value, 2)) < 10 else 1


def format_megabytes(num_bytes: float | None) -> str:
    """Write a byte count in MB alone, for a column whose heading names the unit."""
    if num_bytes is None:
        return MISSING
    if not num_bytes:
        return "0"
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.{3 if abs(megabytes) < 10 else 2 if abs(megabytes) < 100 else 1}f}"


def format_percent(share: float | None, decimals: int = 1) -> str:
    """Write a share as a percentage; one that is not quite 100 % is never rounded up to it."""
    if share is None or math.isnan(share):
        return MISSING
    text = f"{100 * share:.{decimals}f}"
    if share < 1 and float(text) == 100:
        text = f"{100 - 10**-decimals:.{decimals}f}"
        return f"> {text} %"
    return f"{text} %"


def saving(share: float | None) -> tuple[str, bool]:
    """Return what was saved of something in per cent, and whether it is what was sent more instead."""
    sent_more = share is not None and round(share, 4) < 0
    return format_percent(None if share is None else abs(share), 2), sent_more


def format_saving(share: float | None) -> str:
    """Write what was saved of something, or by how much more was sent: ``98.01 %``, ``0.02 % more``."""
    percent, sent_more = saving(share)
    return f"{percent} more" if sent_more else percent


def format_seconds(seconds: float | None) -> str:
    """Write a duration: ``0.41 s``, ``41.2 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: int | None) -> str:
    """Write a count with thousands separators."""
    return MISSING if count is None else f"{count:,}"


def is_share(metric: str) -> bool:
    """Return whether the metric is a share of 1, to be printed as a percentage."""
    return any(word in metric for word in _SHARES)


def format_metric(metric: str, value: float | None) -> str:
    """Write a metric's value: shares as percentages, losses and the like with four digits."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if metric == "aggregation_error":
        return "< 0.001 %" if 0 < value < 1e-5 else f"{100 * value:.3g} %"
    return format_percent(value) if is_share(metric) else f"{value:.4g}"


def metric_label(metric: str) -> str:
    """Turn a metric's key into words: ``image_to_text_recall_at_5`` is ``I→T R@5``."""
    for prefix, short in _SHORT_METRICS.items():
        if metric.startswith(prefix):
            return short + metric.removeprefix(prefix)
    return metric.replace("_", " ")


def format_rounds(rounds: Iterable[int]) -> str:
    """Write round numbers with their runs joined: ``1–3, 7``."""
    spans: list[list[int]] = []
    for server_round in sorted(set(rounds)):
        if spans and server_round == spans[-1][1] + 1:
            spans[-1][1] = server_round
        else:
            spans.append([server_round, server_round])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)

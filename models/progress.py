"""How work says how far it is, and the bar on standard error that shows it.

Functions of the package take a ``Report`` and call it; only the command line makes a bar of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]
"""Told how many of how many inputs are done."""


def quiet(done: int, total: int) -> None:
    """Report nothing."""


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Report]:
    """Yield a ``Report`` that moves a bar on standard error; there is no bar where that is no terminal.

    Args:
        what: What is counted, such as "images".
    """
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""How work says how far it is, and the bar on standard error that shows it.

Functions of the package take a ``Report`` and call it, or say what they are doing (``doing``, ``counted``) to
whoever watches this process; only the command line shows any of it, and nothing where it is to be quiet.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Thing = TypeVar("Thing")

Report = Callable[[int, int], None]
"""Told how many of how many inputs are done."""

Watcher = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is, and how much there is (None: nobody knows)."""

_WATCHER: ContextVar[tuple[int, Watcher] | None] = ContextVar("watcher", default=None)
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def quiet(done: int, total: int) -> None:
    """Report nothing."""


def set_quiet(value: bool) -> None:
    """Say whether the command line shows anything but results and errors from now on."""
    _QUIET.set(value)


def is_quiet() -> bool:
    """Whether nothing but results and errors is to be shown."""
    return _QUIET.get()


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` be told what is done inside, in this process alone."""
    token = _WATCHER.set((os.getpid(), watcher))
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Tell the watcher, if there is one, that something of unknown length is done inside."""
    watcher = _watcher()
    if watcher is not None:
        watcher(what, 0, None)
    yield
    if watcher is not None:
        watcher(what, 1, 1)


def counted(what: str, things: Iterable[Thing], total: int) -> Iterable[Thing]:
    """Return things that are told to the watcher, if there is one, as they are taken and done.

    Args:
        what: What each of them is, such as "steps".
        things: Any number of them.
        total: Their number.
    """
    watcher = _watcher()
    return things if watcher is None else _told(watcher, what, things, total)


def _told(watcher: Watcher, what: str, things: Iterable[Thing], total: int) -> Iterator[Thing]:
    watcher(what, 0, total)
    for done, thing in enumerate(things, start=1):
        yield thing
        watcher(what, done, total)


def _watcher() -> Watcher | None:
    """Who watches this process; a process that was forked from a watched one is not."""
    process, watcher = _WATCHER.get() or (None, None)
    return watcher if process == os.getpid() else None


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Report]:
    """Yield a ``Report`` that moves a bar on standard error; there is no bar where that is no terminal.

    Args:
        what: What is counted, such as "images".
    """
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal and not is_quiet()
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

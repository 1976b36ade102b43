"""``run.log``: what the terminal showed of a run, and what was logged, each line with its time (UTC)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

LOG_FILE = "run.log"
SHOWN = logging.getLogger("fedlora.shown")
"""Gets what consoles print; goes to logs of runs alone."""


class _Lines(logging.Formatter):
    """Puts the time in front of every line, and of what was logged the logger."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        logger = "" if record.name == SHOWN.name else f"{record.levelname} {record.name}: "
        lines = record.getMessage().splitlines() or [""]
        return "\n".join(f"{moment} {logger}{line}".rstrip() for line in lines)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk does not end a run here."""


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Append to a run's log inside the block."""
    handler = _LogFile(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_Lines())
    loggers = (SHOWN, logging.getLogger())
    SHOWN.setLevel(logging.INFO)
    SHOWN.propagate = False
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()

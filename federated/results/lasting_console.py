"""The console of a run, which a closed pipe or a full disk behind standard output does not end."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.control import Control

from federated.results.run_log import SHOWN
from models.progress import is_quiet

log = logging.getLogger(__name__)


def lasting_console() -> Console:
    """Return a console on standard output for work whose results are in files: it goes on without output."""
    if sys.stdout is None:
        return LoggedConsole(quiet=is_quiet())
    return LoggedConsole(file=_Lasting(sys.stdout), quiet=is_quiet())


class LoggedConsole(Console):
    """A console whose lines, but not its bars, also go into the log of the run that is going on."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, and log the same as plain text."""
        super().print(*objects, **options)
        if SHOWN.handlers and not all(isinstance(part, Control) for part in objects):
            plain = Console(file=io.StringIO(), width=self.width, color_system=None)
            plain.print(*objects, **options)
            SHOWN.info("%s", plain.file.getvalue())  # type: ignore[attr-defined]


class _Lasting(io.TextIOBase, TextIO):
    """A stream that drops what its end does not take, with one warning."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Lead the stream to nowhere, with what it still holds: Python flushes it once more at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        log.warning(
            "standard output takes no more (%s): the work goes on, its folder has all results",
            error.strerror or error,
        )

"""Ending a program on request: the first signal ends it in good order, the second at once.

SIGINT (Ctrl-C) and SIGTERM become ``StopRequested``, raised where the program stands, or, in a block that is
``unstoppable``, when that block has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"


class StopRequested(KeyboardInterrupt):
    """A signal asked for the end.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """The signal's name, such as SIGINT."""
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class _Requests:
    """The signal that came first, if one came, and how many blocks it has to wait for."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_due = False
        self.num_blocks = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            _end_at_once(number)
        self.number, self.is_due = number, True
        if not self.num_blocks:
            self.stop()

    def stop(self) -> None:
        if self.is_due and self.number is not None:
            self.is_due = False
            raise StopRequested(self.number)


_requests = _Requests()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn signals into ``StopRequested`` inside the block; outside the main thread that cannot be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests.number, _requests.is_due = None, False
    before = {number: signal.signal(number, _requests.handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unstoppable() -> Iterator[None]:
    """Let a first signal wait for the end of the block."""
    _requests.num_blocks += 1
    try:
        yield
    finally:
        _requests.num_blocks -= 1
    if not _requests.num_blocks:
        _requests.stop()


def _end_at_once(number: int) -> None:
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), _SHOW_CURSOR.encode())  # which bars may have hidden
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

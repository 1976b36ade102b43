"""The one exception type that means "the input is wrong, and here is what to do about it".

Every layer raises it for bad configuration, data or adapter files; the command line prints its
message and ends with exit code 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ROUND_FAILURE = "round_failure"
"""Extra key of log records that a display shows besides: the client whose answer cannot be used, or None
where a whole round is skipped."""


class UserError(ValueError):
    """Bad input. The message names the file, key or client at fault and the remedy.

    It may quote what others wrote: as a text it holds no control characters, wherever it is shown or sent.

    Args:
        message: As above.
        options: Arguments that it is about, by the names that they have where it is raised; whoever knows the
            keys that they were written under puts those in front.
    """

    def __init__(self, message: str = "", *, options: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.options = tuple(options)

    def __str__(self) -> str:
        """Return the message, printable."""
        return printable(super().__str__())


class NoRoomError(UserError):
    """A disk is full; what was there before is as it was."""


def install_command(extra: str) -> str:
    """Return how to install an optional part; the package is on no index, so that it comes from a clone."""
    return f"pip install -c constraints.txt '.[{extra}]' in the clone of fedlora"


# ---- somebody else's words in a message

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What is no text: control characters save ends of lines and tabs, and what is not Unicode."""
_MOST_SHOWN = 200


def shortened(value: object) -> str:
    """Return the first line of a text for a message, its control characters escaped."""
    line = next(iter(str(value).strip().splitlines()), "") or type(value).__name__
    cut = line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}…"
    return printable(cut)


def printable(text: str) -> str:
    """Return a text with its control characters, and what is not Unicode in it, escaped."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)

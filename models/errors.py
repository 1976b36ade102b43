"""The one exception type that means "the input is wrong, and here is what to do about it".

Every layer raises it for bad configuration, data or adapter files; the command line prints its
message and ends with exit code 2.
"""

from __future__ import annotations

ROUND_FAILURE = "round_failure"
"""Extra key of log records that a display shows besides: the client whose answer cannot be used, or None
where a whole round is skipped."""


class UserError(ValueError):
    """Bad input. The message names the file, key or client at fault and the remedy."""


def install_command(extra: str) -> str:
    """Return how to install an optional part; the package is on no index, so that it comes from a clone."""
    return f"pip install -c constraints.txt '.[{extra}]' in the clone of fedlora"

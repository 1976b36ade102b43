"""Text that a client wrote, made fit for terminal, log and file: one short line of visible characters."""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 500
"""Longer text is cut, and says so."""

_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor, clear screen
    r"|(?:\x1b[P\]X^_]|[\x90\x9d\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # titles, links, strings
    r"|\x1b[ -/]*[0-~]?"
)
"""What terminals read as commands (ECMA-48)."""

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
"""Unicode categories: control, format (bidi marks among them), surrogate, private, unassigned."""


def shown(text: str) -> str:
    """Return a client's text as one line: without terminal commands, controls and bidi marks, and cut.

    Args:
        text: Of any length and content.
    """
    rest = max(0, len(text) - 4 * MAX_CHARACTERS)  # a cheap first cut: the text may be many megabytes
    plain = _SEQUENCES.sub(" ", text[: 4 * MAX_CHARACTERS])
    letters = [c for c in plain if c.isspace() or unicodedata.category(c) not in _INVISIBLE]
    line = " ".join("".join(letters).split())
    rest += max(0, len(line) - MAX_CHARACTERS)
    return f"{line[:MAX_CHARACTERS]} … ({rest} more characters)" if rest else line

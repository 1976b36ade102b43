"""Class names, labels and captions as people mean them, and what of them cannot be used."""

from __future__ import annotations

import csv
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from models.errors import UserError

MAX_NAMED = 5
"""Things named in one message."""

MAX_SHOWN = 120
"""Letters of one name or caption that a message shows."""


def plain(text: str) -> str:
    """Return a text with its letters in Unicode's composed form, blanks as one each and none around."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def visible(text: str) -> str:
    """Return a plain text without the characters that nobody sees, such as zero-width spaces."""
    return plain("".join(letter for letter in text if unicodedata.category(letter) != "Cf"))


def read_alike(text: str) -> str:
    """Return what captions that say the same have in common: their visible letters, whatever their case."""
    return visible(text).casefold()


def names_in(text: str) -> list[str]:
    """Return the names in a text like 'cat, "boots, black"': separated by commas, quoted where they hold one.

    Raises:
        UserError: a quotation mark is not closed.
    """
    if text.count('"') % 2:
        raise UserError(
            f'{text!r} is no list of names: a quotation mark is not closed; write cat,"boots, black"'
        )
    fields = next(csv.reader([text], skipinitialspace=True), [])
    return [name.strip() for name in fields]


def listed(things: Iterable[object], limit: int = MAX_NAMED) -> str:
    """Name a few of many things: "a, b and 3 more"."""
    names = [str(thing) for thing in things]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shortened(text: str) -> str:
    """Return a text in quotes, cut where it is long; every character that is not printable is escaped."""
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} …")


def unusable(name: str) -> str | None:
    """Say what keeps a name from being written to files and terminals; None where nothing does."""
    categories = {unicodedata.category(letter) for letter in name}
    if "Cs" in categories:
        return "is not UTF-8"
    return "holds control characters" if "Cc" in categories else None


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse class names that cannot be written, or that read alike.

    Args:
        names: Distinct class names.
        where: What they are from, for the message.

    Raises:
        UserError: names both, and the remedy.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if (reason := unusable(name)) is not None:
            raise UserError(f"{where}: class name {shortened(name)} {reason}; rename the class")
        alike[visible(name)].append(name)
    if doubles := next((group for group in alike.values() if len(group) > 1), None):
        raise UserError(
            f"{where}: classes {listed(map(shortened, doubles))} differ in blanks, in invisible characters "
            "or in the form of their letters alone; give them one name"
        )

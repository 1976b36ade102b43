"""Looking up a named function, such as a data source or a partitioner, and checking its options.

Stands at the door, before round 0: names and options come from the configuration, and what is wrong with
them is said here, with what would be right.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from models.errors import UserError

Result = TypeVar("Result")


def look_up(
    registry: Mapping[str, Callable[..., Result]], kind: str, name: str, options: Mapping[str, Any]
) -> Callable[..., Result]:
    """Return the function called ``name`` after checking that it takes ``options``.

    Only keyword-only parameters count as options; those without a default are required.

    Args:
        registry: Name -> function.
        kind: What the functions are, for messages: ``"partitioner"``.
        name: The name asked for.
        options: The options it will be called with.

    Raises:
        UserError: There is no such name or option, or a required option is missing.
    """
    if name not in registry:
        raise UserError(
            f"no {kind} {name!r}{_nearest(name, registry)}; there are {', '.join(sorted(registry))}"
        )
    parameters = inspect.signature(registry[name]).parameters.values()
    known = {
        parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in known:
            raise UserError(
                f"{kind} {name!r} has no option {option!r}{_nearest(option, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"{kind} {name!r} needs the option {option!r}")
    return registry[name]


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""

"""Building what a configuration chooses by name, such as a data source or a partitioner, with its options."""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from models.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Choice:
    """Where a configuration says which function is meant, and with which options.

    Attributes:
        kind: What the functions are, for messages: ``"partitioner"``.
        name_key: Dotted key of the name.
        options_key: Dotted key of the section that holds the options.
        own_keys: Option, or other argument -> its dotted key, where that is not in the section of options.
    """

    kind: str
    name_key: str
    options_key: str
    own_keys: Mapping[str, str] = field(default_factory=dict)

    def key_of(self, option: str) -> str:
        """Return the dotted key of an option."""
        return self.own_keys.get(option, f"{self.options_key}.{option}")

    def without_options(self, name: str) -> str:
        """Return the override that leaves no option."""
        holds_name = self.name_key.startswith(f"{self.options_key}.")
        return f"{self.options_key}={{{f'name: {name}' if holds_name else ''}}}"


def build(
    registry: Mapping[str, Callable[..., Result]],
    choice: Choice,
    name: str,
    options: Mapping[str, Any],
    *arguments: Any,
) -> Result:
    """Call the function called ``name`` with ``arguments`` and ``options``.

    Only keyword-only parameters count as options; those without a default are required. Values are brought
    to the types of the parameters, as YAML's ``1e-3``, which is a string, to a float.

    Args:
        registry: Name -> function.
        choice: What the functions are, and which keys name and options stand under.
        name: The name asked for.
        options: The options that the configuration gives.
        *arguments: What the function takes beside them.

    Returns:
        What the function returns.

    Raises:
        UserError: There is no such name or option, a required option is missing, or the function refuses a
            value; the message begins with the dotted keys.
    """
    if name not in registry:
        raise UserError(f"{choice.name_key}: {no_such(choice.kind, name, registry)}")
    function = registry[name]
    parameters = inspect.signature(function).parameters.values()
    known = {
        parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in known:
            raise UserError(_unknown_option(option, choice, name, known))
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"{choice.key_of(option)}: {choice.kind} {name!r} needs the option {option!r}")
    values = _of_their_types(function, options, choice)
    try:
        return function(*arguments, **values)
    except UserError as error:
        raise UserError(f"{_keys_meant(str(error), choice, known, options)}: {error}") from error


def no_such(kind: str, name: str, names: Iterable[str]) -> str:
    """Return what to say of a name that is not there: the nearest, and those that are."""
    known = sorted(names)
    there = f"there are {', '.join(known)}; --plugin FILE.py brings others"
    return f"no {kind} {name!r}{_nearest(name, known)}; {there}"


def _unknown_option(option: str, choice: Choice, name: str, known: Iterable[str]) -> str:
    nearest = _nearest(option, known)
    message = (
        f"{choice.key_of(option)}: {choice.kind} {name!r} has no option {option!r}{nearest}; "
        f"it has {', '.join(known) or 'none'}"
    )
    if nearest:
        return message
    if option in choice.own_keys:
        return f"{message}. Leave {choice.key_of(option)} out, or choose another {choice.name_key}"
    remedy = f"{choice.without_options(name)}, before options of your own, drops those of the file"
    return f"{message}. Options of the configuration's file stay when {choice.name_key} changes: {remedy}"


def _of_their_types(
    function: Callable[..., Any], options: Mapping[str, Any], choice: Choice
) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    values = {}
    for option, value in options.items():
        try:
            values[option] = TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"]
            raise UserError(f"{choice.key_of(option)}: {wrong} (got {value!r})") from error
    return values


def _keys_meant(message: str, choice: Choice, known: Iterable[str], options: Mapping[str, Any]) -> str:
    """Return the dotted keys of what a function's message mentions, or else the key it is most about."""
    candidates = dict.fromkeys([*known, *choice.own_keys])
    mentioned = [choice.key_of(word) for word in candidates if re.search(rf"\b{word}\b", message)]
    given = [key for option, key in choice.own_keys.items() if option in options]
    return ", ".join(mentioned or given or [choice.name_key])


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""

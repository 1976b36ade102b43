"""Building what a configuration chooses by name, such as a data source or a partitioner, with its options."""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

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
    to the types of the parameters, as YAML's ``1e-3``, which is a string, to a float. A UserError of the
    function is told under the keys of the options that it names.

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
    typed = checked_options(registry, choice, name, options)
    function = registry[name]
    try:
        return function(*arguments, **{option: getattr(typed, option) for option in typed.model_fields_set})
    except UserError as error:
        raise UserError(f"{_keys_meant(error, choice, options)}: {error}") from error


def checked_options(
    registry: Mapping[str, Callable[..., Any]], choice: Choice, name: str, options: Mapping[str, Any]
) -> BaseModel:
    """Return the options of a choice, brought to their types, without calling its function.

    Raises:
        UserError: As ``build``, before the function has its say.
    """
    if name not in registry:
        raise UserError(f"{choice.name_key}: {no_such(choice.kind, name, registry)}")
    function = registry[name]
    try:
        return options_of(function).model_validate(options)
    except ValidationError as error:
        raise UserError(_wrong_option(error, choice, name, function, options)) from error


@functools.cache
def options_of(function: Callable[..., Any]) -> type[BaseModel]:
    """Return the options of a function as a model: its keyword-only parameters, their types and defaults."""
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    named = SimpleNamespace(
        __annotations__={p.name: Any if p.annotation is p.empty else p.annotation for p in parameters}
    )
    names = getattr(inspect.unwrap(function), "__globals__", {})
    hints = typing.get_type_hints(named, globalns=names, include_extras=True)
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters
    }
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"Options of {function.__name__}", __config__=settings, **fields)


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


def _wrong_option(
    error: ValidationError,
    choice: Choice,
    name: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
) -> str:
    """Return what is wrong with the options, one thing: an unknown one, a missing one, or a value."""
    order = {"extra_forbidden": 0, "missing": 1}
    wrong = min(error.errors(), key=lambda detail: order.get(detail["type"], 2))
    option = str(wrong["loc"][0])
    if wrong["type"] == "extra_forbidden":
        return _unknown_option(option, choice, name, options_of(function).model_fields)
    if option not in options:
        return f"{choice.key_of(option)}: {choice.kind} {name!r} needs the option {option!r}"
    words = wrong["msg"].removeprefix("Value error, ")
    return f"{choice.key_of(option)}: {words} (got {options[option]!r})"


def _keys_meant(error: UserError, choice: Choice, options: Mapping[str, Any]) -> str:
    """Return the dotted keys of the options that an error is about, or else the key it is most about."""
    meant = [choice.key_of(option) for option in error.options]
    given = [key for option, key in choice.own_keys.items() if option in options]
    return ", ".join(meant or given or [choice.name_key])


def _nearest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""

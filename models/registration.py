"""Adding to a registry from outside the packages: the functions ``register_aggregator`` and their like."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from models.errors import UserError, shortened

Thing = TypeVar("Thing")

_source: ContextVar[str] = ContextVar("_source", default="this program")
_added: dict[tuple[str, str], Addition] = {}


@dataclass(frozen=True, eq=False)
class Addition:
    """A name that was added.

    Attributes:
        registry: Holds it.
        source: Who added it, for messages.
    """

    registry: MutableMapping[str, Any]
    source: str


def registering(
    kind: str, registry: MutableMapping[str, Any], arguments: Sequence[str] = ()
) -> Callable[[str], Callable[[Thing], Thing]]:
    """Return a decorator that enters functions into a registry, by a name.

    Args:
        kind: What the registry holds, for messages: ``"partitioner"``.
        registry: Name -> function.
        arguments: What the functions are called with, beside their options.

    Returns:
        ``register``, used as ``@register("name")``. It raises UserError for a name that is taken or cannot be
        one, and for a function that is called with other arguments.
    """

    def register(name: str) -> Callable[[Thing], Thing]:
        if not isinstance(name, str):
            raise UserError(
                f'registering: a name is needed before the {kind} itself, as in @register("NAME")'
            )

        def enter(function: Thing) -> Thing:
            check_call(kind, name, function, arguments)
            add(kind, name, function, registry)
            return function

        return enter

    return register


def add(kind: str, name: str, thing: Any, registry: MutableMapping[str, Any]) -> None:
    """Enter something into a registry.

    Raises:
        UserError: The name is taken, or cannot be one.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"{shortened(repr(name))} cannot be the name of a new {kind}: take letters, digits and '_'"
        )
    if name in registry:
        by = _added[kind, name].source if (kind, name) in _added else "fedlora itself"
        raise UserError(f"{kind} {name!r} is there already, from {by}: choose another name")
    registry[name] = thing
    _added[kind, name] = Addition(registry, _source.get())


def added(kind: str | None = None) -> dict[tuple[str, str], Any]:
    """Return what was added: (kind, name) -> the function or value; of one kind where it is given."""
    return {key: of.registry[key[1]] for key, of in _added.items() if kind in (None, key[0])}


def remove(names: Sequence[tuple[str, str]]) -> None:
    """Take additions, as (kind, name), out of their registries; what is not there any more is passed over."""
    for kind, name in names:
        if addition := _added.pop((kind, name), None):
            addition.registry.pop(name, None)


@contextmanager
def additions_by(source: str) -> Iterator[list[tuple[str, str]]]:
    """Attribute what is added inside the block; it is taken back if the block raises.

    Args:
        source: Who adds, for messages.

    Yields:
        A list that holds what was added, as (kind, name), after the block.
    """
    before, names = set(_added), list[tuple[str, str]]()
    token = _source.set(source)
    try:
        yield names
        names += [key for key in _added if key not in before]
    except BaseException:
        remove([key for key in _added if key not in before])
        raise
    finally:
        _source.reset(token)


def check_call(kind: str, name: str, function: Any, arguments: Sequence[str]) -> None:
    """Refuse a function that cannot be called with these arguments and options behind them.

    Raises:
        UserError: It cannot.
    """
    call = f"{name}({', '.join([*arguments, '*', 'options'])})"
    if not callable(function):
        raise UserError(f"{kind} {name!r} must be a function, called as {call}")
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        signature.bind_partial(*arguments)
    except TypeError:
        fits = False
    else:
        fits = all(p.default is p.empty for p in positional) and len(positional) <= len(arguments)
    if not fits:
        raise UserError(f"{kind} {name!r} must be called as {call}: options stand behind a '*'")

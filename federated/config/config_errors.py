"""What is wrong with a configuration, in words: where it stands, dotted keys, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from models.errors import shortened

COMMAND_LINE = "on the command line"
"""Where overrides are written."""


def explain(
    error: ValidationError, root: type[BaseModel], *, source: str, overridden: Collection[str] = ()
) -> str:
    """Return what is wrong, a line for each fault, under the place where the value was written.

    Args:
        error: Of validating a configuration.
        root: The whole configuration's type.
        source: The file.
        overridden: Dotted keys whose values were given on the command line.
    """
    lines_at: dict[str, list[str]] = {}
    for key, line in _faults(error, root):
        lines = lines_at.setdefault(_place(key, source, overridden), [])
        if line not in lines:  # a union's members each have their say
            lines.append(line)
    return "\n".join("\n  ".join([f"{place}:", *lines]) for place, lines in lines_at.items())


def _place(key: str, source: str, overridden: Collection[str]) -> str:
    """Return where the value of a key was written; a section may be written at both places."""
    if any(f"{key}.".startswith(f"{override}.") for override in overridden):
        return COMMAND_LINE
    if any(not key or override.startswith(f"{key}.") for override in overridden):
        return f"{source}, with what is changed {COMMAND_LINE}"
    return source


def _faults(error: ValidationError, root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each fault, and its line: the key, what is wrong, what was probably meant."""
    for detail in error.errors():
        location, allowed = _without_members(detail["loc"], root)
        dotted = ".".join(map(str, location))
        words = allowed or detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            yield dotted, f"unknown key {dotted}{_nearest([str(part) for part in location], root)}"
        elif dotted:
            yield dotted, f"{dotted}: {words} (got {shortened(repr(detail['input']))})"
        else:
            yield dotted, words


def _without_members(
    location: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[tuple[int | str, ...], str | None]:
    """Cut off a location what pydantic calls the member of a union; return what all members allow with it."""
    section: type[BaseModel] | None = root
    annotation: Any = root
    for depth, part in enumerate(location):
        if section is None:
            return (
                (location[:depth], _allowed(annotation))
                if len(_members(annotation)) > 1
                else (location, None)
            )
        if part not in section.model_fields:
            break
        annotation = section.model_fields[str(part)].annotation
        section = next((member for member in _members(annotation) if _is_section(member)), None)
    return location, None


def _members(annotation: Any) -> list[Any]:
    """Return the types that a value may have, ``None`` left out."""
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [member for member in get_args(annotation) if member is not NoneType]


def _allowed(annotation: Any) -> str:
    """Return the values that a union of plain types allows, in words."""
    words: list[str] = []
    kinds = [
        schema for schema in TypeAdapter(annotation).json_schema()["anyOf"] if schema != {"type": "null"}
    ]
    has_floats = any(schema.get("type") == "number" for schema in kinds)
    for schema in kinds:
        at_least = f" of at least {schema['minimum']}" if "minimum" in schema else ""
        if "enum" in schema or "const" in schema:
            words += map(str, schema.get("enum", [schema.get("const")]))
        elif schema["type"] != "integer":
            kind = "mapping" if schema["type"] == "object" else schema["type"]
            article = "an" if kind[0] in "aeiou" else "a"
            words.append(f"{article} {kind}{at_least}")
        elif not has_floats:
            words.append(f"a whole number{at_least}")
    return f"give {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}"


def _nearest(location: list[str], root: type[BaseModel]) -> str:
    """Return a hint with the nearest valid key: in the same section first, then anywhere."""
    *section, leaf = location
    valid = list(_dotted_keys(root))
    prefix = ".".join(section)
    siblings = {key.rsplit(".", 1)[-1]: key for key in valid if key.rpartition(".")[0] == prefix}
    matches = _abbreviated(leaf, siblings) or difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {siblings[matches[0]]}?"
    if beginnings := [name for name in siblings if leaf.startswith(name)]:  # rank: r
        return f"; did you mean {siblings[max(beginnings, key=len)]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in valid}
    matches = _abbreviated(leaf, leaves) or difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return (
        f"; did you mean {leaves[matches[0]]}?" if matches else f"; valid here: {', '.join(sorted(siblings))}"
    )


def _abbreviated(leaf: str, names: Iterable[str]) -> list[str]:
    """Return the names whose words begin with the letters of an abbreviation: lr is learning_rate."""
    letters = leaf.replace("_", "")
    return [name for name in names if "_" in name and "".join(word[0] for word in name.split("_")) == letters]


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in filter(_is_section, _members(field.annotation)):
            yield from _dotted_keys(section, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

"""What is wrong with a configuration, in words: dotted keys, and the nearest valid one for each unknown.

Stands before a run: ``federated.config`` raises what is said here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """Yield one line for each fault: the dotted key, what is wrong with it, and what was probably meant.

    Args:
        error: Of validating a configuration.
        root: The whole configuration's type.
    """
    for detail in error.errors():
        location = [part for part in detail["loc"] if isinstance(part, str)]
        dotted = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            yield f"unknown key {dotted}{_nearest(location, root)}"
        elif dotted:
            yield f"{dotted}: {detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r})"
        else:
            yield detail["msg"].removeprefix("Value error, ")


def _nearest(location: list[str], root: type[BaseModel]) -> str:
    """Return a hint with the nearest valid key: in the same section first, then anywhere."""
    *section, leaf = location
    valid = list(_dotted_keys(root))
    prefix = ".".join(section)
    siblings = {key.rsplit(".", 1)[-1]: key for key in valid if key.rpartition(".")[0] == prefix}
    matches = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {siblings[matches[0]]}?"
    leaves = {key.rsplit(".", 1)[-1]: key for key in valid}
    matches = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    return (
        f"; did you mean {leaves[matches[0]]}?" if matches else f"; valid here: {', '.join(sorted(siblings))}"
    )


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _dotted_keys(annotation, f"{prefix}{name}.")

"""Which keys of a run may differ when it goes on: a mark at the schema's field says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from federated.config.schema import MAY_CHANGE, ExperimentConfig
from models.errors import UserError

When = Literal["resume", "fork"]


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys whose values differ between two trees."""
    for name in {**before, **after}:
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from changed_keys(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def may_change(key: str, when: When) -> bool:
    """Return whether a key, or a section around it, is marked as one that may change."""
    section: Any = ExperimentConfig
    for name in key.split("."):
        field = getattr(section, "model_fields", {}).get(name)
        if field is None:
            return False
        extra = field.json_schema_extra
        mark = extra.get(MAY_CHANGE) if isinstance(extra, dict) else None
        if mark is not None:
            return mark in ("resume", when)
        section = field.annotation
    return False


def check_changes(before: ExperimentConfig, after: ExperimentConfig, when: When) -> dict[str, Any]:
    """Return what differs, key -> [before, after], if all of it may.

    Raises:
        UserError: A key would make untrue what the run says of its past rounds.
    """
    trees = before.model_dump(mode="json"), after.model_dump(mode="json")
    keys = list(changed_keys(*trees))
    for key in keys:
        if not may_change(key, when):
            valid = ", ".join(sorted(_marked(when)))
            how = (
                "start another run"
                if when == "fork" or not may_change(key, "fork")
                else "fedlora fork branches"
            )
            raise UserError(
                f"{key} cannot change: the rounds that are done were made with {_at(trees[0], key)!r}. "
                f"May change here: {valid}; for another {key}, {how}"
            )
    return {key: [_at(tree, key) for tree in trees] for key in keys}


def _marked(when: When, section: Any = ExperimentConfig, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        mark = extra.get(MAY_CHANGE) if isinstance(extra, dict) else None
        is_section = hasattr(field.annotation, "model_fields")
        if mark in ("resume", when):
            yield f"{prefix}{name}.*" if is_section else f"{prefix}{name}"
        elif is_section:
            yield from _marked(when, field.annotation, f"{prefix}{name}.")


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree

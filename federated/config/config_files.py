"""Configuration files: find one by name, read it with overrides, write the resolved one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from federated.config.config_errors import explain
from federated.config.plugins import load_plugins, load_recorded
from federated.config.schema import ExperimentConfig
from models.errors import UserError
from models.shipped_configs import config_folder, find_config, shipped_names
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text


def shipped_descriptions() -> dict[str, str]:
    """Return what each shipped configuration is, by its name: the comment at the top of its file."""
    return {name: _description(config_folder() / f"{name}.yaml") for name in shipped_names()}


def _description(path: Path) -> str:
    """Return the comment at the top of a file without its first line, which is the command that runs it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    return " ".join(line.removeprefix("#").strip() for line in comment[1:])


def load_config(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, name_suffix: str = ""
) -> ExperimentConfig:
    """Read a configuration and apply ``key=value`` overrides.

    Args:
        name_or_path: A YAML file or the name of a shipped configuration.
        overrides: Such as ``client.learning_rate=1e-3``; values are YAML.
        name_suffix: Ends the default of ``output.name``, so that two commands do not write one folder.

    Raises:
        UserError: A missing file, YAML that does not parse, an unknown key, a value that does not fit, or a
            plugin that a run was made with and that is not as it was.
    """
    path = find_config(name_or_path)
    if path.name == "config.yaml":  # of a run
        load_recorded(path.parent)
    tree = parse_yaml(read_text(path, MOST_YAML_BYTES), path) or {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    return parse_config(tree, source=str(path), overrides=overrides, default_name=path.stem + name_suffix)


def parse_config(
    tree: dict[str, Any], *, source: str, overrides: Sequence[str] = (), default_name: str | None = None
) -> ExperimentConfig:
    """Validate a configuration tree.

    Args:
        tree: Sections by name; overrides are written into it.
        source: Where it was read, for errors.
        overrides: As in ``load_config``.
        default_name: Becomes ``output.name`` when the tree has none.
    """
    load_plugins()
    overridden = [_apply_override(tree, override) for override in overrides]
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        text = explain(error, ExperimentConfig, source=source, overridden=overridden)
        raise UserError(text) from error
    if config.output.name is None and default_name is not None:
        config = config.model_copy(update={"output": config.output.model_copy(update={"name": default_name})})
    return config


def dump_config(config: ExperimentConfig) -> str:
    """Return the resolved configuration as YAML; ``load_config`` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Put an override's value into the tree and return its key."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key=value, such as federation.rounds=3")
    value = parse_yaml(text, f"the value of {override!r}")
    set_value(tree, key.strip(), value, told_as=f"override {override!r}")
    return key.strip()


def set_value(tree: dict[str, Any], key: str, value: Any, *, told_as: str) -> None:
    """Put a value into a configuration tree under a dotted key.

    Args:
        tree: Sections by name; changed.
        key: Such as ``client.learning_rate``.
        value: As YAML has it.
        told_as: Begins the error.

    Raises:
        UserError: A part of the key is a value, not a section.
    """
    *parents, leaf = key.split(".")
    node = tree
    for part in parents:
        if node.get(part) is None:  # a resolved configuration writes null for what is not given
            node[part] = {}
        child = node[part]
        if not isinstance(child, dict):
            raise UserError(f"{told_as}: {part} is a value, not a section")
        node = child
    node[leaf] = value


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of settings by section or dotted key; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

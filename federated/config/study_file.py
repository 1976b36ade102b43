"""The file of a study: one configuration, what varies in it, seeds, and what the table answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federated.config.config_errors import explain
from models.errors import UserError
from models.untrusted import MOST_YAML_BYTES, parse_yaml, read_text

Values = Annotated[list[Any], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tuning(_Part):
    """A key whose value each variant chooses for itself, on the validation split."""

    key: str
    """Dotted key, such as ``client.learning_rate``."""
    values: Annotated[list[Any], Field(min_length=2)]
    """The values to try; of equally good ones the first."""
    seeds: int = Field(1, ge=1)
    """How many of the study's seeds, from the first on, the choice is made with."""


class StudyFile(_Part):
    """A study. The variants are every combination of ``variants``, the rows of ``zip`` and ``grid``."""

    config: str | dict[str, Any]
    """A shipped name, a YAML file, or sections."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What all runs change in it, by section or dotted key."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> what it changes."""
    grid: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values; every combination of them."""
    zip: dict[str, Values] = Field(default_factory=dict)
    """Dotted key -> values, as many for each key; the first with the first, the second with the second."""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Seed], Field(min_length=1)] = 3
    """How many seeds, from 0 on, or which."""
    baseline: str | None = None
    """What others are compared with: one value's label, such as ``fedavg``, the rest of a combination being
    equal, or a combination's whole name. By default the first variant, or the first key's first value."""
    tune: Tuning | None = None
    """What each variant chooses for itself before it is compared."""
    target: float | str | None = None
    """Cost-to-Target: the headline metric to reach, as ``0.65`` or ``65 %``."""
    budget: int | str | None = None
    """Quality-under-Budget: the wire bytes that may be sent, as ``5MB``."""

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """The seeds, each once."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(dict.fromkeys(self.seeds))


def parse_study(tree: Mapping[str, Any], source: str) -> StudyFile:
    """Return a study that was read.

    Raises:
        UserError: A key or a value is none of a study's.
    """
    try:
        study = StudyFile.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, StudyFile, source=source)) from error
    lengths = {key: len(values) for key, values in study.zip.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise UserError(f"{source}: zip: give as many values for each key ({told}), or use grid")
    return study


def read_study(path: Path) -> StudyFile | None:
    """Return the study in a file; None where the file is a run's configuration.

    Raises:
        UserError: The file cannot be read, or a key or a value is none of a study's.
    """
    tree = parse_yaml(read_text(path, MOST_YAML_BYTES), path) or {}
    own = StudyFile.model_fields.keys()
    if not isinstance(tree, dict) or not own & tree.keys():
        return None
    if "config" not in tree:
        raise UserError(f"{path} is a study ({', '.join(own & tree.keys())}) without config: name one there")
    return parse_study(tree, str(path))


def key_and_values(text: str, option: str) -> tuple[str, list[Any]]:
    """Return what ``KEY=[a, b]`` says.

    Args:
        text: As above; the values are YAML.
        option: Where it was given, for errors.

    Raises:
        UserError: It has another form.
    """
    key, equals, values = text.partition("=")
    found = parse_yaml(values, f"the values of {option} {text}") if equals else None
    if not key.strip() or not isinstance(found, list) or not found:
        raise UserError(f"{option} {text!r} is not of the form KEY=[VALUE, VALUE], such as lora.r=[4,8]")
    return key.strip(), found

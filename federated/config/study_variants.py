"""The variants of a study: every combination of what varies, what it is called, what it is compared with."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from federated.config.config_files import dotted
from federated.config.study_file import StudyFile
from models.errors import UserError
from models.files import json_text

_MAX_FOLDER_NAME = 100


@dataclass(frozen=True)
class Variant:
    """One combination of a study.

    Attributes:
        name: What tables call it.
        folder_name: What its runs' folders begin with.
        settings: Dotted key -> value, beside the study's configuration.
        baseline: Name of the variant that it is compared with; its own name where it is the baseline.
    """

    name: str
    folder_name: str
    settings: Mapping[str, Any]
    baseline: str


def variants_of(file: StudyFile, study: str) -> Iterator[Variant]:
    """Yield the combinations of a study's axes: its variants, the rows of its zip, each key of its grid."""
    axes = list(_axes(file))
    found: dict[str, dict[str, Any]] = {}
    for cell in itertools.product(*axes):
        name = ", ".join(label for label, _ in cell) or study
        if name in found:
            raise UserError(f"{study}: two combinations are called {name}: give each value once")
        found[name] = {key: value for _, settings in cell for key, value in settings.items()}
    labels = [[label for label, _ in axis] for axis in axes]
    folders = _folder_names(list(found))
    for name, place in zip(found, itertools.product(*labels), strict=True):
        yield Variant(name, folders[name], found[name], _baseline(file.baseline, place, labels, found))


def _axes(file: StudyFile) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the axes of a study: (label, dotted settings) of each of their values."""
    words = _short_keys([*file.zip, *file.grid])
    if file.variants:
        yield [(label, dict(dotted(own))) for label, own in file.variants.items()]
    if file.zip:
        rows = zip(*([(key, value) for value in values] for key, values in file.zip.items()), strict=True)
        yield [
            (", ".join(_label(words[key], value) for key, value in row), dict(dotted(dict(row))))
            for row in rows
        ]
    for key, values in file.grid.items():
        yield [(_label(words[key], value), dict(dotted({key: value}))) for value in values]


def _label(word: str, value: Any) -> str:
    shown = str(value) if isinstance(value, str | int | float) else json_text(value).replace('"', "")
    return f"{word}={shown}" if word else shown


def _baseline(
    asked: str | None, cell: Sequence[str], axes: Sequence[Sequence[str]], names: Mapping[str, Any]
) -> str:
    """Return the name of the variant that a combination is compared with.

    Args:
        asked: Label of a value on one axis, which leaves the other axes as they are, or a combination's name;
            None: the first value of the first axis.
        cell: The combination's label on each axis.
        axes: All labels of each axis.
        names: The names of all combinations.

    Raises:
        UserError: There is no such value and no such combination.
    """
    if asked is None and axes:
        asked = axes[0][0]
    for place, labels in enumerate(axes):
        if asked is not None and asked in labels:
            return ", ".join((*cell[:place], asked, *cell[place + 1 :]))
    if asked is None or asked in names:
        return asked or next(iter(names))
    raise UserError(f"baseline: there is no variant {asked!r}; there are {'; '.join(names)}")


def _folder_names(names: Sequence[str]) -> dict[str, str]:
    """Return a folder name for each variant, none twice."""
    plain = {name: as_folder_name(name) for name in names}
    taken = list(plain.values())
    return {
        name: folder
        if taken.count(folder) == 1 and len(folder) < _MAX_FOLDER_NAME
        else f"{folder[:_MAX_FOLDER_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        for name, folder in plain.items()
    }


def as_folder_name(text: str) -> str:
    """Return a text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.=+]+", "-", text).strip("-.") or "variant"


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return dotted key -> what names it in a variant's name: its last part where no other key has that.

    ``aggregation.name`` and other names are "": their value says it all.
    """
    leaves = [key.rpartition(".")[2] for key in keys]
    return {
        key: "" if leaf == "name" else leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }

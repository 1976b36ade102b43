"""docs/configuration.md from the code: the schema's keys, and what registries hold for each choice by name.

`make docs` writes the page by running this file; a test holds that it is up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from federated.communication.codec import valid_codec_names
from federated.config.augmentation_options import Augmentation
from federated.config.config_files import shipped_descriptions
from federated.config.schema import ExperimentConfig
from federated.data.partitioners import PARTITIONERS
from federated.data.sources.source_registry import SOURCES
from federated.methods import AGGREGATORS
from federated.methods.server_optimizers import SERVER_OPTIMIZERS
from federated.rounds.client_devices import DISTRIBUTIONS
from models.finetuning import STRATEGIES
from models.tasks import TASKS

PAGE = Path(__file__).parents[1] / "configuration.md"

WORDS: dict[object, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Any: "any value",
}
BOUNDS: dict[type, str] = {
    annotated_types.Ge: "≥ {0.ge}",
    annotated_types.Gt: "> {0.gt}",
    annotated_types.Le: "≤ {0.le}",
    annotated_types.Lt: "< {0.lt}",
    annotated_types.MinLen: "(at least {0.min_length})",
}


@dataclass(frozen=True)
class Row:
    """One key: a line of a table.

    Attributes:
        key: Dotted, as on the command line.
        type_words: What may be written, bounds included.
        default: As YAML; "required" where there is none.
        meaning: From the docstrings; empty where nobody wrote one.
    """

    key: str
    type_words: str
    default: str
    meaning: str


# ---- the schema


def rows_of(model: type[BaseModel], prefix: str = "") -> Iterator[Row]:
    """Yield the keys of a section; those of a section inside it follow with their dotted names."""
    meanings = meanings_of(model)
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None or not isinstance(field.get_default(call_default_factory=True), inner):
            default = written(field.get_default(call_default_factory=True))
            yield Row(f"{prefix}{name}", type_of_field(field), default, meanings.get(name, ""))
        if inner is not None:
            yield from rows_of(inner, f"{prefix}{name}.")


def section_in(annotation: object) -> type[BaseModel] | None:
    """Return the section that a key holds, or may hold beside null."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def type_of_field(field: FieldInfo) -> str:
    """Return a key's type and bounds in words."""
    return in_words(field.annotation, bounds_in(field.metadata))


def bounds_in(metadata: Iterable[object]) -> list[str]:
    """Return bounds in words."""
    return [BOUNDS[type(bound)].format(bound) for bound in metadata if type(bound) in BOUNDS]


def in_words(annotation: object, bounds: Sequence[str] = ()) -> str:
    """Return a type in words that a writer of YAML understands; bounds are of a value that is not null."""
    parts = typing.get_args(annotation) if is_union(annotation) else (annotation,)
    words = " or ".join(dict.fromkeys(type_words(part) for part in parts if part is not type(None)))
    if bounds:
        words = f"{words} {', '.join(bounds)}"
    return f"{words}, or null" if type(None) in parts else words


def is_union(annotation: object) -> bool:
    """Whether a value of several types is allowed."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def type_words(annotation: object) -> str:
    """Return one type, which is no union, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is typing.Annotated:
        notes = [note for item in arguments[1:] for note in getattr(item, "metadata", [item])]
        return in_words(arguments[0], bounds_in(notes))
    if origin is tuple and Ellipsis not in arguments:
        return f"list of {len(arguments)} {plural(type_words(arguments[0]))}"
    if section_in(annotation) is not None or isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if origin is None:
        return WORDS[annotation]
    return f"list of {plural(type_words(arguments[0]))}"


def plural(words: str) -> str:
    """Return a type's words for several values."""
    return re.sub(r"^(integer|number|text|mapping)", r"\1s", words)


def written(value: object) -> str:
    """Return a default as it would stand in a YAML file."""
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"


# ---- meanings


@functools.cache
def meanings_of(cls: type) -> dict[str, str]:
    """Return what each attribute of a class means: the docstring below it, or the class's "Attributes:"."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    below = {}
    for attribute, docstring in zip(node.body, node.body[1:], strict=False):
        match attribute, docstring:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                below[name] = in_one_line(text)
    return {**listed_in(cls, "Attributes"), **below}


def listed_in(documented: object, heading: str) -> dict[str, str]:
    """Return name -> meaning of a Google style section of a docstring."""
    _, _, rest = (inspect.getdoc(documented) or "").partition(f"\n{heading}:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    items = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: in_one_line(text[0].upper() + text[1:]) for name, text in items}


def in_one_line(text: str) -> str:
    """Return a sentence without line breaks and indentation."""
    return " ".join(text.split())


def first_paragraph(documented: object) -> str:
    """Return what comes first in a docstring."""
    return in_one_line((inspect.getdoc(documented) or "").partition("\n\n")[0])


# ---- choices by name


def options_of(function: Callable[..., object]) -> Iterator[Row]:
    """Yield the options of what a registry holds; only keyword arguments are options."""
    meanings, hints = listed_in(function, "Args"), typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            default = "required" if required else written(parameter.default)
            yield Row(name, in_words(hints[name]), default, meanings.get(name, ""))


def augmentation_options() -> Iterator[Row]:
    """Yield the options of ``client.augmentation``."""
    meanings, hints = meanings_of(Augmentation), typing.get_type_hints(Augmentation)
    for field in dataclasses.fields(Augmentation):
        yield Row(field.name, in_words(hints[field.name]), written(field.default), meanings[field.name])


REGISTRIES: dict[str, tuple[str, Mapping[str, Callable[..., object]]]] = {
    "Data sources": (
        "`data.source` names one; its options stand in `data.options`, `path` in `data.path`.",
        SOURCES,
    ),
    "Partitioners": ("`partition.name` names one; its options stand in `partition.options`.", PARTITIONERS),
    "Aggregators": (
        "`aggregation.name` names one; its options stand in `aggregation.options`. A `seed` is "
        "the run's unless given. Equations and byte counts: [methods](aggregation.md).",
        AGGREGATORS,
    ),
    "Server optimizers": (
        "`aggregation.server_optimizer` holds a `name` and its options, as in `{name: fedadam, eta: 0.001}`.",
        SERVER_OPTIMIZERS,
    ),
    "Distributions": (
        "A quantity of `clock` is one number for all clients, or each draws its own: "
        "`{name: lognormal, median: 10, sigma: 0.8}`.",
        DISTRIBUTIONS,
    ),
}  # fmt: skip
"""Heading -> how it is chosen, and name -> function."""


# ---- the page


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, shipped_part(), *section_parts(), "## Choices by name", CHOICES, *registry_parts()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


INTRODUCTION = """
# Configuration

*`make docs` writes this page from `federated/config/schema.py` and the registries: edit those, not the page.*

A configuration is one YAML file. It holds only what differs from the defaults below.
`fedlora show-config NAME` prints a configuration with all its defaults. Overrides follow the configuration on
the command line: `fedlora run quickstart federation.rounds=3 lora.r=4`. Their keys are the dotted keys of
these tables, their values are YAML. In a shell, quote a value that has brackets or blanks:
`'client.ranks=[2,4,8]'`. An unknown key is an error that names the nearest one.
"""

CHOICES = """
Options of a file stay when an override changes the name beside them;
`partition.name=iid partition.options={}` drops those of the file.
"""


def shipped_part() -> str:
    """Return the table of the shipped configurations."""
    lines = ["## Shipped configurations", "", "| name | what it is |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {text} |" for name, text in shipped_descriptions().items()])


def section_parts() -> Iterator[str]:
    """Yield a heading, a sentence and a table for each section of the schema."""
    top = [row for row in rows_of(ExperimentConfig) if "." not in row.key]
    yield f"## Top level\n\n{table(top)}"
    for name, field in ExperimentConfig.model_fields.items():
        section = section_in(field.annotation)
        if section is not None:
            yield f"## {name}\n\n{first_paragraph(section)}\n\n{table(rows_of(section, f'{name}.'))}"


def registry_parts() -> Iterator[str]:
    """Yield a part for each kind of thing that a configuration chooses by name."""
    tasks = {name: f"judged by `{task.headline_metric}`" for name, task in TASKS.items()}
    yield f"### Tasks\n\n`task.name` names one.\n\n{named(tasks)}"
    tuned = {name: choice.summary for name, choice in STRATEGIES.items() if name != "lora"}
    yield f"### Fine-tuning\n\n`model.fine_tuning` names one where `model.type` is `clip`.\n\n{named(tuned)}"
    for heading, (how, registry) in REGISTRIES.items():
        yield f"### {heading}\n\n{how}"
        for name, function in registry.items():
            options = list(options_of(function))
            yield f"**`{name}`**: {first_paragraph(function)}" + (f"\n\n{table(options)}" if options else "")
    yield (
        "### Codecs\n\n`communication.uplink` and `communication.downlink` name one each: "
        f"{valid_codec_names()}. Byte counts and what each loses: [codecs](codecs.md)."
    )
    yield f"### Augmentation\n\nOptions of `client.augmentation`.\n\n{table(augmentation_options())}"


def named(meanings: Mapping[str, str]) -> str:
    """Return a table of names and what they are."""
    lines = ["| name | what it is |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {meaning} |" for name, meaning in meanings.items()])


def table(rows: Iterable[Row]) -> str:
    """Return keys as a table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.key}`", row.type_words, row.default, row.meaning.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

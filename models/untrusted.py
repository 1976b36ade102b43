"""The door for bytes that somebody else wrote: configurations, checkpoints, adapters, run files, messages.

Every reader of the packages comes through here. What is allocated is bounded by the bytes that are there,
never by a number that they claim; text is UTF-8; nesting is bounded; and whatever a parser says of malformed
input becomes a ``UserError`` that names the source and, where there is one, the field.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import re
import reprlib
import stat
import struct
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from safetensors import SafetensorError, safe_open

from models.errors import CONTROL, UserError, shortened

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MOST_TEXT_BYTES = 500_000_000
"""Largest text file that is read; a partition of ten million rows has about 100 MB."""
MOST_YAML_BYTES = 1_000_000
"""Largest YAML text: its parser is slow, and the ranks of 100,000 clients have about 0.7 MB."""
MOST_NAME_BYTES = 255
"""Longest name of a file, a class or a run: what file systems allow."""

_MOST_EXPANDED = 2 * MOST_YAML_BYTES  # characters and nodes of a YAML tree with its aliases written out
_DEEPEST_YAML = 50
_MOST_OPEN = 200  # brackets, those in texts and comments included
_MOST_BITS = 64
_NUM_FAULTS_SHOWN = 3

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_MALFORMED: tuple[type[Exception], ...] = (
    ValueError,  # and what is not Unicode
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # and recursion that is too deep
    MemoryError,
    EOFError,
    OSError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    yaml.YAMLError,
    SafetensorError,
)
"""What the parsers of numpy, PyYAML, safetensors and torch raise over malformed input."""


@contextlib.contextmanager
def parsing(source: object, is_not: str, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what a library's parser raises over malformed input into a UserError.

    Args:
        source: The file or message.
        is_not: What it turned out to be, such as "is no YAML".
        remedy: What to do about it.
        also: Exceptions of this parser that are not Python's own.

    Raises:
        UserError: The block raised.
    """
    try:
        yield
    except UserError:
        raise
    except (*_MALFORMED, *also) as error:
        raise UserError(f"{source} {is_not} ({shortened(error)}); {remedy}") from error


# ---- names


def checked_name(name: str, what: str = "name") -> str:
    """Return a name that can be shown, stored and be part of a path.

    Raises:
        UserError: It holds a control character or a byte that is not UTF-8, or is too long.
    """
    length = len(name.encode(errors="surrogatepass"))
    if found := CONTROL.search(name) or re.search(r"[\n\r\t]", name):
        kind = "a byte that is not UTF-8" if found[0] >= "\ud800" else "a control character"
        raise UserError(f"{what} {shortened(ascii(name))} holds {kind}: rename it")
    if length > MOST_NAME_BYTES:
        raise UserError(
            f"{what} {shortened(name)!r} has {length} bytes, and at most {MOST_NAME_BYTES} are possible: "
            "shorten it"
        )
    return name


def checked_path(path: str) -> str:
    """Return a path all of whose parts are names.

    Raises:
        UserError: One is not, see ``checked_name``.
    """
    for part in path.split("/"):
        checked_name(part, "the path's part")
    return path


PathText = Annotated[str, AfterValidator(checked_path)]
"""A path in a configuration, or a name that stands for one: its parts can be names of files."""


# ---- text, JSON, YAML


def read_bytes(path: str | Path, most: int = MOST_TEXT_BYTES) -> bytes:
    """Return a file's bytes.

    Raises:
        UserError: It is missing, no regular file, cannot be read or has more than ``most`` bytes.
    """
    with parsing(path, "cannot be read", "give another file"), open(path, "rb", opener=_opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no regular file; give one")
        if status.st_size > most:
            raise UserError(f"{path} has {status.st_size} bytes, and at most {most} are read here")
        return file.read()


def read_text(path: str | Path, most: int = MOST_TEXT_BYTES) -> str:
    """Return a file's text.

    Raises:
        UserError: As ``read_bytes``, or it is not UTF-8.
    """
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def read_json(path: str | Path, kind: TypeAdapter[Any] = _ANYTHING) -> Any:
    """Return a JSON file's value; as ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(path), path, kind)


def parse_json(data: bytes, source: object, kind: TypeAdapter[Any] = _ANYTHING) -> Any:
    """Return what a JSON text says, if it is of a kind.

    Args:
        data: The text in UTF-8; its nesting is bounded by the parser.
        source: Where it came from, for errors.
        kind: What it must be; nothing is converted.

    Raises:
        UserError: It is no JSON, or a field is of another kind; the message names the fields.
    """
    try:
        return kind.validate_json(data, strict=True)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] == "json_invalid":
            what = shortened(error.errors(include_url=False)[0]["msg"].removeprefix("Invalid JSON: "))
            raise UserError(f"{source} is not valid JSON: {what}") from error
        raise UserError(f"{source}: {_faults(error)}") from error


def check(kind: TypeAdapter[T], value: object, source: object) -> T:
    """Return a value as the kind that it must be; nothing is converted.

    Raises:
        UserError: A field is of another kind; the message names the fields.
    """
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: {_faults(error)}") from error


def _faults(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    lines = dict.fromkeys(_fault(detail) for detail in details[:_NUM_FAULTS_SHOWN])
    more = len(details) - _NUM_FAULTS_SHOWN
    return "; ".join(lines) + (f"; and {more} more faults" if more > 0 else "")


def _fault(detail: ErrorDetails) -> str:
    field = shortened(".".join(map(str, detail["loc"]))) if detail["loc"] else "the whole"
    wrong = shortened(detail["msg"].removeprefix("Value error, "))
    return f"{field}: {wrong} (got {shortened(_REPR.repr(detail['input']))})"


def parse_yaml(text: str, source: object) -> Any:
    """Return what a YAML text says: plain values, lists and mappings.

    Aliases are allowed as long as the tree with all of them written out stays small.

    Raises:
        UserError: It is no YAML, too large, too deep, or refers to itself.
    """
    if len(text) > MOST_YAML_BYTES:
        raise UserError(f"{source} has {len(text)} characters of YAML, at most {MOST_YAML_BYTES} are read")
    depths = itertools.accumulate(1 if found[0] in "[{" else -1 for found in re.finditer(r"[][{}]", text))
    if max(depths, default=0) > _MOST_OPEN:  # thousands in one line would take the parser seconds
        raise UserError(f"{source} is not valid YAML (it is nested too deep); correct it there")
    with parsing(source, "is not valid YAML", "correct it there"):
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _expanded_size(node, {}, _DEEPEST_YAML)
            return _plain(loader.construct_document(node))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
            raise ValueError(f"{error.problem or error.context}{where}") from error
        finally:
            loader.dispose()


def _plain(value: Any, key: str = "") -> Any:
    """Return a YAML value if all in it is plain: a text, a finite number, a truth value or null."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{key or 'the top'}: the key {shortened(repr(name))} is no text")
            _plain(inner, f"{key}.{checked_name(name, 'the key')}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _plain(inner, key)
    elif isinstance(value, str):
        if CONTROL.search(value):
            raise ValueError(f"{key or 'it'}: {shortened(ascii(value))} holds a character that is no text")
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{key or 'it'}: a number of {value.bit_length()} bits is too large")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key or 'it'}: {value} is no finite number")
    elif value is not None and not isinstance(value, int | float):
        raise ValueError(f"{key or 'it'}: a {type(value).__name__} is not possible here; put it in quotes")
    return value


def _expanded_size(node: yaml.Node, known: dict[int, tuple[int, int]], deepest: int) -> tuple[int, int]:
    """Return the size and depth of a tree of nodes with its aliases written out, or raise ValueError."""
    if id(node) in known:
        size, depth = known[id(node)]
    elif isinstance(node, yaml.ScalarNode):
        size, depth = 1 + len(node.value), 0
    else:
        if deepest < 0:
            raise ValueError(f"it is nested more than {_DEEPEST_YAML} levels deep, or inside itself")
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        sizes = [_expanded_size(child, known, deepest - 1) for child in children]
        size = 1 + sum(part for part, _ in sizes)
        depth = 1 + max((below for _, below in sizes), default=0)
    if size > _MOST_EXPANDED:
        raise ValueError(f"with its aliases written out it has more than {_MOST_EXPANDED} characters")
    if depth > deepest + 1:
        raise ValueError(f"it is nested more than {_DEEPEST_YAML} levels deep")
    known[id(node)] = size, depth
    return size, depth


# ---- tensors


def read_tensors(
    path: str | Path, *, only_metadata: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, by name in sorted order, and its metadata.

    Args:
        path: The file.
        only_metadata: Read no tensor.

    Raises:
        UserError: It is missing or damaged, or a tensor claims a shape that does not fit the file.
    """
    remedy = "save or copy it again"
    with parsing(path, "is damaged or no safetensors file", remedy):
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing or no file; {remedy}")
        length = os.path.getsize(path)
        with safe_open(path, framework="pt") as handle:
            names = [] if only_metadata else sorted(handle.keys())
            for name in names:  # an empty tensor of a million rows has no bytes, but its product has
                shape = handle.get_slice(name).get_shape()
                if math.prod(max(size, 1) for size in shape) > length:
                    raise UserError(f"{path}: {shortened(name)} claims shape {shape}; {remedy}")
            return {name: handle.get_tensor(name) for name in names}, dict(handle.metadata() or {})


def read_pt(path: str | Path) -> Any:
    """Return what `torch.save` wrote, tensors mapped and not copied: plain values and tensors, never code.

    Raises:
        UserError: It is missing, damaged, holds an object that a pickle would construct, or claims more bytes
            than it has.
    """
    import torch

    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    remedy = "save tensors and plain values only, with torch.save"
    with parsing(path, "cannot be read safely", remedy, pickle.UnpicklingError, zipfile.BadZipFile):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(part.file_size for part in archive.infolist())
        if claimed > os.path.getsize(path):  # what torch unpacks is in memory then
            raise UserError(
                f"{path} claims to hold {claimed} bytes, more than it has; save it with torch.save"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer does not wait

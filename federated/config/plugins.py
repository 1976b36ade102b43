"""Plugins: files and installed packages that add aggregators, codecs, data sources, model families … by name.

A plugin is run once a process, as an import is. A run folder names the plugins that its configuration needs,
so that whoever opens the run later loads them again; code inside a run folder is never run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from federated.config.choices import options_of
from models.errors import UserError, shortened
from models.registration import added, additions_by, remove
from models.untrusted import MOST_YAML_BYTES, read_bytes, read_json

if TYPE_CHECKING:
    from federated.config.schema import ExperimentConfig

log = logging.getLogger(__name__)

GROUP = "fedlora.plugins"
"""Group of the entry points of installed packages."""

PLUGINS_FILE = "plugins.json"
"""File of a run folder that names its plugins."""


class Recorded(BaseModel):
    """What a run folder keeps of a plugin: a file with its hash, or an entry point with a version."""

    model_config = ConfigDict(frozen=True)

    path: str | None = None
    sha256: str | None = None
    entry_point: str | None = None
    distribution: str | None = None
    version: str | None = None
    registers: dict[str, list[str]]
    """Kind -> names."""

    def __str__(self) -> str:
        """Name it as messages do."""
        if self.path is not None:
            return f"plugin {self.path}"
        return f"plugin {self.entry_point!r} of {self.distribution} {self.version}"

    @property
    def version_key(self) -> tuple[str | None, ...]:
        """What is equal for the same version of a plugin, wherever it lies."""
        return self.sha256, self.distribution, self.version

    @property
    def names(self) -> list[tuple[str, str]]:
        """What it registers, as (kind, name)."""
        return [(kind, name) for kind, names in self.registers.items() for name in names]


_RECORDS = TypeAdapter(list[Recorded])
_loaded: dict[str, Recorded] = {}
"""Path, or name of the entry point -> the plugin, in this process."""


def load_plugins(files: Iterable[str | Path] = ()) -> None:
    """Load the plugins of installed packages and the given files; those that are loaded already are left.

    A file that has changed since it was loaded takes the place of what it was.

    Args:
        files: Python files that register something.

    Raises:
        UserError: A plugin cannot be imported, registers nothing, or takes a name that is there already.
    """
    for entry in installed():
        if entry.name not in _loaded:
            _load_entry_point(entry)
    for file in files:
        _load_file(Path(file))


@functools.cache
def installed() -> tuple[importlib.metadata.EntryPoint, ...]:
    """Return the plugins of installed packages; they are looked up once a process."""
    return tuple(importlib.metadata.entry_points(group=GROUP))


def load_recorded(run: Path) -> None:
    """Load the plugins that a run folder names again.

    A plugin is left out where all that it registers is there already, such as from a file that a user gave.

    Raises:
        UserError: A file has changed or is gone, or a package is not installed; says what to pass.
    """
    path = run / PLUGINS_FILE
    if not path.is_file():
        return
    load_plugins()
    for plugin in read_json(path, _RECORDS):
        if not set(plugin.names) <= added().keys():
            _load_again(plugin, run)
        elif plugin.version_key not in {loaded.version_key for loaded in _loaded.values()}:
            log.warning("%s was made with %s, and is opened with another version of it", run, plugin)


def used_plugins(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Return what a run folder keeps of the plugins that a configuration names something of."""
    chosen = set(_chosen(config))
    return [
        plugin.model_dump(exclude_none=True)
        for plugin in _loaded.values()
        if chosen.intersection(plugin.names)
    ]


def _chosen(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Yield what a configuration chooses by name, as (kind, name)."""
    yield "model family", config.model.family
    yield "task", config.task.name
    yield "data source", config.data.source
    yield "partitioner", config.partition.name
    yield "aggregator", config.aggregation.name
    yield "server optimizer", str((config.aggregation.server_optimizer or {}).get("name"))
    for codec in (config.communication.uplink, config.communication.downlink):
        for part in re.split("[+:]", codec):
            yield from (("coding", part), ("selection", part))


@contextmanager
def plugins_at_fault() -> Iterator[None]:
    """Name the plugin, its line and the error where code of a plugin file raised inside the block.

    Raises:
        UserError: It did.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
        for path in frames & _loaded.keys():
            raise UserError(f"plugin {path} failed{_in_words(error, path)}; correct it there") from error
        raise


def _in_words(error: BaseException, file: str | None) -> str:
    """Return an error's line in a file, if it passed there, its kind and its message."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = "" if line is None else f" (line {line})"
    return f"{where}, {type(error).__name__}: {shortened(error)}"


# ---- files


def _load_file(path: Path) -> None:
    data = read_bytes(path, MOST_YAML_BYTES)
    path = Path(os.path.realpath(path))
    if (run := _run_around(path)) is not None:
        raise UserError(f"plugin {path} lies in the run folder {run}, whose code is never run: move it out")
    digest, before = hashlib.sha256(data).hexdigest(), _loaded.get(str(path))
    if before is not None and before.sha256 == digest and set(before.names) <= added().keys():
        return
    if before is not None:
        remove(_loaded.pop(str(path)).names)
    module = ModuleType(f"fedlora_plugin_{path.stem}")
    module.__file__ = str(path)
    with additions_by(str(path)) as names, _importing(f"plugin {path}", str(path), "correct it there"):
        sys.modules[module.__name__] = module  # where dataclasses look their annotations up
        exec(compile(data, str(path), "exec", dont_inherit=True), module.__dict__)
        _read_options()
    _remember(str(path), names, path=str(path), sha256=digest)


def _run_around(path: Path) -> Path | None:
    marks = ("config.yaml", "metrics.jsonl")
    return next((at for at in path.parents if all((at / mark).is_file() for mark in marks)), None)


def _load_again(plugin: Recorded, run: Path) -> None:
    registers = ", ".join(f"{kind} {name!r}" for kind, name in plugin.names)
    remedy = f"pass --plugin FILE.py with one that registers {shortened(registers)}"
    if plugin.path is None:
        raise UserError(f"{run} was made with {plugin}, which is not installed here: install it, or {remedy}")
    if Path(os.path.realpath(plugin.path)).is_relative_to(os.path.realpath(run)):
        raise UserError(f"{plugin} lies in the run folder {run}, whose code is never run: {remedy}")
    if not os.path.isfile(plugin.path):
        raise UserError(f"{run} was made with {plugin}, which is not there any more: {remedy}")
    if hashlib.sha256(read_bytes(plugin.path, MOST_YAML_BYTES)).hexdigest() != plugin.sha256:
        raise UserError(f"{run} was made with {plugin}, which has changed since: {remedy}")
    _load_file(Path(plugin.path))


# ---- installed packages


def _load_entry_point(entry: importlib.metadata.EntryPoint) -> None:
    distribution = "" if entry.dist is None else entry.dist.name
    version = "" if entry.dist is None else entry.dist.version
    what = f"plugin {entry.name!r} of {distribution} {version}"
    with (
        additions_by(f"{distribution} {version}") as names,
        _importing(what, None, f"correct it, or: pip uninstall {distribution}"),
    ):
        found = entry.load()
        if callable(found):
            found()
        _read_options()
    _remember(entry.name, names, entry_point=entry.name, distribution=distribution, version=version)


def _remember(key: str, names: Sequence[tuple[str, str]], **about: str) -> None:
    registers: dict[str, list[str]] = {}
    for kind, name in names:
        registers.setdefault(kind, []).append(name)
    _loaded[key] = Recorded(registers=registers, **about)


def _read_options() -> None:
    """Make the models of the options of what was added, so that a wrong annotation comes up now."""
    for thing in added().values():
        function = getattr(thing, "build", thing)  # a model family holds the function
        if callable(function):
            options_of(function)


@contextmanager
def _importing(what: str, file: str | None, remedy: str) -> Iterator[None]:
    """Turn whatever somebody else's module raises into one message.

    Args:
        what: The plugin.
        file: Its file, whose line at fault is named.
        remedy: Ends the message.
    """
    before = set(added())
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:  # it is not our code: anything may come out of it
        raise UserError(f"{what} cannot be imported{_in_words(error, file)}; {remedy}") from error
    if set(added()) == before:
        raise UserError(f"{what} registers nothing: use register_aggregator or another decorator of fedlora")

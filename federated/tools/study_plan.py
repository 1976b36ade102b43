"""From a study's file to its runs: every combination and its configuration, checked before any run starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.config.choices import checked_options
from federated.config.config_files import config_folder, dotted, load_config, parse_config, set_value
from federated.config.schema import ExperimentConfig
from federated.config.study_file import StudyFile, parse_study, read_study
from federated.config.study_variants import Variant, as_folder_name, variants_of
from federated.data.dataset import SOURCE, SOURCES
from federated.data.partition import PARTITIONER, PARTITIONERS
from federated.results.run_outcome import parse_budget, parse_target
from federated.results.run_place import run_path
from federated.rounds.build import load_run_data
from federated.rounds.compatibility import build_aggregator
from models.errors import UserError
from models.files import json_text
from models.shipped_configs import find_config
from models.tasks import TASKS

_NO_RESULT = ("output", "engine.threads", "engine.workers")
"""What may differ between two runs that count as the same one."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        name: Of its folder, below ``runs``.
        variant: Name of the variant.
        seed: Of the run.
        config: Resolved.
        chosen: The value of the study's ``tune.key``; None where nothing is tuned.
    """

    name: str
    variant: str
    seed: int
    config: ExperimentConfig
    chosen: Any = None

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.config.output.root) / str(self.config.output.name)


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        name: Of the study.
        folder: Where everything goes.
        file: What was asked for; its ``config`` holds all sections, so that it needs no other file.
        base: The configuration that variants change.
        variants: In the order of the tables.
    """

    name: str
    folder: Path
    file: StudyFile
    base: ExperimentConfig
    variants: tuple[Variant, ...]

    def planned(self, variant: Variant, seed: int, chosen: Any = None) -> PlannedRun:
        """Return a run of a variant.

        Args:
            variant: One of the study's.
            seed: Of the run.
            chosen: Value of the key that is tuned.

        Raises:
            UserError: The configuration does not hold together; the message names the combination.
        """
        told, name = f"{self.name}, combination {variant.name}", variant.folder_name
        settings = list(variant.settings.items())
        if chosen is not None and self.file.tune is not None:
            key = self.file.tune.key
            settings.append((key, chosen))
            told += f", {key}={chosen}"
            leaf = key.rpartition(".")[2]
            name += "-" + as_folder_name(f"{leaf}={chosen}")
        name += f"-seed{seed}"
        tree = copy.deepcopy(self.base.model_dump(mode="json"))
        place = {"output.root": str(self.folder / "runs"), "output.name": name, "output.report": False}
        for key, value in [*settings, ("seed", seed), *place.items()]:
            set_value(tree, key, copy.deepcopy(value), told_as=told)
        return PlannedRun(name, variant.name, seed, parse_config(tree, source=told), chosen)

    def candidates(self) -> Iterator[PlannedRun]:
        """Yield every run that the study may need, those of all values that are tried included."""
        values = [None] if self.file.tune is None else self.file.tune.values
        for variant, value, seed in itertools.product(self.variants, values, self.file.seed_numbers):
            yield self.planned(variant, seed, value)


def plan_study(source: str, overrides: Sequence[str] = (), **given: Any) -> Study:
    """Return a study, all of its combinations checked.

    Args:
        source: A study's file or the name of a shipped one, or a configuration's file or name.
        overrides: ``key=value`` over the configuration of all runs; ``output.name`` names the study's folder.
        **given: Keys of ``StudyFile`` that take the place of the file's; mappings join the file's.

    Raises:
        UserError: Something is unknown or does not go together; each message names its combination.
    """
    shipped = config_folder() / "studies" / f"{source}.yaml"
    path = shipped if shipped.is_file() and not Path(source).is_file() else Path(source)
    found = read_study(path) if path.is_file() else None
    if found is None:
        _check_source(source)
    default_name = (
        f"{path.stem}-study" if found is None else path.parent.name if _is_kept(path) else path.stem
    )
    tree = {"config": source} if found is None else found.model_dump(exclude_unset=True)
    for key, value in given.items():
        tree[key] = tree.get(key, {}) | value if key in ("grid", "zip") else value
    file = parse_study(tree, source)
    if file.target is not None:
        parse_target(file.target, "accuracy")
    if file.budget is not None:
        parse_budget(file.budget)
    base = _base(file, path if found is not None else None, overrides, default_name)
    folder = run_path(base.output.root, str(base.output.name))
    whole = {"config": base.model_dump(mode="json"), "set": {}}
    name = folder.name
    study = Study(name, folder, file.model_copy(update=whole), base, tuple(variants_of(file, name)))
    _check(study)
    return study


def _check_source(source: str) -> None:
    """Name the shipped studies too where a configuration is not there.

    Raises:
        UserError: There is no such file and no such name.
    """
    try:
        find_config(source)
    except UserError as error:
        studies = sorted(path.stem for path in (config_folder() / "studies").glob("*.yaml"))
        raise UserError(f"{error}; shipped studies: {', '.join(studies)}") from error


def fingerprint(config: ExperimentConfig) -> str:
    """Return what two runs share whose results are the same: a hash of all settings but place and threads."""
    tree = config.model_dump(mode="json")
    for key in _NO_RESULT:
        section, _, leaf = key.partition(".")
        if leaf:
            del tree[section][leaf]
        else:
            del tree[section]
    return hashlib.sha256(json_text(tree, sort_keys=True).encode()).hexdigest()


def _is_kept(path: Path) -> bool:
    """Whether a study's file is the one that a study keeps in its folder."""
    return path.name == "study.yaml" and (path.parent / "runs").is_dir()


def _base(
    file: StudyFile, path: Path | None, overrides: Sequence[str], default_name: str
) -> ExperimentConfig:
    """Return the configuration of all runs; a file that it names may lie beside the study's."""
    if isinstance(file.config, str):
        beside = None if path is None else path.parent / file.config
        base = load_config(beside if beside is not None and beside.is_file() else file.config)
        tree = base.model_dump(mode="json")
        tree["output"]["name"] = None
    else:
        tree = copy.deepcopy(file.config)
        if path is None or not _is_kept(path):
            tree.setdefault("output", {})["name"] = None
    source = default_name if path is None else str(path)
    for key, value in dotted(file.set):
        set_value(tree, key, value, told_as=f"{source}: set")
    return parse_config(tree, source=source, overrides=overrides, default_name=default_name)


# ---- checks


def _check(study: Study) -> None:
    """Check all combinations.

    Raises:
        UserError: Names what is wrong with each.
    """
    faults: list[str] = []
    first = study.file.seed_numbers[0]
    values = [None] if study.file.tune is None else study.file.tune.values
    for variant, value in itertools.product(study.variants, values):
        try:
            run = study.planned(variant, first, value)
        except UserError as error:
            faults.append(str(error))
            continue
        try:
            _check_choices(run.config)
            if study.file.tune is not None:
                _check_can_tune(run.config)
        except UserError as error:
            faults.append(f"{study.name}, combination {variant.name}: {error}")
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    runs = [study.planned(variant, first, values[0]) for variant in study.variants]
    metrics = {run.variant: TASKS[run.config.task.name].headline_metric for run in runs}
    if len(set(metrics.values())) > 1:
        told = "; ".join(f"{name}: {metric}" for name, metric in metrics.items())
        raise UserError(f"{study.name}: variants with different headline metrics do not compare ({told})")
    if study.file.tune is not None:
        _check_validation(runs)


def _check_choices(config: ExperimentConfig) -> None:
    """Refuse what a configuration names and is not there, or does not go together."""
    options = dict(config.data.options)
    if config.data.path is not None:
        options["path"] = config.data.path
    checked_options(SOURCES, SOURCE, config.data.source, options)
    checked_options(PARTITIONERS, PARTITIONER, config.partition.name, config.partition.options)
    build_aggregator(config)


def _check_can_tune(config: ExperimentConfig) -> None:
    if not build_aggregator(config).has_global_model:
        raise UserError(
            f"{config.aggregation.name} has no global model to score on the validation split: leave it out, "
            "or leave tune out"
        )


def _check_validation(runs: Sequence[PlannedRun]) -> None:
    """Refuse data without a validation split: test rows choose nothing."""
    seen: set[str] = set()
    for run in runs:
        section = run.config.data.model_dump_json()
        if run.config.data.validation_fraction or section in seen:
            continue
        seen.add(section)
        if load_run_data(run.config).validation is None:
            raise UserError(
                f"tune chooses on the validation split, and data source {run.config.data.source!r} has none: "
                "set data.validation_fraction=0.1, which takes it out of train"
            )

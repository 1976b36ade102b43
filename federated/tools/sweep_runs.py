"""Running a study: tune, run, collect; what is finished stays, what fails is named.

A run counts as finished when its folder has a ``summary.json`` and a configuration with the same results
(``study_plan.fingerprint``). So a study that was killed at any point goes on where it stopped, and ends in
the same tables.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from federated.communication.run_files import read_run_file
from federated.config.config_files import load_config
from federated.engines.simulation import resume_experiment, run_experiment
from federated.results.compare_notes import comparison_notes
from federated.results.records import RunRecord, read_run
from federated.results.run_outcome import Outcome, outcome_of
from federated.results.study_results import StudyResults, VariantRuns
from federated.rounds.checkpoint import read_latest
from federated.tools.evaluation import RESULTS_FILE, evaluate_source
from federated.tools.run_processes import Do, Pool, Watcher
from federated.tools.study_plan import PlannedRun, Study, fingerprint
from models.errors import UserError
from models.files import errors_named, write_text

_NAMED = 5


def do_run(run: PlannedRun) -> None:
    """Do a run: on from its newest commit where it has one of these settings, else from its beginning."""
    if _is_same(run) and _has_commit(run.folder):
        resume_experiment(run.folder)
    else:
        run_experiment(run.config, overwrite=True)


def run_study(
    study: Study, watcher: Watcher, *, jobs: int = 1, overwrite: bool = False, do: Do = do_run
) -> StudyResults:
    """Run what is not finished of a study, and return what came out.

    Args:
        study: What to run.
        watcher: Told what happens.
        jobs: Processes that run at a time, each with its share of the processor's cores.
        overwrite: Replace finished runs of the same name that were made with other settings.
        do: Does one run, in a process of its own.

    Raises:
        UserError: The study runs already, or finished runs of the same name have other settings.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    with _alone(study.folder):
        _check_settled(study, overwrite=overwrite)
        tree = study.file.model_dump(mode="json", exclude_unset=True)
        write_text(study.folder / "study.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        pool = Pool(jobs, study.folder / "logs", watcher)
        chosen, failures = _tune(study, pool, do)
        runs = [
            study.planned(variant, seed, chosen.get(variant.name))
            for variant in study.variants
            if study.file.tune is None or variant.name in chosen
            for seed in study.file.seed_numbers
        ]
        failures |= pool.run_all(runs, "runs", do, is_finished)
        return collect(study, runs, chosen, failures)


def collect(
    study: Study, runs: Sequence[PlannedRun], chosen: Mapping[str, Any], failures: Mapping[str, str]
) -> StudyResults:
    """Return the results of a study's finished runs."""
    outcomes: dict[str, dict[int, Outcome]] = {variant.name: {} for variant in study.variants}
    first: dict[str, RunRecord] = {}
    for run in filter(is_finished, runs):
        record = read_run(run.folder)
        outcomes[run.variant][run.seed] = outcome_of(record)
        if run.seed == study.file.seed_numbers[0]:
            first[run.variant] = record
    return StudyResults(
        name=study.name,
        variants=tuple(
            VariantRuns(variant.name, variant.baseline, outcomes[variant.name], chosen.get(variant.name))
            for variant in study.variants
        ),
        seeds=study.file.seed_numbers,
        tuned_key=None if study.file.tune is None else study.file.tune.key,
        failures=dict(failures),
        notes=tuple(_notes(study, first)),
    )


def _notes(study: Study, first: Mapping[str, RunRecord]) -> list[str]:
    """Return what sets variants apart beside what the study varies, and what kinds of runs they are."""
    varied = tuple(f"{key} differs" for variant in study.variants for key in variant.settings)
    return [
        note for note in comparison_notes(list(first.values()), list(first)) if not note.startswith(varied)
    ]


# ---- what is there already


def is_finished(run: PlannedRun) -> bool:
    """Whether a run came to its end with these settings."""
    return _has_ended(run) and _is_same(run)


def _has_ended(run: PlannedRun) -> bool:
    return (run.folder / "summary.json").is_file()


def _is_same(run: PlannedRun) -> bool:
    path = run.folder / "config.yaml"
    try:
        return _fingerprint_in(path, path.stat().st_mtime_ns) == fingerprint(run.config)
    except (UserError, OSError):  # of another version, damaged, or not there
        return False


@functools.cache  # a file that changed since is read again
def _fingerprint_in(path: Path, changed_ns: int) -> str:
    return fingerprint(load_config(path))


def _has_commit(folder: Path) -> bool:
    try:
        read_latest(folder / "checkpoint")
    except UserError:  # none yet, or none that is whole
        return False
    return True


def _check_settled(study: Study, *, overwrite: bool) -> None:
    """Refuse to replace finished runs that were made with other settings."""
    others = [run.name for run in study.candidates() if _has_ended(run) and not _is_same(run)]
    if others and not overwrite:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise UserError(
            f"{study.folder / 'runs'} holds finished runs with other settings: {', '.join(others[:_NAMED])}"
            f"{more}. Pass --overwrite to replace those, or set output.name=OTHER"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have a study's folder for this process alone inside the block."""
    with errors_named(folder):
        for inner in ("runs", "logs"):
            (folder / inner).mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{folder} is in use by another sweep: wait for its end, or set output.name=OTHER"
        ) from error
    finally:
        os.close(lock)


# ---- tuning


def _tune(study: Study, pool: Pool, do: Do) -> tuple[dict[str, Any], dict[str, str]]:
    """Return variant -> its best value on the validation split, and the runs that failed.

    Test rows have no say. A value one of whose runs failed is not chosen.
    """
    tune = study.file.tune
    if tune is None:
        return {}, {}
    seeds = study.file.seed_numbers[: tune.seeds]
    tried = {
        variant.name: [[study.planned(variant, seed, value) for seed in seeds] for value in tune.values]
        for variant in study.variants
    }

    def run_and_validate(run: PlannedRun) -> None:
        if not is_finished(run):
            do(run)
        evaluate_source(run.folder, split="validation", overwrite=True)

    runs = [run for values in tried.values() for of_value in values for run in of_value]
    failures = pool.run_all(runs, f"tuning {tune.key}", run_and_validate, _is_validated)
    chosen = {}
    for name, values in tried.items():
        scores = [_validation_score(of_value) for of_value in values]
        if max(scores) > -np.inf:
            chosen[name] = tune.values[int(np.argmax(scores))]  # of equal ones the first
            pool.watcher.value_chosen(name, tune.key, chosen[name])
    return chosen, failures


def _validation_file(run: PlannedRun) -> Path:
    return run.folder / "evaluation_validation" / RESULTS_FILE


def _is_validated(run: PlannedRun) -> bool:
    return is_finished(run) and _validation_file(run).is_file()


def _validation_score(runs: Sequence[PlannedRun]) -> float:
    """Return the mean headline metric on the validation split; minus infinity where a run has none."""
    if not all(map(_is_validated, runs)):
        return -np.inf
    scores = [read_run_file(_validation_file(run)).get(read_run(run.folder).metric) for run in runs]
    numbers = [float(score) for score in scores if score is not None]  # None: it diverged
    return float(np.mean(numbers)) if len(numbers) == len(runs) else -np.inf

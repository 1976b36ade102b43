"""Evaluating one trained model: which model, which rows, which files.

A run folder is evaluated with its latest global state, finished or not; a configuration with the adapter that
is given, or untrained. The rows are the configuration's, so the figures agree with what the run wrote down
for the same split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from federated.communication.run_files import Summary, read_run_file
from federated.config.config_files import dotted, load_config
from federated.config.schema import AggregationSection, ExperimentConfig
from federated.engines.simulation import limited_threads
from federated.results.plot_style import save_figure
from federated.results.run_place import check_place
from federated.rounds.batches import evaluation_batches
from federated.rounds.build import load_run_data
from federated.rounds.checkpoint import (
    CHECKPOINT_FILES,
    SERVER_FILE,
    STATE_FILE,
    latest_checkpoint,
    load_server_checkpoint,
)
from federated.rounds.global_model import load_global_state
from federated.rounds.learnable import check_can_score
from federated.rounds.run import Run, build_run
from federated.rounds.trained_record import TrainedRecord, check_rows, matched_classes
from federated.tools.central import one_shard
from federated.tools.detailed_metrics import (
    DetailedMetrics,
    describe_answers,
    describe_classes,
    describe_retrieval,
    describe_task,
    embed_pairs,
    predict_classes,
)
from federated.tools.result_tables import records_to_csv
from federated.tools.trained_models import (
    NAME_AN_ADAPTER,
    check_global_model,
    check_names,
    has_global_model,
    load_adapter_or_checkpoint,
    record_of_adapter,
    record_of_run,
)
from lora.adapter_files import ADAPTER_FILE, read_adapter
from lora.adapters import unwrap
from lora.base_check import check_base_model
from lora.start_adapter import adapter_folder
from models.committed_folders import check_committed, current_folder
from models.errors import UserError
from models.files import BestEffort, errors_named, write_json, write_text
from models.progress import Report, quiet
from models.tasks import CLIP, TASKS
from models.training import Batch, num_examples
from models.untrusted import read_tensors

log = logging.getLogger(__name__)

SPLITS = ("test", "validation")
REPORT_FILE, RESULTS_FILE = "evaluation_report.txt", "evaluation_results.json"
PREDICTIONS_FILE = "predictions.csv"
FREE = (
    *("data.", "evaluation.", "cache.", "engine.", "output.", "task.templates"),
    *("model.device", "model.dtype", "model.num_classes"),
)
HELD = ("data.validation_fraction",)
"""Keys that an evaluation of a run may change, by their beginning, and exceptions."""

AGREEMENT = 2e-3
"""By how much the headline metric may differ from what the run wrote down before somebody is told: other
batch sizes and machines round differently, which moves a few images in ten thousand."""


def evaluate_source(  # noqa: PLR0913 - the command's options; all but two are keyword-only
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    adapter: Path | None = None,
    any_base: bool = False,
    split: str = "test",
    output: Path | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
    report: Report = quiet,
) -> tuple[Path, str]:
    """Evaluate a run, or a configuration with an adapter or without.

    Args:
        source: A run folder, a configuration file or the name of a shipped one.
        overrides: ``key=value`` over the configuration, such as another batch size.
        adapter: Folder of the adapter (or full checkpoint) to evaluate instead of the run's own.
        any_base: Take the trained part although the base model is not known to be its own.
        split: "test" or "validation".
        output: Where files go; ``evaluation_<split>`` inside the run by default, or
            ``<name>-evaluation_<split>`` under ``output.root``.
        overwrite: Replace the files of an earlier evaluation.
        precision: Of the forward passes: "fp32", "bf16" or "fp16" (autocast).
        report: Told about the progress, after each batch.

    Returns:
        The folder and the report.

    Raises:
        UserError: The source, the split or the adapter is missing or does not fit, or files exist.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}")
    run = run_folder(source)
    config = load_config(source if run is None else run / "config.yaml", overrides)
    if run is not None:
        check_held(run, config)
    if run is None and adapter is None and config.model.adapter is not None:
        adapter = adapter_folder(config.model.adapter)
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": None})})
    default = Path(config.output.root) / f"{config.output.name}-evaluation_{split}"
    folder = output or (default if run is None else run / f"evaluation_{split}")
    if run is not None and adapter is None:
        check_global_model(run, config)
    elif not has_global_model(config):  # it would ask for clients that evaluate, and there are none here
        config = config.model_copy(update={"aggregation": AggregationSection()})
    check_outputs(folder, overwrite=overwrite)
    record = record_of(run, adapter)
    with limited_threads(config.engine.threads):
        data = load_run_data(config)
        check_rows(record, config, data, split)
        task = TASKS[config.task.name]
        if task.uses_head or (run is not None and not task.reads_captions):
            data = matched_classes(data, record, needed=task.uses_head)
        experiment = build_run(one_shard(config), data)
        check_can_score(experiment)
        check_split(experiment, split)
        trained = load_trained(experiment, run, adapter, any_base=any_base)
        model = unwrap(experiment.model)
        if hasattr(model, "precision"):
            model.precision = precision
        elif precision != "fp32":
            raise UserError(f"--precision {precision}: model.type={config.model.type} computes in fp32 alone")
        detailed = evaluate_in_detail(experiment, split, report)
    saw_the_same = split == "test" and not overrides and config.evaluation.max_samples is None
    if run is not None and adapter is None and saw_the_same:
        compare_with_record(run, detailed, experiment.headline_metric)
    write_evaluation(folder, detailed, source=str(source), split=split, trained=trained)
    return folder, (folder / REPORT_FILE).read_text(encoding="utf-8")


def run_folder(source: str | Path) -> Path | None:
    """Return the run folder that a source is; None where it is a configuration.

    Raises:
        UserError: It is a folder, but not a run's.
    """
    path = Path(source)
    if len(path.parts) > 1 and not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, or a configuration's file or name")
    if not path.is_dir():
        return None
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder (it has no config.yaml): give a run or a configuration")
    return path


def check_held(run: Path, config: ExperimentConfig) -> None:
    """Make sure that a configuration leaves a run as it was trained: seed, rows, model and method hold.

    Raises:
        UserError: It changes one of them.
    """
    before, now = (
        dict(dotted(tree.model_dump(mode="json"))) for tree in (load_config(run / "config.yaml"), config)
    )
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key in HELD or not key.startswith(FREE))
    ]
    if changed:
        key = changed[0]
        raise UserError(
            f"{run} was trained with {key}={before.get(key)}, and is evaluated as it was trained: {key}="
            f"{now.get(key)} would be another model or other rows, some of them trained on. Leave {key} out"
        )


def record_of(run: Path | None, adapter: Path | None) -> TrainedRecord:
    """Return what is known of the training behind the weights that are evaluated."""
    if adapter is not None:
        return record_of_adapter(adapter)
    if run is None:
        return TrainedRecord(Path())
    record = record_of_run(run)
    check_names(run, load_config(run / "config.yaml"), record.class_names)
    return record


def check_split(experiment: Run, split: str) -> None:
    """Make sure that there are rows to evaluate.

    Raises:
        UserError: There is no validation split.
    """
    if split == "validation" and experiment.data.validation is None:
        raise UserError(
            f"{experiment.data.name} has no validation split and the configuration sets none apart: "
            "evaluate --split test, or train with data.validation_fraction=0.1"
        )


def load_trained(experiment: Run, run: Path | None, adapter: Path | None, *, any_base: bool = False) -> str:
    """Put what was trained into the model; return where it came from.

    Raises:
        UserError: There is nothing to load, or it is damaged.
    """
    if adapter is not None:
        load_adapter_or_checkpoint(experiment.model, adapter, any_base=any_base)
        return str(adapter)
    if run is None:
        return "none (untrained)"
    folder, trained = latest_checkpoint(run), current_folder(run / "adapter")
    check_committed(folder, CHECKPOINT_FILES, remedy=NAME_AN_ADAPTER)
    if (trained / ADAPTER_FILE).is_file() and not any_base:
        check_base_model(experiment.model, read_adapter(trained))
    return load_checkpoint(experiment, folder)


def load_checkpoint(experiment: Run, folder: Path) -> str:
    """Put a run's latest global state into the model; central runs have no server's part.

    Raises:
        UserError: There is none yet, or it is another model's.
    """
    if (folder / SERVER_FILE).is_file():
        load_global_state(experiment, load_server_checkpoint(folder).server)
        return str(folder / SERVER_FILE)
    path = folder / STATE_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing was trained yet; name an adapter with --adapter")
    try:
        state, _ = read_tensors(path)
    except UserError as error:
        raise UserError(f"{folder} is damaged ({error}): {NAME_AN_ADAPTER}") from error
    experiment.model.set_state(state)
    return str(path)


def evaluate_in_detail(experiment: Run, split: str, report: Report = quiet) -> DetailedMetrics:
    """Evaluate the experiment's model, as it is, on the rows of a split."""
    batches, task = reported_batches(experiment, split, report), experiment.model.task
    if task.family == "vqa":
        model = unwrap(experiment.model)
        described = describe_task(model, batches, experiment.data, split)
        return describe_answers(described, experiment.data, split, model.language)
    if task.family != CLIP or task.predict is not None:
        return describe_task(unwrap(experiment.model), batches, experiment.data, split)
    if task.reads_captions:
        found = embed_pairs(experiment.model, batches)
        return describe_retrieval(found, headline_metric=experiment.headline_metric)
    names = experiment.data.class_names
    assert names is not None  # both other tasks need classes, and the model was built from them
    return describe_classes(predict_classes(experiment.model, batches), names)


def reported_batches(experiment: Run, split: str, report: Report) -> Iterator[Batch]:
    """Yield the rows of a split, in order; the report is told after each batch."""
    done, num_rows = 0, len(experiment.data.split(split))
    for batch in evaluation_batches(experiment, split):
        yield batch
        done += num_examples(batch)
        report(done, num_rows)


def compare_with_record(run: Path, detailed: DetailedMetrics, headline_metric: str) -> None:
    """Warn where the headline metric is not the one that a finished run wrote down."""
    path = run / "summary.json"
    if not path.is_file():
        return
    recorded = read_run_file(path, Summary).get("final")
    found = detailed.results.get(headline_metric)  # a task from outside may have another
    if isinstance(recorded, float) and found is not None and abs(found - recorded) > AGREEMENT:
        log.warning(
            "%s recorded %.4f, this evaluation finds %.4f: data, base model or libraries have changed since",
            run, recorded, found,
        )  # fmt: skip


def check_outputs(folder: Path, *, overwrite: bool) -> None:
    """Make sure that an evaluation may be written, before the work starts.

    Raises:
        UserError: One is there already, or the place is taken by a file.
    """
    check_place(folder, "name another folder with --output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --output a folder")
    if not overwrite and any((folder / name).exists() for name in (REPORT_FILE, RESULTS_FILE)):
        raise UserError(f"{folder} holds an evaluation: pass --overwrite to replace it, or --output FOLDER")


def write_evaluation(
    folder: Path, detailed: DetailedMetrics, *, source: str, split: str, trained: str
) -> None:
    """Write the results and the report, then the pictures if possible."""
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    head = f"{source}, split {split}\ntrained weights: {trained}\n\n"
    write_json(
        folder / RESULTS_FILE,
        {"source": source, "split": split, "trained": trained, **detailed.results},
    )
    write_text(folder / REPORT_FILE, head + detailed.report)
    if detailed.predictions:
        rows = [{"row": row, "prediction": text} for row, text in enumerate(detailed.predictions)]
        write_text(folder / PREDICTIONS_FILE, records_to_csv(rows))
    for name, figure in detailed.figures.items():
        with BestEffort(f"drawing {name}"):
            save_figure(figure, folder, name)

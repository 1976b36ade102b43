"""Evaluating one trained model: which model, which rows, which files.

Stands after the rounds, behind ``fedlora evaluate``. A run folder is evaluated with its latest global state,
finished or not; a configuration with the adapter that is given, or untrained. The rows are the
configuration's, so the figures agree with what the run wrote down for the same split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from federated.checkpoint import SERVER_FILE, load_server_checkpoint
from federated.config import AggregationSection, load_config
from federated.data.loading import ImageTensors, image_tensors
from federated.experiment import Experiment, build_experiment
from federated.global_model import load_global_state
from federated.progress import Report, quiet
from federated.reporting.plot_style import save_png
from federated.run_files import Summary, read_run_file
from federated.simulation import limited_threads
from federated.standalone.centralized import one_shard
from federated.standalone.detailed_metrics import (
    DetailedMetrics,
    describe_classes,
    describe_retrieval,
    embed_pairs,
    predict_classes,
)
from federated.standalone.trained_models import check_global_model, has_global_model
from lora.checkpoint import FULL_FILE
from lora.loading import load_full_checkpoint, load_lora_adapters
from models.errors import UserError
from models.files import write_json, write_text
from models.training import Batch
from models.untrusted import read_tensors

log = logging.getLogger(__name__)

SPLITS = ("test", "validation")
REPORT_FILE, RESULTS_FILE = "evaluation_report.txt", "evaluation_results.json"
AGREEMENT = 2e-3
"""By how much the headline metric may differ from what the run wrote down before somebody is told: other
batch sizes and machines round differently, which moves a few images in ten thousand."""


def evaluate_source(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    adapter: Path | None = None,
    split: str = "test",
    output: Path | None = None,
    overwrite: bool = False,
    report: Report = quiet,
) -> tuple[Path, str]:
    """Evaluate a run, or a configuration with an adapter or without.

    Args:
        source: A run folder, a configuration file or the name of a shipped one.
        overrides: ``key=value`` over the configuration, such as another batch size.
        adapter: Folder of the adapter (or full checkpoint) to evaluate instead of the run's own.
        split: "test" or "validation".
        output: Where files go; ``evaluation_<split>`` inside the run by default, or
            ``<name>-evaluation_<split>`` under ``output.root``.
        overwrite: Replace the files of an earlier evaluation.
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
    default = Path(config.output.root) / f"{config.output.name}-evaluation_{split}"
    folder = output or (default if run is None else run / f"evaluation_{split}")
    if run is not None and adapter is None:
        check_global_model(run, config)
    elif not has_global_model(config):  # it would ask for clients that evaluate, and there are none here
        config = config.model_copy(update={"aggregation": AggregationSection()})
    check_outputs(folder, overwrite=overwrite)
    with limited_threads(config.engine.threads):
        experiment = build_experiment(one_shard(config))
        images = split_images(experiment, split)
        trained = load_trained(experiment, run, adapter)
        detailed = evaluate_in_detail(experiment, images, report)
    saw_the_same = split == "test" and not overrides and config.evaluation.max_samples is None
    if run is not None and adapter is None and saw_the_same:
        compare_with_record(run, detailed)
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


def split_images(experiment: Experiment, split: str) -> ImageTensors:
    """Return the rows of a split.

    Raises:
        UserError: There is no validation split.
    """
    if split == "test":
        return experiment.test_images
    if experiment.data.validation is None:
        raise UserError(
            f"{experiment.data.name} has no validation split and the configuration sets none apart: "
            "evaluate --split test, or train with data.validation_fraction=0.1"
        )
    return image_tensors(
        experiment.data, split, experiment.model.preprocess, cache_bytes=experiment.config.data.cache_bytes
    )


def load_trained(experiment: Experiment, run: Path | None, adapter: Path | None) -> str:
    """Put what was trained into the model; return where it came from.

    Raises:
        UserError: There is nothing to load, or it is damaged.
    """
    if adapter is not None:
        load = load_full_checkpoint if (adapter / FULL_FILE).is_file() else load_lora_adapters
        load(experiment.model, adapter)
        return str(adapter)
    if run is None:
        return "none (untrained)"
    return load_checkpoint(experiment, run / "checkpoint")


def load_checkpoint(experiment: Experiment, folder: Path) -> str:
    """Put a run's latest global state into the model; central runs have no server's part.

    Raises:
        UserError: There is none yet, or it is another model's.
    """
    if (folder / SERVER_FILE).is_file():
        load_global_state(experiment, load_server_checkpoint(folder).server)
        return str(folder / SERVER_FILE)
    path = folder / "state.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: nothing was trained yet; name an adapter with --adapter")
    try:
        state, _ = read_tensors(path)
    except UserError as error:
        raise UserError(f"{folder} is damaged ({error}): name an adapter with --adapter") from error
    experiment.model.set_state(state)
    return str(path)


def evaluate_in_detail(
    experiment: Experiment, images: ImageTensors, report: Report = quiet
) -> DetailedMetrics:
    """Evaluate the experiment's model, as it is, on rows."""
    batches = evaluation_batches(experiment, images, report)
    if experiment.model.task.name == "retrieval":
        pairs = embed_pairs(experiment.model, batches)
        return describe_retrieval(*pairs, headline_metric=experiment.headline_metric)
    names = experiment.data.class_names
    assert names is not None  # both other tasks need classes, and the model was built from them
    return describe_classes(predict_classes(experiment.model, batches), names)


def evaluation_batches(experiment: Experiment, images: ImageTensors, report: Report) -> Iterator[Batch]:
    """Yield what the model's task reads of the rows, in order."""
    done = 0
    for batch in images.batches(None, experiment.config.evaluation.batch_size, rng=None):
        yield experiment.model_batch(batch)
        done += len(batch["pixel_values"])
        report(done, len(images))


def compare_with_record(run: Path, detailed: DetailedMetrics) -> None:
    """Warn where the headline metric is not the one that a finished run wrote down."""
    path = run / "summary.json"
    if not path.is_file():
        return
    recorded = read_run_file(path, Summary).get("final")
    found = detailed.results[detailed.results["headline_metric"]]
    if isinstance(recorded, float) and abs(found - recorded) > AGREEMENT:
        log.warning(
            "%s recorded %.4f, this evaluation finds %.4f: data, base model or libraries have changed since",
            run, recorded, found,
        )  # fmt: skip


def check_outputs(folder: Path, *, overwrite: bool) -> None:
    """Make sure that an evaluation may be written, before the work starts.

    Raises:
        UserError: One is there already, or the place is taken by a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give --output a folder")
    if not overwrite and any((folder / name).exists() for name in (REPORT_FILE, RESULTS_FILE)):
        raise UserError(f"{folder} holds an evaluation: pass --overwrite to replace it, or --output FOLDER")


def write_evaluation(
    folder: Path, detailed: DetailedMetrics, *, source: str, split: str, trained: str
) -> None:
    """Write the report, the results and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{source}, split {split}\ntrained weights: {trained}\n\n"
    for name, figure in detailed.figures.items():
        save_png(figure, folder / f"{name}.png")
    write_json(
        folder / RESULTS_FILE,
        {"source": source, "split": split, "trained": trained, **detailed.results},
    )
    write_text(folder / REPORT_FILE, head + detailed.report)

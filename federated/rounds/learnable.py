"""Whether the task of a run can be learnt at all, asked before its folder is made and before any training.

What these checks refuse would run to its end without an error and without a result: a loss that is zero
whatever the model does, classes that nothing can tell apart, a precision that the device does not have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from federated.data.batch_order import steps_per_epoch
from federated.data.image_reader import ImageReader
from federated.data.names import listed
from federated.data.splits import IntArray
from federated.rounds.batches import server_test_rows
from lora.adapters import unwrap
from models.errors import UserError
from models.metrics import CONCEPT, PICTURE, TEXT
from models.tasks import CLIP, RECALL_CUTOFFS

if TYPE_CHECKING:
    from federated.rounds.run import Run

log = logging.getLogger(__name__)

_NUM_SHOWN = 5


def check_can_learn(run: Run) -> None:
    """Refuse a run that could not learn anything, or not on its device.

    Raises:
        UserError: Says what is degenerate, and what to set.
    """
    for check in (*_CHECKS, *run.family.checks):
        check(run)


def check_can_score(run: Run) -> None:
    """Refuse an accuracy over one class, and log which classes the pre-trained model cannot tell apart.

    Raises:
        UserError: The data has one class, so that every model is right.
    """
    names, model = run.data.class_names, unwrap(run.model)
    task = model.task
    if task.reads_captions or (task.family != CLIP and not task.uses_head):  # no classes are told apart
        return
    if names is not None and len(names) == 1:
        raise UserError(
            f"the data has one class, {names[0]!r}, so that nothing is to be told apart: give images of two "
            "classes or more, or task.name=retrieval where they have captions"
        )
    if groups := model.classes_that_read_alike():
        log.warning("%s: they have one embedding, and the pre-trained model can only guess", _read(groups))


def _check_validation(run: Run) -> None:
    patience = run.config.federation.early_stopping.patience
    if patience is not None and run.data.validation is None:
        raise UserError(
            f"federation.early_stopping.patience={patience} needs a validation split, which this data has "
            "not: set data.validation_fraction=0.1, or federation.early_stopping.patience=null"
        )


def _check_precision(run: Run) -> None:
    device = run.model.device.type
    if run.config.client.precision == "fp16" and device != "cuda":
        raise UserError(
            f"client.precision=fp16 needs a CUDA device, and model.device is {device}: set "
            "client.precision=bf16 or fp32"
        )


def _check_shards(run: Run) -> None:
    empty = [k for k in range(run.num_clients) if not run.num_examples(k)]
    if empty:
        raise UserError(f"{_clients(empty)} no training row: set partition.num_clients lower")
    tested = any(len(shard.test) for shard in run.shards)
    if not run.aggregator.has_global_model and not tested:
        raise UserError(
            f"{run.aggregator.name} is evaluated on its clients' own test rows, and no shard is large "
            "enough to have one: set partition.num_clients lower, or use more data"
        )


def _check_reach(run: Run) -> None:
    """Refuse a run in which the loss reaches nothing that trains."""
    model, task = unwrap(run.model), run.model.task
    idle = set() if task.uses_text else {"text"}
    names = {name for name, p in run.model.exchanged_parameters.items() if p.requires_grad}
    if all(model.towers.tower_of(name.removeprefix("clip.")) in idle for name in names):
        raise UserError(
            f"task.name={task.name} does not use the text tower, and nothing else trains: set "
            "lora.target_components=[vision], or task.train_head=true"
        )


def _check_classes(run: Run) -> None:
    """Refuse training rows of one class, and class prompts that nothing can tell apart."""
    data, model = run.data, unwrap(run.model)
    if model.task.reads_captions:
        return
    groups = model.classes_that_read_alike()
    if groups and not any(name.startswith("head.") for name in model.exchanged_names):
        raise UserError(
            f"{_read(groups)}, so that no training can tell them apart: rename or join these classes, change "
            "task.templates, or let a head learn them (task.name=classification with task.train_head=true)"
        )
    check_can_score(run)
    if data.label_column is None:
        return
    found = np.unique(data.labels()[np.concatenate([shard.train for shard in run.shards])])
    if len(found) < 2:
        name = data.class_names[found[0]] if data.class_names else found[0]
        raise UserError(
            f"all training rows have one class, {name!r}, so that there is nothing to tell apart: give "
            "training rows of two classes or more"
        )
    if model.task.uses_head and len(found) < len(data.class_names or ()):
        unseen = [name for number, name in enumerate(data.class_names or ()) if number not in found]
        log.warning("no client has a training row of %s: the head cannot learn it", listed(map(repr, unseen)))


def _check_contrast(run: Run) -> None:
    """Refuse retrieval where a client has nothing to tell a pair from."""
    if not run.model.task.reads_captions:
        return
    everything = _without_pixels(run, "train", None)
    for what, key in (("concept", CONCEPT), ("picture", PICTURE), ("caption", TEXT)):
        if key not in everything:
            continue
        shown = everything[key].numpy()
        if len(np.unique(shown)) < 2:
            raise UserError(
                f"all training rows have the same {what}, so that nothing is to be told apart: give pairs "
                "of different pictures and captions"
            )
        counts = [len(np.unique(shown[shard.train])) for shard in run.shards]
        if alone := [client_id for client_id, count in enumerate(counts) if count < 2]:
            raise UserError(
                f"{_clients(alone)} one {what} in all training rows, and retrieval learns from pairs that "
                "differ: set partition.num_clients lower, or another partition.name"
            )


def _check_pairs(run: Run) -> None:
    """Refuse retrieval in batches of one pair, whose loss is always 0, and in parts of a batch."""
    if not run.model.task.reads_captions:
        return
    client = run.config.client
    for key, size in (("client", client.batch_size), ("evaluation", run.config.evaluation.batch_size)):
        if size < 2:
            raise UserError(
                f"{key}.batch_size=1: retrieval compares the pairs of a batch with each other, and the loss "
                f"of a single pair is always 0; set {key}.batch_size=2 or more"
            )
    num_rows = [len(shard.train) for shard in run.shards]
    num_batches = [steps_per_epoch(rows, client.batch_size) for rows in num_rows]
    single = [k for k, rows in enumerate(num_rows) if rows // num_batches[k] < 2]
    if single:
        raise UserError(
            f"client.batch_size={client.batch_size} leaves a batch of a single pair, whose loss is always 0: "
            f"{_clients(single)} {num_rows[single[0]]} training rows; set client.batch_size=3 or more"
        )
    largest = max(-(-rows // n) for rows, n in zip(num_rows, num_batches, strict=True))
    if client.micro_batch_size is not None and client.micro_batch_size < largest:
        raise UserError(
            f"client.micro_batch_size={client.micro_batch_size}: retrieval compares all pairs of a batch and "
            "cannot be split; set client.micro_batch_size=null, or client.batch_size to at most that"
        )


def _check_gallery(run: Run) -> None:
    """Refuse a gallery of one, and say where a recall is 100 % by construction."""
    if not run.model.task.reads_captions:
        return
    scored = _without_pixels(run, "test", server_test_rows(run))
    sizes = [len(torch.unique(scored[key])) for key in (PICTURE, TEXT) if key in scored]
    size = min([len(scored["index"]), *sizes])
    if size < 2:
        raise UserError(
            "retrieval is tested on a single pair, picture or caption, which is always found: give two test "
            "pairs or more that differ in both, or leave out evaluation.max_samples"
        )
    if certain := [k for k in RECALL_CUTOFFS if k >= size]:
        log.warning("recall at %s among %d test pictures or captions is always 100 %%", certain[0], size)


def _without_pixels(run: Run, split: str, rows: IntArray | None) -> Mapping[str, Any]:
    """Return what a split of captioned images says of some rows beside the images; None: of all rows."""
    images = cast(ImageReader, run.reader).images(split)
    return images.batch(np.arange(len(images)) if rows is None else rows, pixels=False)


def _clients(ids: list[int]) -> str:
    shown = ", ".join(str(client_id) for client_id in ids[:_NUM_SHOWN])
    more = f" and {len(ids) - _NUM_SHOWN} more" if len(ids) > _NUM_SHOWN else ""
    return f"client {shown} has" if len(ids) == 1 else f"clients {shown}{more} have"


def _read(groups: list[tuple[str, ...]]) -> str:
    shown = "; ".join(" and ".join(repr(name) for name in group[:3]) for group in groups[:3])
    return f"the classes {shown} read alike to the tokenizer"


_CHECKS: tuple[Callable[[Run], None], ...] = (_check_validation, _check_precision, _check_shards)
"""What every run is asked."""

CLIP_CHECKS: tuple[Callable[[Run], None], ...] = (
    _check_reach,
    _check_classes,
    _check_contrast,
    _check_pairs,
    _check_gallery,
)
"""What the tasks of a CLIP ask of a run beside that."""

"""Tasks: what a client minimises and what an evaluation reports.

`loss` is called by every local step, `evaluate` by the server (and by clients in rounds with client
evaluation). CLIP has three tasks; other model families bring their own (`register_task`):

- classification: cross-entropy of a linear head on the image features;
- zero_shot: cross-entropy against the embeddings of the class prompts (Radford et al. 2021, 3.1);
- retrieval: the symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3), where pairs of one
  concept, picture or text are positives of each other instead of false negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import UserError
from models.finite import or_not_a_number
from models.metrics import CONCEPT, PICTURE, TEXT, retrieval_set
from models.registration import add
from models.training import Batch, Rows, num_examples
from models.vqa_metrics import EXACT_MATCH
from models.vqa_task import COLUMNS, evaluate_vqa, predict_answers, read_questions, vqa_loss

if TYPE_CHECKING:
    from models.clip import FederatedCLIPModel

RECALL_CUTOFFS = (1, 5, 10)

CLIP = "clip"
"""Name of the model family whose tasks these are."""


@dataclass(frozen=True)
class Task:
    """What is learnt from rows and how it is scored, for the models of one family.

    Attributes:
        name: Key in TASKS.
        loss: Mean loss over the examples of a batch, a scalar tensor.
        evaluate: Metrics over batches as Python floats, with "loss" and "num_examples".
        headline_metric: The metric that a run is judged by (higher is better).
        uses_head: Whether the model carries a head, whose outputs are the classes of the data.
        uses_text: Whether the loss reaches the text tower.
        splits_into_micro_batches: Whether the loss of a batch is the mean of its parts' losses.
        reads_captions: Whether a batch holds the captions of its images, as ``models.features`` reads them;
            otherwise their labels.
        family: The model family whose models it takes.
        reads: Columns of the rows that `batch` is given.
        batch: (model, rows) -> named tensors; None: the family reads the rows in its own way.
        predict: (model, batch) -> what the model says of each row, as text.
    """

    name: str
    loss: Callable[[Any, Batch], Tensor]
    evaluate: Callable[[Any, Iterable[Batch]], dict[str, float]]
    headline_metric: str
    uses_head: bool = False
    uses_text: bool = True
    splits_into_micro_batches: bool = False
    reads_captions: bool = False
    family: str = CLIP
    reads: tuple[str, ...] = ()
    batch: Callable[[Any, Rows], Batch] | None = None
    predict: Callable[[Any, Batch], Sequence[str]] | None = None


def _labels(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise UserError(f"the batch has no labels (keys: {sorted(batch)}): pass labels, or batch['labels']")
    return batch["labels"]


def classification_loss(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Cross-entropy of the head's logits."""
    return F.cross_entropy(model.logits(batch), _labels(batch))


def zero_shot_loss(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Cross-entropy of the image's similarity to each class's prompts."""
    return F.cross_entropy(model.zero_shot_logits(batch), _labels(batch))


def evaluate_logits(logits_of: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> dict[str, float]:
    """Loss and accuracy of class logits (B, C) against "labels"; the accuracy is NaN where one is not finite.

    Raises:
        UserError: There is no batch, or one has no labels.
    """
    loss_sum: Tensor | float = 0.0
    correct: Tensor | int = 0
    finite: Tensor | bool = True
    total = 0
    for batch in batches:
        labels = _labels(batch)
        logits = logits_of(batch).float()  # (B, C)
        loss_sum = loss_sum + F.cross_entropy(logits, labels, reduction="sum").double()
        correct = correct + (logits.argmax(dim=1) == labels).sum()
        finite = logits.isfinite().all() & finite
        total += num_examples(batch)
    if total == 0:
        raise UserError("there is nothing to evaluate: no batch was given")
    loss = float(loss_sum) / total
    accuracy = or_not_a_number(float(correct) / total, loss, finite)
    return {"loss": loss, "accuracy": accuracy, "num_examples": float(total)}


def evaluate_classification(model: FederatedCLIPModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Loss and accuracy of the head; the accuracy is NaN where a logit is not finite."""
    return evaluate_logits(model.logits, batches)


def evaluate_zero_shot(model: FederatedCLIPModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Loss and accuracy against the class prompts; as `evaluate_classification`."""
    return evaluate_logits(model.zero_shot_logits, batches)


def positives(batch: Batch) -> Tensor | None:
    """Which images and texts of a batch belong together, (B, B) bool, images by texts; None: each pair alone.

    Row i's image and row j's text do where the rows show the same concept, are of one picture (a caption of
    which j has), or have the same text.
    """
    known = [batch[key] for key in (CONCEPT, PICTURE, TEXT) if key in batch]
    if not known:
        return None
    return torch.stack([ids.unsqueeze(0) == ids.unsqueeze(1) for ids in known]).any(dim=0)


def contrastive_loss(logits: Tensor, positive: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE with one or several positives a row.

    Args:
        logits: Scaled similarities (B, B), images by texts; pair i sits at (i, i).
        positive: Which of them belong together, (B, B) bool, symmetric; the positives of a row share its
            target mass equally. None makes every pair its own.

    Returns:
        Mean of the image-to-text and the text-to-image cross-entropy, a scalar.
    """
    if positive is None:
        targets = torch.arange(logits.shape[0], device=logits.device)
        return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
    same = positive.to(logits.dtype)
    weights = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, weights) + F.cross_entropy(logits.T, weights))


def retrieval_loss(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Contrastive loss of the image-text pairs of a batch."""
    images = F.normalize(model.image_features(batch), dim=-1)  # (B, D)
    texts = F.normalize(model.text_features(batch), dim=-1)  # (B, D)
    return contrastive_loss(model.temperature_scale() * images @ texts.T, positives(batch))


def evaluate_retrieval(model: FederatedCLIPModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, and the contrastive loss within the batches.

    Recalls are NaN where an embedding is not finite.
    """
    images, texts, ids = [], [], []
    loss_sum: Tensor | float = 0.0
    total = 0
    for batch in batches:
        image, text = (
            F.normalize(model.image_features(batch), dim=-1),
            F.normalize(model.text_features(batch), dim=-1),
        )
        size = num_examples(batch)
        loss = contrastive_loss(model.temperature_scale() * image @ text.T, positives(batch))
        loss_sum = loss_sum + loss.double() * size
        images.append(image.float())
        texts.append(text.float())
        ids.append({key: batch[key].cpu() for key in (CONCEPT, PICTURE, TEXT) if key in batch})
        total += size
    if total == 0:
        raise UserError("there is nothing to evaluate: no batch was given")
    metrics = {"loss": float(loss_sum) / total, "num_examples": float(total)}
    known = {key: torch.cat([part[key] for part in ids]) for key in ids[0]}
    image_rows, text_rows = torch.cat(images), torch.cat(texts)
    finite = image_rows.isfinite().all() & text_rows.isfinite().all()
    for direction, recalls in retrieval_set(image_rows, text_rows, known).recall(RECALL_CUTOFFS).items():
        for k, recall in recalls.items():
            metrics[f"{direction}_recall_at_{k}"] = or_not_a_number(recall, metrics["loss"], finite)
    return metrics


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            loss=classification_loss,
            evaluate=evaluate_classification,
            headline_metric="accuracy",
            uses_head=True,
            uses_text=False,
            splits_into_micro_batches=True,
        ),
        Task(
            name="zero_shot",
            loss=zero_shot_loss,
            evaluate=evaluate_zero_shot,
            headline_metric="accuracy",
            uses_head=False,
            uses_text=True,
            splits_into_micro_batches=True,
        ),
        Task(
            name="retrieval",
            loss=retrieval_loss,
            evaluate=evaluate_retrieval,
            headline_metric="image_to_text_recall_at_5",
            uses_head=False,
            uses_text=True,
            splits_into_micro_batches=False,
            reads_captions=True,
        ),
        Task(
            name="vqa",
            loss=vqa_loss,
            evaluate=evaluate_vqa,
            headline_metric=EXACT_MATCH,
            splits_into_micro_batches=True,
            family="vqa",
            reads=COLUMNS,
            batch=read_questions,
            predict=predict_answers,
        ),
    )
}
"""Task name -> task."""


def classification_task(
    name: str,
    logits: Callable[[Any, Batch], Tensor],
    *,
    family: str,
    reads: tuple[str, ...],
    batch: Callable[[Any, Rows], Batch],
) -> Task:
    """Make the task of telling classes apart: cross-entropy, judged by accuracy, predicting class names.

    Args:
        name: Of the task.
        logits: (model, batch) -> class logits (B, C); the model has ``class_names``.
        family: The model family whose models it takes.
        reads: Columns of the rows that ``batch`` is given.
        batch: (model, rows) -> named tensors, "labels" (B,) int64 among them.
    """

    def predict(model: Any, batch: Batch) -> list[str]:
        return [model.class_names[number] for number in logits(model, batch).argmax(dim=1).tolist()]

    return Task(
        name=name,
        loss=lambda model, batch: F.cross_entropy(logits(model, batch), _labels(batch)),
        evaluate=lambda model, batches: evaluate_logits(lambda batch: logits(model, batch), batches),
        headline_metric="accuracy",
        uses_head=True,
        splits_into_micro_batches=True,
        family=family,
        reads=reads,
        batch=batch,
        predict=predict,
    )


def tasks_of(family: str) -> list[str]:
    """Return the names of the tasks that a model family takes."""
    return [name for name, task in TASKS.items() if task.family == family]


def register_task(task: Task) -> Task:
    """Add a task under its own name.

    Raises:
        UserError: It is no task, the name is taken, or it makes batches of no column.
    """
    if not isinstance(task, Task):
        raise UserError(f"register_task takes a Task, not a {type(task).__name__}")
    if (task.batch is None) != (not task.reads):
        raise UserError(f"task {task.name!r}: batch and reads, the columns that it is given, go together")
    add("task", task.name, task, TASKS)
    return task

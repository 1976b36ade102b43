"""What one evaluation says in detail: figures of every class, or recall by k; as text, data and pictures.

Stands after the rounds, behind ``fedlora evaluate`` (``federated.standalone.evaluation``). The model is used
as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from federated.data.splits import IntArray
from federated.reporting.wording import format_metric, format_percent, metric_label
from federated.standalone.evaluation_plots import (
    CHANCE,
    ClassFigures,
    class_performance,
    confusion_matrix,
    recall_by_k,
)
from lora.adapters import unwrap
from models.finite import check_finite
from models.metrics import recall_at
from models.training import Batch

CUTOFFS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Values of k at which recall is reported, as far as the gallery reaches."""

DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, eq=False)
class DetailedMetrics:
    """An evaluation.

    Attributes:
        results: For JSON.
        report: For reading.
        figures: File name without ending -> picture.
    """

    results: dict[str, Any]
    report: str
    figures: dict[str, Figure]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier says about N images.

    Attributes:
        labels: The right classes, (N,).
        predicted: The most probable classes, (N,).
        loss: Mean cross-entropy.
    """

    labels: IntArray
    predicted: IntArray
    loss: float


@torch.no_grad()
def predict_classes(model: nn.Module, batches: Iterable[Batch]) -> Predictions:
    """Classify images by the head, or by the class prompts where the task has no head.

    Raises:
        UserError: Logits are not finite.
    """
    federated_model = unwrap(model)
    logits_of = federated_model.logits if federated_model.task.uses_head else federated_model.zero_shot_logits
    federated_model.eval()
    labels, predicted, loss = [], [], 0.0
    for batch in _on_device(batches, federated_model.device):
        logits = check_finite(logits_of(batch).float(), "logits")  # (B, C)
        loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        labels.append(batch["labels"].cpu())
        predicted.append(logits.argmax(dim=1).cpu())
    right = torch.cat(labels)
    return Predictions(right.numpy(), torch.cat(predicted).numpy(), loss / len(right))


def describe_classes(predictions: Predictions, class_names: Sequence[str]) -> DetailedMetrics:
    """Precision, recall and F1 of each class, and what is taken for what.

    Classes that neither occur nor are predicted (in a cut-down split) are left out.
    """
    from sklearn import metrics as sklearn_metrics  # here: it takes seconds to import, for this command alone

    labels, predicted = predictions.labels, predictions.predicted
    present = np.union1d(labels, predicted)
    names = [class_names[number] for number in present]
    counts = sklearn_metrics.confusion_matrix(labels, predicted, labels=present)
    columns = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=present, zero_division=0
    )
    rows = [
        ClassFigures(name, float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(names, *columns, strict=True)
    ]
    accuracy = float((labels == predicted).mean())
    table = sklearn_metrics.classification_report(
        labels, predicted, labels=present, target_names=names, digits=4, zero_division=0
    )
    results = {
        "headline_metric": "accuracy",
        "num_examples": len(labels),
        "accuracy": accuracy,
        "loss": predictions.loss,
        "macro_precision": float(np.mean([row.precision for row in rows])),
        "macro_recall": float(np.mean([row.recall for row in rows])),
        "macro_f1": float(np.mean([row.f1 for row in rows])),
        "per_class": [row.__dict__ for row in rows],
        "confusion_matrix": {"class_names": names, "rows_are_true_classes": counts.tolist()},
    }
    head = f"accuracy {format_percent(accuracy, 2)}, loss {predictions.loss:.4f}, {len(labels)} images"
    figures = {
        "confusion_matrix": confusion_matrix(counts, names),
        "class_performance": class_performance(rows),
    }
    return DetailedMetrics(results, f"{head}\n\n{table}", figures)


@torch.no_grad()
def embed_pairs(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Embed image-text pairs.

    Returns:
        Normalised image features (N, D), text features (N, D), and what each pair shows, (N,); without a
        concept in the batches every pair shows something of its own.

    Raises:
        UserError: Embeddings are not finite.
    """
    federated_model = unwrap(model).eval()
    images, texts, concepts = [], [], []
    for batch in _on_device(batches, federated_model.device):
        image = F.normalize(federated_model.image_features(batch), dim=-1)
        text = F.normalize(federated_model.text_features(batch), dim=-1)
        images.append(check_finite(image).float().cpu())
        texts.append(check_finite(text).float().cpu())
        concepts.append(batch["concept"].cpu() if "concept" in batch else None)
    pairs = torch.cat(images), torch.cat(texts)
    known = [concept for concept in concepts if concept is not None]
    return *pairs, torch.cat(known) if len(known) == len(concepts) else torch.arange(len(pairs[0]))


def describe_retrieval(
    images: Tensor, texts: Tensor, concepts: Tensor, *, headline_metric: str
) -> DetailedMetrics:
    """Recall by k in both directions, beside what guessing reaches.

    Args:
        images: Normalised image features, (N, D).
        texts: Normalised text features, (N, D).
        concepts: What each pair shows, (N,).
        headline_metric: The metric that runs of the task are judged by.
    """
    cutoffs = [k for k in CUTOFFS if k <= len(images)]
    by_direction = {
        "image_to_text": recall_at(images, texts, concepts, concepts, cutoffs),
        "text_to_image": recall_at(texts, images, concepts, concepts, cutoffs),
    }
    chance = chance_recall(concepts.numpy(), cutoffs)
    recalls = {
        f"{direction}_recall_at_{k}": recall
        for direction, curve in by_direction.items()
        for k, recall in curve.items()
    }
    results = {
        "headline_metric": headline_metric,
        "num_examples": len(images),
        "num_concepts": len(concepts.unique()),
        **recalls,
        "chance_recall": {str(k): value for k, value in chance.items()},
    }
    heads = [metric_label(f"{direction}_recall_at_") + "k" for direction in DIRECTIONS]
    lines = [f"{'k':>4}  {heads[0]:>9}  {heads[1]:>9}  {CHANCE:>9}"]
    for k in cutoffs:
        values = [by_direction[direction][k] for direction in DIRECTIONS] + [chance[k]]
        lines.append(f"{k:>4}  " + "  ".join(f"{format_metric('recall', value):>9}" for value in values))
    report = f"{len(images)} pairs of {results['num_concepts']} concepts\n\n" + "\n".join(lines) + "\n"
    return DetailedMetrics(results, report, {"recall_by_k": recall_by_k(by_direction, chance)})


def chance_recall(concepts: npt.NDArray[np.int64], cutoffs: Sequence[int]) -> dict[int, float]:
    """Recall at k of a gallery in random order: k -> mean over queries of 1 - C(M - m, k) / C(M, k).

    Args:
        concepts: What each of the M gallery entries shows, (M,); the queries show the same. A query has as
            many right answers m as entries share its concept.
        cutoffs: Values of k, at most M.
    """
    total = len(concepts)
    _, codes, counts = np.unique(concepts, return_inverse=True, return_counts=True)
    right = counts[codes].astype(np.float64)  # (M,)
    miss, by_k = np.ones(total), {}
    for drawn in range(max(cutoffs, default=0)):
        miss *= np.maximum(total - right - drawn, 0) / (total - drawn)
        by_k[drawn + 1] = float(1 - miss.mean())
    return {k: by_k[k] for k in cutoffs}


def _on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        yield {key: value.to(device) for key, value in batch.items()}

"""What one evaluation says in detail: figures of every class, or recall by k; as text, data and pictures.

The model is used as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from federated.data.sources.form import FederatedData
from federated.data.splits import IntArray
from federated.results.wording import format_metric, format_percent, metric_label
from federated.tools.evaluation_plots import (
    CHANCE,
    NUM_PICTURES,
    ClassFigures,
    answered_pictures,
    class_performance,
    confusion_matrix,
    recall_by_k,
)
from lora.adapters import unwrap
from models.federated_model import FederatedModel
from models.finite import check_finite
from models.metrics import CONCEPT, DIRECTIONS, PICTURE, TEXT, RetrievalSet, retrieval_set
from models.question_baselines import baseline_scores
from models.training import Batch
from models.vqa_metrics import Language, answer_type, mean_scores, normalised, row_scores, scores_by

TOP = 5
"""The class of an image is among so many best ones, where there are more classes: top-5 accuracy."""
MOST_ANSWERS_DRAWN = 15
"""Frequent answers that the picture of confused answers names."""
CUTOFFS = (1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Values of k at which recall is reported, as far as the gallery reaches."""


@dataclass(frozen=True, eq=False)
class DetailedMetrics:
    """An evaluation.

    Attributes:
        results: For JSON.
        report: For reading.
        figures: File name without ending -> picture.
        predictions: What the model says of each row, where its task predicts.
    """

    results: dict[str, Any]
    report: str
    figures: dict[str, Figure]
    predictions: tuple[str, ...] = ()


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
    top5_accuracy: float | None = None


@torch.no_grad()
def describe_task(
    model: FederatedModel, batches: Iterable[Batch], data: FederatedData, split: str
) -> DetailedMetrics:
    """The metrics and predictions of any family's task; figures of each class where it predicts classes.

    Args:
        model: As it is.
        batches: The rows of the split, in order.
        data: Has the right classes.
        split: Which rows they are.
    """
    task, predictions = model.task, list[str]()

    def predicting() -> Iterator[Batch]:
        for batch in _on_device(batches, model.device):
            if task.predict is not None:
                predictions.extend(task.predict(model, batch))
            yield batch

    metrics = model.evaluate(predicting())
    names = data.class_names if task.uses_head and data.label_column is not None else None
    if names is not None and predictions and set(predictions) <= set(names):
        predicted = np.array([names.index(name) for name in predictions])
        described = describe_classes(Predictions(data.labels(split), predicted, metrics["loss"]), names)
        results = {**described.results, **metrics, "headline_metric": task.headline_metric}
        return replace(described, results=results, predictions=tuple(predictions))
    lines = [f"{metric_label(name)}: {format_metric(name, value)}" for name, value in metrics.items()]
    results = {"headline_metric": task.headline_metric, **metrics}
    return DetailedMetrics(results, "\n".join(lines) + "\n", {}, tuple(predictions))


def describe_answers(
    described: DetailedMetrics, data: FederatedData, split: str, language: Language
) -> DetailedMetrics:
    """Add to what `describe_task` says of questions: types, baselines, confused answers, some pictures.

    Args:
        described: With the predictions of all rows.
        data: Has questions and right answers.
        split: Which rows they are.
        language: How answers are normalised.
    """
    rows, said = data.split(split), described.predictions
    (questions, right), types = _asked(rows), data.labels(split)
    people = rows["answers"][:] if "answers" in rows.column_names else None
    if people is not None and any(len(answers) != 10 for answers in people):
        people = None  # the official accuracy is defined for ten
    scores = row_scores(said, right, answers=people, language=language)
    names = data.class_names or ()
    groups = {
        "by_type": [names[number] for number in types],
        "by_answer_type": [answer_type(answer) for answer in right],
    }
    found: dict[str, Any] = {name: scores_by(scores, group) for name, group in groups.items()}
    found["baselines"] = baseline_scores(
        _asked(data.train), (questions, right), answers=people, language=language
    )
    lines = [described.report, "beside answers that look at no picture:"]
    for name, words in (("majority", "most frequent answer"), ("question_only", "question only")):
        lines.append(f"  {words}: {_scores_in_words(found['baselines'][name])}")
    for title, group in (("type of question", "by_type"), ("type of answer", "by_answer_type")):
        lines += [f"by {title}:"]
        lines += [f"  {name}: {_scores_in_words(values)}" for name, values in found[group].items()]
    frequent = [answer for answer, _ in Counter(right).most_common(MOST_ANSWERS_DRAWN)]
    places = {normalised(answer, language): number for number, answer in enumerate(frequent)}
    counts = np.zeros((len(frequent) + 1,) * 2, dtype=np.int64)
    for expected, answer in zip(right, said, strict=True):
        here, there = (places.get(normalised(text, language), len(frequent)) for text in (expected, answer))
        counts[here, there] += 1
    figures = {
        "confusion_matrix": confusion_matrix(counts, [*frequent, "other"]),
        "answers": answered_pictures(rows["image"][:NUM_PICTURES], questions, right, said, language),
    }
    results = {**described.results, **mean_scores(scores), **found}
    return replace(described, results=results, report="\n".join(lines) + "\n", figures=figures)


def _asked(rows: Dataset) -> tuple[list[str], list[str]]:
    return rows["question"][:], rows["answer"][:]


def _scores_in_words(scores: Mapping[str, float]) -> str:
    parts = [f"{metric_label(n)} {format_metric(n, value)}" for n, value in scores.items() if n != "rows"]
    return ", ".join([*parts, *([f"{scores['rows']:.0f} rows"] if "rows" in scores else [])])


@torch.no_grad()
def predict_classes(model: nn.Module, batches: Iterable[Batch]) -> Predictions:
    """Classify images by the head, or by the class prompts where the task has no head.

    Raises:
        UserError: Logits are not finite.
    """
    federated_model = unwrap(model)
    logits_of = federated_model.logits if federated_model.task.uses_head else federated_model.zero_shot_logits
    federated_model.eval()
    labels, predicted, loss, in_top5 = [], [], 0.0, 0
    for batch in _on_device(batches, federated_model.device):
        logits = check_finite(logits_of(batch).float(), "logits")  # (B, C)
        loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        labels.append(batch["labels"].cpu())
        predicted.append(logits.argmax(dim=1).cpu())
        best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices  # (B, 5)
        in_top5 += int((best == batch["labels"].unsqueeze(1)).sum())
    right = torch.cat(labels)
    top5 = in_top5 / len(right) if logits.shape[1] > TOP else None
    return Predictions(right.numpy(), torch.cat(predicted).numpy(), loss / len(right), top5)


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
    top5 = ""
    if predictions.top5_accuracy is not None:
        results["top5_accuracy"] = predictions.top5_accuracy
        top5 = f"top-5 accuracy {format_percent(predictions.top5_accuracy, 2)}, "
    head = f"accuracy {format_percent(accuracy, 2)}, {top5}loss {predictions.loss:.4f}, {len(labels)} samples"
    figures = {
        "confusion_matrix": confusion_matrix(counts, names),
        "class_performance": class_performance(rows),
    }
    return DetailedMetrics(results, f"{head}\n\n{table}", figures)


@torch.no_grad()
def embed_pairs(model: nn.Module, batches: Iterable[Batch]) -> RetrievalSet:
    """Embed image-text pairs, each image and each text once.

    Raises:
        UserError: Embeddings are not finite.
    """
    federated_model = unwrap(model).eval()
    images, texts, ids = [], [], []
    for batch in _on_device(batches, federated_model.device):
        image = F.normalize(federated_model.image_features(batch), dim=-1)
        text = F.normalize(federated_model.text_features(batch), dim=-1)
        images.append(check_finite(image).float().cpu())
        texts.append(check_finite(text).float().cpu())
        ids.append({key: batch[key].cpu() for key in (CONCEPT, PICTURE, TEXT) if key in batch})
    known = {key: torch.cat([part[key] for part in ids]) for key in ids[0]}
    return retrieval_set(torch.cat(images), torch.cat(texts), known)


def describe_retrieval(found: RetrievalSet, *, headline_metric: str) -> DetailedMetrics:
    """Recall by k in both directions, beside what guessing reaches.

    Args:
        found: Images and texts.
        headline_metric: The metric that runs of the task are judged by.
    """
    num_images, num_texts = len(found.images), len(found.texts)
    cutoffs = [k for k in CUTOFFS if k <= max(num_images, num_texts)]
    by_direction = found.recall(cutoffs)
    chance = {
        direction: chance_recall(found.num_right(direction), found.num_gallery(direction), cutoffs)
        for direction in DIRECTIONS
    }
    recalls = {
        f"{direction}_recall_at_{k}": recall
        for direction, curve in by_direction.items()
        for k, recall in curve.items()
    }
    results = {
        "headline_metric": headline_metric,
        "num_examples": found.num_rows,
        "num_images": num_images,
        "num_texts": num_texts,
        **recalls,
        "chance_recall": {
            direction: {str(k): value for k, value in curve.items()} for direction, curve in chance.items()
        },
    }
    lines = [
        _line("k", [metric_label(f"{direction}_recall_at_") + "k" for direction in DIRECTIONS], [CHANCE] * 2)
    ]
    lines += [
        _line(
            str(k),
            [format_metric("recall", by_direction[direction][k]) for direction in DIRECTIONS],
            [format_metric("recall", chance[direction][k]) for direction in DIRECTIONS],
        )
        for k in cutoffs
    ]
    report = (
        f"{found.num_rows} pairs of {num_images} images and {num_texts} texts\n\n" + "\n".join(lines) + "\n"
    )
    return DetailedMetrics(results, report, {"recall_by_k": recall_by_k(by_direction, chance)})


def _line(k: str, recalls: Sequence[str], chances: Sequence[str]) -> str:
    """A line of the report: recall in each direction with what guessing reaches behind it."""
    pairs = zip(recalls, chances, strict=True)
    return f"{k:>4}" + "".join(f"  {recall:>9}  {chance:>9}" for recall, chance in pairs)


def chance_recall(
    num_right: npt.NDArray[np.int64], num_gallery: int, cutoffs: Sequence[int]
) -> dict[int, float]:
    """Recall at k of a gallery in random order: k -> mean over queries of 1 - C(M - m, k) / C(M, k).

    Args:
        num_right: Right answers m of each query, (N,).
        num_gallery: Entries M of the gallery.
        cutoffs: Values of k; one above M counts the whole gallery.
    """
    right = num_right.astype(np.float64)
    miss, by_k = np.ones(len(right)), {}
    for drawn in range(max(cutoffs, default=0)):
        if drawn < num_gallery:
            miss *= np.maximum(num_gallery - right - drawn, 0) / (num_gallery - drawn)
        by_k[drawn + 1] = float(1 - miss.mean())
    return {k: by_k[k] for k in cutoffs}


def _on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        yield {key: value.to(device) for key, value in batch.items()}

"""A task of your own: classification with smoothed labels, judged by the mean accuracy of the classes.

    fedlora run quickstart --plugin examples/own_task.py task.name=smoothed

Source of the loss: Szegedy et al. 2016 (arXiv:1512.00567), section 7.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.clip import FederatedCLIPModel
from models.tasks import Task, register_task
from models.training import Batch

SMOOTHING = 0.1


def smoothed_loss(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Cross-entropy against 1 - SMOOTHING of the label and SMOOTHING of all classes, the mean of a batch."""
    return F.cross_entropy(model.logits(batch), batch["labels"], label_smoothing=SMOOTHING)


def evaluate_smoothed(model: FederatedCLIPModel, batches: Iterable[Batch]) -> dict[str, float]:
    """The loss, the accuracy, and the accuracy of each class averaged over the classes."""
    pairs = [(model.logits(batch).float(), batch["labels"]) for batch in batches]
    logits, labels = (torch.cat(column) for column in zip(*pairs, strict=True))  # (N, C), (N,)
    right = (logits.argmax(dim=1) == labels).double()  # (N,)
    by_class = [right[labels == label].mean() for label in labels.unique()]
    return {
        "loss": float(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)),
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(torch.stack(by_class).mean()),
        "num_examples": float(len(labels)),
    }


register_task(
    Task(
        name="smoothed",
        loss=smoothed_loss,
        evaluate=evaluate_smoothed,
        headline_metric="balanced_accuracy",
        uses_head=True,
        uses_text=False,
        splits_into_micro_batches=True,
    )
)

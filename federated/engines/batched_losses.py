"""A group's batch, and each client's own loss on it.

Inside each step of ``federated.engines.batched_training``. The batches of K clients become K equal blocks of
rows that pass through the model together; the losses are taken apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.clip import FederatedCLIPModel
from models.features import CAPTION_ID
from models.metrics import CONCEPT, PICTURE, TEXT
from models.prompts import MAX_PROMPTS, average_templates
from models.tasks import classification_loss, contrastive_loss, positives, retrieval_loss, zero_shot_loss
from models.training import Batch, num_examples

KNOWN_LOSSES = (classification_loss, zero_shot_loss, retrieval_loss)
"""Losses of tasks that ``group_losses`` computes, for several clients at a time."""


@dataclass(frozen=True, eq=False)
class GroupBatch:
    """One batch of each of K clients, as K equal blocks of n rows.

    Attributes:
        tensors: By name, (K * n, ...); short batches are filled up with copies of their own first row.
        weights: What each row counts in its client's mean loss, (K, n): 1 / size, or 0 for filling.
        sizes: Rows of each client that count; 0 for a client that has no step left.
    """

    tensors: Batch
    weights: Tensor
    sizes: tuple[int, ...]

    @property
    def idle(self) -> list[int]:
        """Clients without a step left."""
        return [k for k, size in enumerate(self.sizes) if size == 0]


def gather(batches: Sequence[Batch | None], device: torch.device) -> GroupBatch:
    """Put the batches of K clients into one.

    Args:
        batches: By client; None for one that has no step left, whose block is filled with other rows.
        device: Where the model runs.
    """
    some = next(batch for batch in batches if batch is not None)
    sizes = tuple(0 if batch is None else num_examples(batch) for batch in batches)
    num_rows = max(sizes)
    blocks = [some if batch is None else batch for batch in batches]
    tensors = {}
    for key in some:
        if key == CAPTION_ID:  # equal captions of two clients meet different adapters: nothing to share
            continue
        block = [_filled(batch[key], num_rows) for batch in blocks]
        tensors[key] = torch.cat(_same_width(key, block)).to(device, non_blocking=True)
    weights = torch.zeros(len(sizes), num_rows)
    for client, size in enumerate(sizes):
        weights[client, :size] = 1.0 / max(size, 1)
    return GroupBatch(tensors, weights.to(device, non_blocking=True), sizes)


def _filled(rows: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])])


def _same_width(key: str, blocks: list[Tensor]) -> list[Tensor]:
    """Pad the texts of all clients to the longest.

    Padding repeats the last column, as ``models.prompts.pad_tokens`` does, and is masked.
    """
    if blocks[0].ndim < 2 or len({block.shape[1] for block in blocks}) == 1:
        return blocks
    width = max(block.shape[1] for block in blocks)
    padded = []
    for block in blocks:
        missing = width - block.shape[1]
        filling = block[:, -1:].expand(-1, missing, *block.shape[2:])
        padded.append(torch.cat([block, filling * 0 if key == "attention_mask" else filling], dim=1))
    return padded


def group_losses(model: FederatedCLIPModel, batch: GroupBatch, class_tokens: Batch | None) -> Tensor:
    """Return each client's mean loss over its own rows, (K,); 0 for one that has no step left.

    Args:
        model: With the clients' stacks installed; where each trains its own, the temperature is one of them.
        batch: Their rows.
        class_tokens: Tokens of the class prompts; needed where the text tower trains on them.
    """
    num_clients = len(batch.sizes)
    features = F.normalize(model.image_features(batch.tensors), dim=-1)
    scale = model.temperature_scale().view(-1, 1, 1)  # (1, 1, 1), or (K, 1, 1)
    images = scale * features.view(num_clients, -1, features.shape[-1])  # (K, n, D)
    if model.head is not None:
        return _mean_cross_entropy(model.head(images.flatten(0, 1)), batch)
    if model.task.name == "zero_shot":
        classes = _class_embeddings(model, num_clients, class_tokens)  # (K, C, D)
        return _mean_cross_entropy(torch.bmm(images, classes.mT).flatten(0, 1), batch)
    texts = F.normalize(model.text_features(batch.tensors), dim=-1).view_as(images)
    return _contrastive_losses(torch.bmm(images, texts.mT), batch)  # pairs of one client with its own alone


def _mean_cross_entropy(logits: Tensor, batch: GroupBatch) -> Tensor:
    losses = F.cross_entropy(logits, batch.tensors["labels"], reduction="none")  # (K * n,)
    return (losses.view_as(batch.weights) * batch.weights).sum(dim=1)


def _contrastive_losses(logits: Tensor, batch: GroupBatch) -> Tensor:
    """The task's own loss on each client's (n, n) block, without its filling."""
    losses = []
    for client, size in enumerate(batch.sizes):
        own = {
            key: ids.view(len(batch.sizes), -1)[client, :size]
            for key, ids in batch.tensors.items()
            if key in (CONCEPT, PICTURE, TEXT)
        }
        pairs = logits[client, :size, :size]
        losses.append(contrastive_loss(pairs, positives(own)) if size else logits.new_zeros(()))
    return torch.stack(losses)


def _class_embeddings(model: FederatedCLIPModel, num_clients: int, class_tokens: Batch | None) -> Tensor:
    """Every client's normalised class embeddings, (K, C, D)."""
    if model.text_is_frozen or class_tokens is None:
        return model.class_embeddings().unsqueeze(0).expand(num_clients, -1, -1)
    num_prompts = len(class_tokens["input_ids"])
    step = max(1, MAX_PROMPTS // num_clients)
    features = []
    for start in range(0, num_prompts, step):
        part = {
            key: value[start : start + step].repeat(num_clients, 1) for key, value in class_tokens.items()
        }
        encoded = model.encode_text(part)  # client by client
        features.append(encoded.view(num_clients, -1, encoded.shape[-1]))
    prompts = torch.cat(features, dim=1).flatten(0, 1)  # (K * C * T, D)
    classes = average_templates(prompts, num_clients * model.num_classes)
    return classes.view(num_clients, model.num_classes, -1)

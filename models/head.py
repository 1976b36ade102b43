"""The classification head: a linear layer that starts as the class-prompt embeddings.

Built once, with the model, before round 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from models.construction import seeded_construction


def class_head(
    embedding_dim: int, num_classes: int, *, scale: Tensor, seed: int, embed: Callable[[], Tensor | None]
) -> nn.Linear:
    """Linear layer (D -> C) whose untrained logits are the zero-shot classifier's.

    Args:
        embedding_dim: D.
        num_classes: C.
        scale: exp(logit_scale), on the device that the head is for.
        seed: Of the random weights.
        embed: Gives the class embeddings (C, D); None from it: a random matrix with logits of order 1.
    """
    device = scale.device
    head = cast(
        nn.Linear,
        seeded_construction(lambda: nn.Linear(embedding_dim, num_classes), seed=seed, device=device),
    ).to(device)
    nn.init.zeros_(head.bias)
    if device.type != "meta":
        with torch.no_grad():
            weight = embed()
            head.weight.copy_(head.weight / scale if weight is None else weight)
    return head

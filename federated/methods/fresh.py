"""Factors that are not sent because both sides draw the same ones.

At its end on the server (FLoRA's empty adapter) and at the start of the next on the client, which saves the
downlink b r d_i bytes a module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from federated.methods.protocol import FreshDraw
from lora.adapters import factor_pairs
from models.state import State


def fresh_factors(like: Mapping[str, Tensor], draw: FreshDraw) -> State:
    """Draw the factors that both sides use after a merge: A Kaiming-uniform with a = sqrt(5), B = 0.

    Each module has its own stream, keyed by seed, round and its place among the modules, and A is filled row
    by row: a client of rank r_k draws the first r_k rows of what the server draws.

    Args:
        like: Factors of the wanted shapes and dtype; their values do not matter.
        draw: Keys the random streams.
    """
    fresh: dict[str, Tensor] = {}
    for index, pair in enumerate(factor_pairs(like)):
        generator = torch_generator(draw.seed, draw.server_round, index)
        rank, d_in = like[pair.a].shape
        uniform = torch.rand((rank, d_in), generator=generator, dtype=torch.float32)
        fresh[pair.a] = ((2 * uniform - 1) / math.sqrt(d_in)).to(like[pair.a].dtype)
        fresh[pair.b] = torch.zeros_like(like[pair.b])
    return fresh


def torch_generator(*key: int) -> torch.Generator:
    """Return the random stream of a key, such as (seed, round, module)."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)

"""Random weights that depend on a seed alone: heads, and models that are not pre-trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def seeded_construction(
    construct: Callable[[], nn.Module], *, seed: int, device: str | torch.device
) -> nn.Module:
    """Construct a module whose random weights depend on `seed` alone.

    The weights are drawn on the CPU, whatever `device`, so that every device starts from the same
    ones; on "meta" nothing is drawn.
    """
    place = "meta" if torch.device(device).type == "meta" else "cpu"
    with torch.random.fork_rng(devices=[]), torch.device(place):
        torch.manual_seed(seed)
        return construct()

"""An aggregation rule of your own: the trimmed mean, which no single client can pull far away.

    fedlora run quickstart --plugin examples/own_aggregator.py aggregation.name=trimmed_mean

Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning" (arXiv:1803.01498), algorithm 1, option II.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from federated import register_aggregator
from federated.methods.averaging import advance, begin, of_one_rank
from federated.methods.downlinks import send_changed
from federated.methods.protocol import Aggregator, ServerState, Update, everything, nothing


@register_aggregator("trimmed_mean")
def trimmed_mean(*, share: Annotated[float, Field(ge=0, lt=0.5)] = 0.2) -> Aggregator:
    """Every value <- mean of the clients' values without the largest and the smallest ``share`` of them.

    Args:
        share: Part of the clients that is left out at each end, below 0.5.
    """

    def apply(server: ServerState, updates: Sequence[Update]) -> ServerState:
        ordered = of_one_rank(server, updates, "trimmed_mean")
        num_cut = int(share * len(ordered))
        values = {}
        for name in ordered[0].state:
            stacked = torch.stack([update.state[name].double() for update in ordered])  # (m, ...)
            kept = stacked.sort(dim=0).values[num_cut : len(ordered) - num_cut]
            values[name] = kept.mean(dim=0).to(server.state[name].dtype)
        return advance(server, values)

    return Aggregator(
        name="trimmed_mean",
        init=begin,
        downlink=send_changed(everything),
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=apply,
        exact=False,
        keeps_basis=True,
    )

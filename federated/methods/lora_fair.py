"""LoRA-FAIR: average the factors apart, then move B to absorb what it can of the error that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from federated.methods.averaging import advance, average, begin_with_adapters, of_one_rank
from federated.methods.downlinks import send_changed
from federated.methods.fedex import averaging_residual
from federated.methods.protocol import Aggregator, ServerState, Update, everything, nothing
from lora.adapters import factor_pairs
from models.errors import UserError


def lora_fair(*, regularisation: float = 0.01) -> Aggregator:
    """A <- average, B <- average + dB with dB = argmin ||s R - s dB A||_F^2 + ridge, in closed form.

    dB = (R A^T) (A A^T + lambda mean(diag(A A^T)) I)^-1. The residual's part outside the row space of A is
    lost. The paper minimises a cosine "similarity" by gradient steps on the server; this is the Frobenius
    version of its objective, solved exactly and without a (d_o, d_i) matrix.

    Source: LoRA-FAIR, Bian et al., ICCV 2025, arXiv:2411.14961.
    Bytes: up b r (d_i + d_o), down the same.
    Preserves: the rank; fedavg's A.

    Args:
        regularisation: lambda, relative to the mean diagonal of A A^T.

    Raises:
        UserError: lambda is negative.
    """
    if regularisation < 0:
        raise UserError(
            f"lora_fair: regularisation is {regularisation}; give 0 or more", options=("regularisation",)
        )
    return Aggregator(
        name="lora_fair",
        init=begin_with_adapters,
        downlink=send_changed(everything),
        trains=everything,
        uplink=everything,
        private=nothing,
        apply=partial(_apply_fair, regularisation=regularisation),
        exact=False,
    )


def _apply_fair(server: ServerState, updates: Sequence[Update], regularisation: float) -> ServerState:
    ordered = of_one_rank(server, updates, "lora_fair")
    mean = average(ordered)
    corrected: dict[str, torch.Tensor] = {}
    for pair in factor_pairs(server.state):
        a = mean[pair.a].double()  # (r, d_in)
        residual = averaging_residual(ordered, mean, pair)
        target = residual.left.double() @ (residual.right.double() @ a.T)  # R A^T: (d_out, r)
        gram = a @ a.T
        ridge = regularisation * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        correction = target @ torch.linalg.pinv(gram + ridge, hermitian=True)
        corrected[pair.b] = (mean[pair.b].double() + correction).to(mean[pair.b].dtype)
    return advance(server, {**mean, **corrected})

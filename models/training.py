"""Local training: settings, learning-rate schedule, and one optimizer reused by every client.

Between decoding the downlink and encoding the uplink, each client of the cohort runs `LocalTrainer.step` for
its local steps. Clients are stateless (McMahan et al. 2017, FedAvg): moments and schedule start afresh for
each of them, which `LocalTrainer.reset` does in place, so hundreds of simulated clients share one optimizer
object and its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.errors import UserError

Batch = dict[str, Tensor]
"""Named tensors that share their first dimension, the examples."""

Rows = Mapping[str, Sequence[Any]]
"""Column -> values, one a row, as the data source gives them: texts, numbers, PIL images."""


@dataclass(frozen=True)
class TrainingSettings:
    """How one client trains.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled (adamw) or L2 (sgd) decay; matrices only, never biases and norms.
        optimizer: "adamw" or "sgd".
        momentum: Of sgd, from 0 (plain SGD) to below 1; adamw has moments of its own.
        warmup_steps: Steps of linear warm-up, counted from the start of the local training.
        schedule: "constant", or "cosine" down to 0 at the last local step.
        clip_norm: Largest global gradient norm, or None.
        micro_batch_size: Examples per forward pass, or None for the whole batch. Gradients are
            accumulated inside the step and equal those of the whole batch.
        precision: "fp32", "bf16" (autocast) or "fp16" (autocast and loss scaling, CUDA only).
        warmup_ratio: Warm-up as a share of the local training's steps, rounded, where warmup_steps is 0.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Reject values that would only fail, or mislead, steps later."""
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be 0 or more")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "must be 0 or more and below 1")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "must be 0 or more")
        _require(
            0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "must be 0 or more and below 1"
        )
        if self.clip_norm is not None:
            _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "must be above 0, or null")
        if self.micro_batch_size is not None:
            _require(
                self.micro_batch_size >= 1,
                "micro_batch_size",
                self.micro_batch_size,
                "must be 1 or more, or null",
            )
        for key, allowed in _CHOICES.items():
            _require(
                getattr(self, key) in allowed, key, getattr(self, key), f"choose one of {', '.join(allowed)}"
            )


_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("constant", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
}


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"training setting {key}={value!r}: {remedy}")


def learning_rate_at(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Learning rate of one local step.

    Args:
        settings: Peak rate, warm-up and schedule.
        step: Steps already taken in this local training, from 0.
        num_steps: Steps the local training will take.

    Returns:
        The rate. Warm-up rises as (step + 1) / its steps to the peak; the cosine then falls
        from the peak, in its first step, to 0 in the last of `num_steps` and stays there. A cosine
        that has one step alone takes it at the peak.
    """
    warmup_steps = settings.warmup_steps or round(settings.warmup_ratio * num_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Make the optimizer over what trains.

    Args:
        parameters: The trainable parameters.
        settings: Names the optimizer and its weight decay.

    Returns:
        AdamW or SGD, as one fused kernel where torch has it (measured at a third of the time of the
        multi-tensor "foreach" form for 32 adapter factors on a CPU), as "foreach" elsewhere.
    """
    if settings.weight_decay > 0:
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    else:
        groups = [{"params": list(parameters), "weight_decay": 0.0}]
    is_fused = {p.device.type for p in parameters} <= {"cpu", "cuda"}
    implementation: dict[str, Any] = {"fused": True} if is_fused else {"foreach": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, **implementation
        )
    return torch.optim.AdamW(groups, lr=settings.learning_rate, **implementation)


@torch.no_grad()
def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Bring an optimizer back to its first step in place: moments and step counts become zero.

    The steps that follow are bitwise those of a new optimizer: a zero moment is what AdamW starts
    from, and SGD's first momentum, m * 0 + g, is g.
    """
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    if tensors:
        torch._foreach_zero_(tensors)


def _kind_of_optimizer(settings: TrainingSettings) -> tuple[object, ...]:
    """What `build_optimizer` reads, less the learning rate, which each step sets."""
    return settings.optimizer, settings.weight_decay, settings.momentum


class LocalTrainer:
    """The optimizer and schedule of the client that is training now.

    Lives across clients; `reset` starts the next one.

    Attributes:
        keeps_gradients: Whether those of a step stay until the next one, to be looked at.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> None:
        """Build the optimizer for `parameters`, which must share one device.

        Raises:
            UserError: There is nothing to train.
        """
        if not parameters:
            raise UserError(
                "no parameter is trainable: apply LoRA to the model, set train_head=true, or choose another "
                "strategy"
            )
        self.parameters = list(parameters)
        self.device_type = self.parameters[0].device.type
        self.settings = settings
        self.optimizer = build_optimizer(self.parameters, settings)
        self.scaler: torch.amp.GradScaler | None = None
        self.extra_loss: Callable[[], Tensor] | None = None
        self.steps_done = 0
        self.num_steps = 1
        self.keeps_gradients = False

    def fits(self, parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> bool:
        """Whether this optimizer can serve these parameters and settings after a reset."""
        same = len(parameters) == len(self.parameters) and all(
            a is b for a, b in zip(parameters, self.parameters, strict=True)
        )
        return same and _kind_of_optimizer(self.settings) == _kind_of_optimizer(settings)

    def reset(
        self,
        settings: TrainingSettings,
        num_steps: int,
        *,
        extra_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        """Start the next client: zero moments, first step of the schedule.

        Args:
            settings: Settings of the new local training, which `fits`.
            num_steps: Its number of steps (the length of the cosine).
            extra_loss: A scalar whose gradient is added in every step, or None.

        Raises:
            UserError: fp16 is asked for without CUDA.
        """
        if settings.precision == "fp16" and self.device_type != "cuda":
            raise UserError(
                f"precision=fp16 needs a CUDA device, the model is on {self.device_type}: use bf16 or fp32"
            )
        reset_optimizer(self.optimizer)
        self._drop_gradients()
        self.settings = settings
        self.extra_loss = extra_loss
        self.num_steps = num_steps
        self.steps_done = 0
        self.keeps_gradients = False
        self.scaler = torch.amp.GradScaler("cuda") if settings.precision == "fp16" else None

    def step(self, loss_of: Callable[[Batch], Tensor], batch: Batch) -> float:
        """Take one optimizer step on one batch.

        Args:
            loss_of: Mean loss over the examples of a batch, as a scalar tensor.
            batch: The examples.

        Returns:
            The loss before the step, averaged over the batch.
        """
        if self.keeps_gradients:
            self._drop_gradients()
        rate = learning_rate_at(self.settings, self.steps_done, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate_gradients(loss_of, batch)
        self._apply_gradients()
        if not self.keeps_gradients:
            self._drop_gradients()
        self.steps_done += 1
        return float(loss)

    def _drop_gradients(self) -> None:
        """What `optimizer.zero_grad` does, without its bookkeeping for profilers."""
        for parameter in self.parameters:
            parameter.grad = None

    def _accumulate_gradients(self, loss_of: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        total: Tensor | None = None
        for part, share in micro_batches(batch, self.settings.micro_batch_size):
            with self._autocast():
                loss = loss_of(part)
                if share != 1.0:
                    loss = loss * share
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self.extra_loss is not None:
            extra = self.extra_loss()
            (extra if self.scaler is None else self.scaler.scale(extra)).backward()
        assert total is not None
        return total

    def _apply_gradients(self) -> None:
        if self.scaler is None:
            self._clip()
            self.optimizer.step()
            return
        self.scaler.unscale_(self.optimizer)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _clip(self) -> None:
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.settings.precision, self.device_type)


def autocast(precision: str, device_type: str) -> AbstractContextManager[None]:
    """Context in which the forward pass runs at `precision` ("fp32", "bf16" or "fp16")."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device_type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def num_examples(batch: Batch) -> int:
    """Examples in a batch.

    Raises:
        UserError: The batch is empty, or its tensors disagree about the number of examples.
    """
    sizes = {key: int(value.shape[0]) for key, value in batch.items()}
    if not sizes or 0 in sizes.values() or len(set(sizes.values())) != 1:
        raise UserError(f"a batch needs one or more examples and the same number under each key, got {sizes}")
    return next(iter(sizes.values()))


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[Batch, float]]:
    """Cut a batch into parts of at most `size` examples.

    Yields:
        Each part with its share of the examples; the shares sum to 1, so that the sum of
        share * mean loss over the parts is the mean loss of the batch.
    """
    total = num_examples(batch)
    if size is None or size >= total:
        yield batch, 1.0
        return
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield {key: value[start:stop] for key, value in batch.items()}, (stop - start) / total

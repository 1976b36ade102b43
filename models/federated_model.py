"""FederatedModel: the four verbs, what travels, and local training, for any model that has a task.

Server and clients of a process hold the same object. A client calls `set_parameters` with what the downlink
carried, `train_step` for its local steps, and `get_parameters` for the uplink; the server calls
`set_parameters` and `evaluate`. What travels is named once (`set_exchanged`): by the family's constructor, or
by LoRA injection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import UserError
from models.exchange import Exchanged, find_parameters
from models.frozen import dropout_modules
from models.state import State
from models.towers import Towers
from models.training import Batch, LocalTrainer, TrainingSettings, num_examples


class FederatedModel(nn.Module):
    """A model to be fine-tuned by clients who exchange only part of it.

    A family (`models.clip` is one) builds its modules, sets `task`, and calls `ready` with the names of what
    travels. The methods under "For a family" have a default that does nothing.

    Attributes:
        task: The task's loss and metrics (`models.tasks.Task`).
        towers: Where LoRA finds the layers that it may adapt; without any, the model takes no adapters.
        head: What trains beside the adapters and travels with them, if anything does.
        train_head: Whether it does.
        exchanged_names: Names of what travels, sorted.
        input_name: Key of a batch under which an input that is given alone stands.
    """

    task: Any
    towers = Towers(backend="none")
    input_name = "inputs"

    def __init__(self) -> None:
        """Start without a task; see `ready`."""
        super().__init__()
        self.head: nn.Module | None = None
        self.train_head = True
        self._trainer: LocalTrainer | None = None

    def ready(self, names: Iterable[str]) -> None:
        """Finish construction: the modules are complete, requires_grad is set, and `names` travel."""
        self._base_modules = list(self.modules())
        self.set_exchanged(names)
        self.eval()

    # For a family

    def parameters_changed(self) -> None:
        """Drop what was computed from parameters that have been replaced, or that train from now on."""

    def check_batch(self, batch: Batch) -> None:
        """Refuse a batch that the model cannot train on."""

    def after_step(self) -> None:
        """Bring parameters back into their range after an optimizer step."""

    def lean(self) -> AbstractContextManager[None]:
        """Inside, nothing is computed that outputs and gradients do not need."""
        return nullcontext()

    def classes_that_read_alike(self) -> list[tuple[str, ...]]:
        """Return groups of classes that the model cannot tell apart before training."""
        return []

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.parameters()).device

    # What travels

    def set_exchanged(self, names: Iterable[str]) -> None:
        """Name what travels from now on; `get_state` and `set_state` follow.

        Call it after any change of the set of parameters (LoRA injection, merging). Caches and
        the optimizer are dropped.

        Args:
            names: Wire names: parameter names relative to this module, less PEFT's ".default".

        Raises:
            UserError: A name fits no parameter.
        """
        self._exchanged = Exchanged(find_parameters(self, names))
        self.exchanged_names = tuple(self._exchanged.parameters)
        self.refresh()

    def refresh(self) -> None:
        """Drop caches and the optimizer, and look again at which modules and parameters there are.

        For code that changes modules or requires_grad; `set_exchanged` calls it. Clients only switch what
        travels on and off, which `start_training` sees by itself.
        """
        self._trainer = None
        self._named = tuple(self.named_parameters())
        travelling = {id(parameter) for parameter in self._exchanged.parameters.values()}
        self._trainable = [p for _, p in self._named if p.requires_grad or id(p) in travelling]
        self._switched = dropout_modules(self, self._base_modules)
        self.parameters_changed()

    @property
    def exchanged_parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters of what travels, by wire name."""
        return dict(self._exchanged.parameters)

    # State

    def get_state(self) -> State:
        """Copy what travels: wire name -> detached float32 CPU tensor, a read-only mapping."""
        return self._exchanged.read()

    def set_state(self, state: State, *, partial: bool = False) -> None:
        """Overwrite what travels, in place; a temperature above CLIP's bound becomes the bound.

        Args:
            state: Wire name -> tensor of any float dtype and device.
            partial: Accept a subset of the names.

        Raises:
            UserError: A name is unknown or missing, or a shape differs; nothing is written then.
        """
        self._exchanged.write(state, partial=partial)

    def get_parameters(self) -> list[np.ndarray]:
        """Copy what travels, in the order of `exchanged_names`, as float32 arrays."""
        return [value.numpy() for value in self.get_state().values()]

    def set_parameters(self, parameters: Sequence[np.ndarray]) -> None:
        """Overwrite what travels from arrays in the order of `exchanged_names`.

        Raises:
            UserError: The number of arrays or a shape is wrong.
        """
        if len(parameters) != len(self.exchanged_names):
            raise UserError(
                f"{len(parameters)} arrays given, the model exchanges {len(self.exchanged_names)}"
            )
        arrays = (torch.as_tensor(np.asarray(array)) for array in parameters)
        self.set_state(dict(zip(self.exchanged_names, arrays, strict=True)))

    # Training and evaluation

    def start_training(
        self,
        settings: TrainingSettings,
        num_steps: int,
        *,
        extra_loss: Callable[[], Tensor] | None = None,
    ) -> None:
        """Begin one client's local training: zero moments, first step of the schedule.

        What travels, and what trained at the last `refresh`, is looked at again: call `refresh` after setting
        requires_grad on anything else.

        Args:
            settings: How to train.
            num_steps: Local steps that will follow.
            extra_loss: A scalar that is added to the loss of every step until the next start (a proximal
                term, say); it does not enter the loss that `train_step` returns.

        Raises:
            UserError: Nothing is trainable, or the settings do not suit the device.
        """
        trainable = [parameter for parameter in self._trainable if parameter.requires_grad]
        if self._trainer is None or not self._trainer.fits(trainable, settings):
            for parameter in self._trainable:
                parameter.grad = None
            self._trainer = LocalTrainer(trainable, settings)
            self.parameters_changed()
        self._trainer.reset(settings, num_steps, extra_loss=extra_loss)

    def train_step(
        self, data: Tensor | Batch, labels: Tensor | None = None, *, learning_rate: float | None = None
    ) -> float:
        """Take one optimizer step.

        Without `start_training` before it, the default settings at a constant rate are used, and the
        gradients stay until the next step (`lora.verify_gradients` looks at them).

        Args:
            data: The input alone (B, ...), or a batch: named tensors, as the task needs them.
            labels: Class indices (B,), where `data` does not carry them.
            learning_rate: Peak learning rate from this step on; what it was if left out.

        Returns:
            The batch's mean loss before the step.
        """
        if self._trainer is None:
            self.start_training(TrainingSettings(), num_steps=1)
            self._trainer.keeps_gradients = True  # type: ignore[attr-defined]
        assert self._trainer is not None
        if learning_rate is not None:
            self._trainer.settings = replace(self._trainer.settings, learning_rate=learning_rate)
        batch = self._batch(data, labels)
        self.check_batch(batch)
        self._check_micro_batches(batch)
        self._set_training_mode(training=True)
        try:
            with self.lean():
                loss = self._trainer.step(partial(self.task.loss, self), batch)
        finally:
            self._set_training_mode(training=False)
        self.after_step()
        return loss

    @torch.no_grad()
    def evaluate(
        self, data: Tensor | Batch | Iterable[Batch], labels: Tensor | None = None
    ) -> dict[str, float]:
        """Loss and metrics of the task.

        Args:
            data: The input alone, one batch, or an iterable of batches (see `train_step`).
            labels: Class indices (B,), where `data` does not carry them.

        Returns:
            "loss", "num_examples" and the task's metrics ("accuracy", or recalls).
        """
        if self.training:
            self.eval()
        batches = cast(Iterable[Batch], [data] if isinstance(data, Tensor | Mapping) else data)
        return self.task.evaluate(self, (self._batch(batch, labels) for batch in batches))

    def _batch(self, data: Tensor | Batch, labels: Tensor | None) -> Batch:
        batch = {self.input_name: data} if isinstance(data, Tensor) else dict(data)
        if labels is not None:
            batch["labels"] = labels
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _check_micro_batches(self, batch: Batch) -> None:
        assert self._trainer is not None
        size = self._trainer.settings.micro_batch_size
        if size is not None and size < num_examples(batch) and not self.task.splits_into_micro_batches:
            raise UserError(
                f"micro_batch_size={size}: task={self.task.name} compares all pairs of a batch and cannot be "
                "split; set micro_batch_size to null or the batch size to at most that"
            )

    def _set_training_mode(self, *, training: bool) -> None:
        if self.training:
            self.eval()
        for module in self._switched:
            module.training = training

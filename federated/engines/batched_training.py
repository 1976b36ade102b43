"""Several clients' local training in one forward and one backward pass a step.

Called by ``federated.engines.batched_clients`` instead of ``federated.rounds.local_training``, client after
client. Every client keeps its own adapter, head, loss, clipping, moments and data; only the frozen base is
shared, and sees the rows of all at once. That saves overhead (fewer, larger kernels), much where one client's
batch is small, nothing where it already fills the machine; ``models.lean_blocks`` saves arithmetic.

Equality with one client after another: gradients are the same sums, so float32 results agree to rounding
(relative L2 <= 1e-5 after a few steps; Adam amplifies tiny gradients over more). AdamW and SGD work element
by element, so that one optimizer over the stacks is K optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from federated.engines.batched_losses import GroupBatch, gather, group_losses
from lora.adapters import unwrap
from lora.batched import Stacks, build_stacks, by_client, clip_gradients
from models.errors import UserError
from models.prompts import class_prompts
from models.state import State
from models.training import (
    Batch,
    TrainingSettings,
    autocast,
    build_optimizer,
    learning_rate_at,
    reset_optimizer,
)


@dataclass(frozen=True, eq=False)
class JointResult:
    """What training a group gives, by client.

    Attributes:
        states: Values after training, by wire name.
        train_losses: Mean loss over the local steps.
    """

    states: list[State]
    train_losses: list[float]


class JointTrainer:
    """Trains groups of clients; stacks and optimizers are kept from group to group.

    Nothing in a step waits for the device, so that on a GPU the steps of a group are queued ahead.

    Args:
        model: A federated model without a ``lora.batched.obstacle``.
        settings: How every client trains.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        self._model = unwrap(model)
        self._settings = settings
        self._stacks: dict[int, Stacks] = {}
        self._optimizers: dict[tuple[int, frozenset[str]], torch.optim.Optimizer] = {}
        self._class_tokens: Batch | None = None

    def train(
        self,
        states: Sequence[State],
        batches: Sequence[Iterable[Batch]],
        num_steps: Sequence[int],
        trains: Iterable[str],
    ) -> JointResult:
        """Take every client's local steps.

        Args:
            states: What each client starts from, by wire name.
            batches: Each client's batches, at least ``num_steps`` of them.
            num_steps: Local steps of each client; one that has fewer than others stops there.
            trains: Wire names that get gradients.

        Raises:
            UserError: The numbers of steps differ under a schedule that depends on them.
        """
        if len(set(num_steps)) > 1 and self._settings.schedule != "constant":
            raise UserError("clients with different numbers of steps need client.schedule=constant")
        self._tokenize_classes()
        names = frozenset(trains)
        stacks = self._stacks_for(len(states))
        stacks.load(states)
        trained = stacks.let_train(names)
        optimizer = self._optimizer_for(stacks, names, trained)
        streams = [iter(stream) for stream in batches]
        losses = []
        with stacks.installed(), self._model.lean():
            for step in range(max(num_steps)):
                counts = zip(streams, num_steps, strict=True)
                batch = gather([next(s) if step < n else None for s, n in counts], self._model.device)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(self._settings, step, max(num_steps))
                losses.append(self._step(stacks, trained, optimizer, batch))
        sums = torch.stack(losses).double().sum(dim=0).tolist()  # here the device is waited for
        return JointResult(stacks.read(), [total / n for total, n in zip(sums, num_steps, strict=True)])

    def _step(
        self, stacks: Stacks, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, batch: GroupBatch
    ) -> Tensor:
        """Take one step of every client that has one left; return their losses before it, (K,)."""
        with autocast(self._settings.precision, self._model.device.type):
            losses = group_losses(self._model, batch, self._class_tokens)
        losses.sum().backward()
        if self._settings.clip_norm is not None:
            clip_gradients(trained, stacks.num_clients, self._settings.clip_norm)
        with _kept(trained, stacks.num_clients, batch.idle):
            optimizer.step()
        self._model.clamp_temperature()
        for parameter in trained:
            parameter.grad = None
        return losses.detach()

    def _tokenize_classes(self) -> None:
        """Tokenize the class prompts once, where each client embeds them in every step."""
        model = self._model
        needed = model.task.name == "zero_shot" and not model.text_is_frozen
        if needed and self._class_tokens is None:
            tokens = model.tokenize(class_prompts(model.class_names, model.templates))
            self._class_tokens = {key: value.to(model.device) for key, value in tokens.items()}

    def _stacks_for(self, num_clients: int) -> Stacks:
        if num_clients not in self._stacks:
            self._stacks[num_clients] = build_stacks(self._model, num_clients)
        return self._stacks[num_clients]

    def _optimizer_for(
        self, stacks: Stacks, names: frozenset[str], trained: list[nn.Parameter]
    ) -> torch.optim.Optimizer:
        key = stacks.num_clients, names
        if key not in self._optimizers:
            self._optimizers[key] = build_optimizer(trained, self._settings)
        reset_optimizer(self._optimizers[key])
        return self._optimizers[key]


@contextlib.contextmanager
def _kept(stacks: Sequence[nn.Parameter], num_clients: int, idle: Sequence[int]) -> Iterator[None]:
    """Keep the values of idle clients while the optimizer steps: a zero gradient still moves Adam."""
    if not idle:
        yield
        return
    clients = torch.tensor(idle).to(stacks[0].device, non_blocking=True)
    rows = [by_client(stack.detach(), num_clients) for stack in stacks]
    before = [row.index_select(0, clients) for row in rows]
    yield
    for row, kept in zip(rows, before, strict=True):
        row.index_copy_(0, clients, kept)

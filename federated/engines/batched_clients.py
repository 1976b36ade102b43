"""Which clients of a cohort train together, and where their results wait.

The in-process grid shows ``BatchedClients`` a batch of training messages before the clients run. It sorts
them into groups; when a client asks for its local training (``BatchedClients.train``), the first of a group
trains all of it and the others find their result. The ClientApp and the messages are those of any other run.

A group that cannot train together (an image that cannot be read, say) leaves its clients to train one by one,
so that only the one at fault fails.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import torch
from flwr.app import Context, Message, MessageType, RecordDict

from federated.communication.messages import SERVER_ROUND
from federated.communication.payload import CONFIG
from federated.config.schema import ClientSection
from federated.config.seeding import generator, scoped_torch_rng
from federated.data.batch_order import steps_per_epoch
from federated.engines.batched_losses import KNOWN_LOSSES
from federated.engines.batched_training import JointTrainer
from federated.methods import ClientRules
from federated.rounds.batches import local_batches
from federated.rounds.client import receive_message
from federated.rounds.local_training import Assignment, LocalResult, train_locally
from federated.rounds.run import Run
from lora.batched import obstacle
from models.errors import UserError
from models.state import State
from models.training import Batch

log = logging.getLogger(__name__)

SUPPORTED = {
    "local_steps", "batch_size", "optimizer", "momentum", "learning_rate", "weight_decay", "warmup_steps",
    "warmup_ratio", "schedule", "clip_norm", "precision", "augmentation",
}  # fmt: skip
"""Keys of ``client`` that this way of training knows; any other must be at its default."""

CANDIDATES = (4, 8, 16, 32)
"""Group sizes that ``auto`` tries."""

GAIN_NEEDED = 0.95
"""``auto`` batches clients if a client's step then takes at most this share of its time alone."""


def one_by_one_because(run: Run) -> str | None:
    """Say why a run's clients cannot be trained together; None if they can."""
    client = run.config.client
    for name, setting in ClientSection.model_fields.items():
        if name not in SUPPORTED and getattr(client, name) != setting.default:
            return f"client.{name} is set"
    if client.precision == "fp16":
        return "client.precision=fp16 scales the loss of one client at a time (bf16 does not)"
    if run.aggregator.client != ClientRules():
        return f"aggregation.name={run.aggregator.name} has rules of its own for clients"
    if run.model.task.loss not in KNOWN_LOSSES:
        return f"task.name={run.model.task.name} has a loss of its own"
    return obstacle(run.model)


def batched_clients(run: Run) -> BatchedClients | None:
    """Return the grid's hook for ``engine.batched_clients``; None where clients train one by one."""
    wanted = run.config.engine.batched_clients
    if wanted == "off":
        return None
    if reason := one_by_one_because(run):
        level = logging.INFO if wanted == "auto" else logging.WARNING
        log.log(level, "engine.batched_clients=%s: clients train one by one, since %s", wanted, reason)
        return None
    trainer = JointTrainer(run.model, run.training_settings)
    size = measured_group_size(run, trainer) if wanted == "auto" else wanted
    return None if size is None else BatchedClients(run, trainer, size)


@dataclass(frozen=True, eq=False)
class Member:
    """A client of a group, with the message that it will get and a copy of what it remembers."""

    assignment: Assignment
    message: Message
    context: Context


class BatchedClients:
    """Prepares the local training of a cohort in groups.

    Args:
        run: The run.
        trainer: Trains a group.
        group_size: The most clients that train together.
    """

    def __init__(self, run: Run, trainer: JointTrainer, group_size: int) -> None:
        self._run = run
        self._trainer = trainer
        self._group_size = group_size
        self._prepared: dict[tuple[int, int], Callable[[], LocalResult | None]] = {}  # (round, client id)

    def __call__(self, messages: Sequence[Message], contexts: Sequence[Context]) -> None:
        """Note which clients will train in a group.

        Args:
            messages: About to be run; other than training messages are passed over.
            contexts: Of the clients they are addressed to; not changed.
        """
        run = self._run
        self._prepared.clear()
        members = [
            _member(message, context)
            for message, context in zip(messages, contexts, strict=True)
            if message.metadata.message_type == MessageType.TRAIN
        ]
        times = Counter(member.assignment.client_id for member in members)
        members = [
            m
            for m in members
            if times[m.assignment.client_id] == 1 and run.num_examples(m.assignment.client_id)
        ]
        # Neighbours have batches of about one size, so that little is filled up.
        members.sort(key=lambda m: (batch_rows(run, m.assignment.client_id), m.assignment.client_id))
        for group in split_evenly(members, self._group_size):
            training = GroupTraining(run, self._trainer, group)
            for member in group:
                key = (member.assignment.server_round, member.assignment.client_id)
                self._prepared[key] = training.taker(member.assignment.client_id)

    def train(self, run: Run, assignment: Assignment, held: State) -> LocalResult:
        """Return what a client's local training gives: from its group's, or of its own where it has none."""
        take = self._prepared.pop((assignment.server_round, assignment.client_id), None)
        result = None if take is None else take()
        return train_locally(run, assignment, held) if result is None else result


@dataclass(eq=False)
class GroupTraining:
    """The local training of one group, done when the first of its clients asks for it."""

    run: Run
    trainer: JointTrainer
    members: Sequence[Member]
    results: dict[int, LocalResult] | None = field(default=None, init=False)

    def taker(self, client_id: int) -> Callable[[], LocalResult | None]:
        """Return a function that gives this client's result, once; None where the group could not train."""

        def take() -> LocalResult | None:
            if self.results is None:
                self.results = {}  # should training raise, the others train alone
                self.results = self._train()
            return self.results.pop(client_id, None)

        return take

    def _held(self) -> list[State]:
        """Receive every member's message; a broadcast once, where clients hold nothing of their own."""
        run = self.run
        held: list[State] = []
        taken: dict[int, State] = {}
        for place, member in enumerate(self.members):
            key = place if run.aggregator.clients_remember else id(member.message.content)
            if key not in taken:
                _, taken[key] = receive_message(run, member.message, member.context)
            held.append(taken[key])
        return held

    def _train(self) -> dict[int, LocalResult]:
        run, clients = self.run, [member.assignment for member in self.members]
        num_steps = [run.clients.local_steps] * len(clients)
        try:
            held = self._held()
            trains = run.aggregator.trains(held[0], clients[0].server_round)
            batches = [client_batches(run, client) for client in clients]
            joint = self.trainer.train(held, batches, num_steps, trains)
        except (UserError, torch.OutOfMemoryError) as error:
            log.warning("clients %s train one by one: %s", [client.client_id for client in clients], error)
            return {}
        return {
            client.client_id: LocalResult(
                state=state,
                train_loss=loss,
                num_examples=run.num_examples(client.client_id),
                next_rank=None,
            )
            for client, state, loss in zip(clients, joint.states, joint.train_losses, strict=True)
        }


def client_batches(run: Run, assignment: Assignment) -> Iterable[Batch]:
    """Return the very batches that ``train_locally`` would give this client."""
    rng = generator(run.clients.seed, "client", assignment.server_round, assignment.client_id)
    with scoped_torch_rng(rng):  # draws from rng first, as it does there
        pass
    return local_batches(
        run,
        assignment.client_id,
        run.clients.local_steps,
        rng,
        server_round=assignment.server_round,
    )


def batch_rows(run: Run, client_id: int) -> int:
    """Return the most rows that a local step of this client sees."""
    num_rows = run.num_examples(client_id)
    return math.ceil(num_rows / steps_per_epoch(num_rows, run.clients.batch_size))


def split_evenly(members: Sequence[Member], most: int) -> list[Sequence[Member]]:
    """Cut a list into as few parts of at most ``most`` as possible, of sizes that differ by at most one."""
    if not members:
        return []
    cuts = np.array_split(np.arange(len(members)), math.ceil(len(members) / most))
    return [members[cut[0] : cut[-1] + 1] for cut in cuts]


def _member(message: Message, context: Context) -> Member:
    """Note a message; what receiving it changes must not reach the client's own context."""
    config = message.content.config_records[CONFIG]
    client_id = int(cast(int, context.node_config["partition-id"]))
    copy = Context(
        context.run_id,
        context.node_id,
        dict(context.node_config),
        RecordDict(dict(context.state)),
        dict(context.run_config),
    )
    return Member(Assignment(client_id, int(cast(int, config[SERVER_ROUND]))), message, copy)


# ---- engine.batched_clients=auto


def measured_group_size(run: Run, trainer: JointTrainer, *, repeats: int = 3) -> int | None:
    """Time a client's local step alone and in groups; return the best size, None where alone is best.

    Uses the first clients' own rows on random streams of a round 0 that no training has, and puts the model's
    values back, so that the run that follows is the same with and without it.

    Args:
        run: The run.
        trainer: Would train the groups.
        repeats: Times that each way is timed, in turn; the fastest counts.
    """
    ids = [i for i in range(run.num_clients) if run.num_examples(i)]
    sizes = [size for size in CANDIDATES if size <= min(len(ids), run.config.cohort_size)]
    if not sizes:
        log.info(
            "engine.batched_clients=auto: one by one, the cohort has fewer than %d clients", CANDIDATES[0]
        )
        return None
    batches = [next(iter(client_batches(run, Assignment(i, 0)))) for i in ids[: sizes[-1]]]
    before, model = run.model.get_state(), run.model
    trains = run.aggregator.trains(before, 1)

    def alone() -> int:
        model.start_training(run.training_settings, len(batches))
        for batch in batches[: CANDIDATES[0]]:
            model.train_step(batch)
        return CANDIDATES[0]

    def together(size: int) -> int:
        trainer.train([before] * size, [[batch] for batch in batches[:size]], [1] * size, trains)
        return size

    ways: dict[int, Callable[[], int]] = {1: alone} | {size: partial(together, size) for size in sizes}
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(repeats + 1):  # the first builds stacks and optimizers, and counts only if it is best
        for size, way in ways.items():
            seconds[size] = min(seconds[size], _seconds_per_client(way))
    model.set_state(before)
    best = min(sizes, key=lambda size: seconds[size])
    chosen = best if seconds[best] <= GAIN_NEEDED * seconds[1] else None
    timings = ", ".join(f"{size}: {1e3 * value:.1f}" for size, value in seconds.items())
    log.info(
        "engine.batched_clients=auto: %s (ms a client's step by clients at once: %s)",
        "one by one" if chosen is None else f"{chosen} clients at once",
        timings,
    )
    return chosen


def _seconds_per_client(way: Callable[[], int]) -> float:
    """Time one call, which ends when the device is done: both ways read their losses from it."""
    started = time.perf_counter()
    num_clients = way()
    return (time.perf_counter() - started) / num_clients

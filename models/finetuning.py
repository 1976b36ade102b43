"""Fine-tuning strategies: which weights of a CLIP train, and thereby travel.

Consulted once, when a `FederatedCLIPModel` is constructed. (LoRA injection names anew what travels.)
A new strategy is one row of STRATEGIES.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from models.errors import UserError
from models.tasks import Task
from models.towers import Towers


@dataclass(frozen=True)
class FineTuning:
    """What one strategy trains, which is also what it sends.

    Attributes:
        towers: Towers that train, with their projections ("vision", "text").
        temperature: Whether logit_scale trains.
        head: Whether the head trains, where the task has one and train_head is on.
        summary: One line for tables and error messages.
    """

    towers: tuple[str, ...]
    temperature: bool
    head: bool
    summary: str


STRATEGIES: dict[str, FineTuning] = {
    "full": FineTuning(("vision", "text"), True, True, "every weight trains and travels"),
    "head_only": FineTuning((), False, True, "the linear head trains and travels"),
    "vision_and_projection": FineTuning(
        ("vision",), True, True, "vision tower, its projection, temperature and head train and travel"
    ),
    "text_and_projection": FineTuning(
        ("text",), True, False, "text tower, its projection and temperature train and travel"
    ),
    "lora": FineTuning((), False, True, "CLIP is frozen; adapters (once injected) and head train and travel"),
}
"""Strategy name -> what trains. Under task=classification "full" sends the text tower too, as plain
FedAvg of a CLIP does, though the loss does not reach it; "vision_and_projection" is the dense
baseline that sends only what learns."""


def trains(choice: FineTuning, name: str, towers: Towers, *, train_head: bool) -> bool:
    """Whether a parameter trains.

    Args:
        choice: The strategy.
        name: Parameter name in a federated model ("clip.…" or "head.…").
        towers: Where the towers are inside the CLIP.
        train_head: Whether the user wants the head trained.
    """
    if name.startswith("head."):
        return choice.head and train_head
    tower = towers.tower_of(name.removeprefix("clip."))
    return tower in choice.towers if tower else choice.temperature


def check_strategy(strategy: str, task: Task, dtype: torch.dtype, *, train_head: bool) -> None:
    """Refuse strategies that would train what the task's loss never reaches, or nothing, or too coarsely.

    Raises:
        UserError: Names both settings and the way out.
    """
    choice = STRATEGIES[strategy]
    if choice.towers and dtype != torch.float32:
        raise UserError(
            f"strategy={strategy} trains CLIP's weights, and small updates vanish in {dtype} weights: use "
            "dtype float32 (with precision=bf16 for speed), or strategy=lora"
        )
    if choice.towers == ("text",) and not task.uses_text:
        raise UserError(
            f"strategy={strategy} trains the text tower, which the loss of task={task.name} does not reach: "
            "choose task=zero_shot or task=retrieval"
        )
    head_trains = choice.head and train_head and task.uses_head
    if not choice.towers and not head_trains and strategy != "lora":
        raise UserError(
            f"strategy={strategy} ({choice.summary}) trains nothing under task={task.name} with "
            f"train_head={train_head}: choose another strategy, task or train_head"
        )


def check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones.

    Raises:
        UserError: Names the key and lists the choices.
    """
    if value not in allowed:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(allowed)}")

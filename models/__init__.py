"""Federated CLIP models: towers, head, tasks, training.

The names are resolved at first use, so that `models.errors` does not cost the import of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy_names import at_first_use

if TYPE_CHECKING:
    from models.clip import STRATEGIES, FederatedCLIPModel
    from models.clip_loading import load_clip
    from models.errors import UserError
    from models.images import ImageProcessor
    from models.state import State
    from models.tasks import TASKS, Task
    from models.towers import LoadedCLIP, Towers
    from models.training import Batch, LocalTrainer, TrainingSettings

__all__ = [
    "STRATEGIES",
    "TASKS",
    "Batch",
    "FederatedCLIPModel",
    "ImageProcessor",
    "LoadedCLIP",
    "LocalTrainer",
    "State",
    "Task",
    "Towers",
    "TrainingSettings",
    "UserError",
    "load_clip",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "clip": ("STRATEGIES", "FederatedCLIPModel"),
    "errors": ("UserError",),
    "images": ("ImageProcessor",),
    "loading": ("load_clip",),
    "state": ("State",),
    "tasks": ("TASKS", "Task"),
    "towers": ("LoadedCLIP", "Towers"),
    "training": ("Batch", "LocalTrainer", "TrainingSettings"),
}

__getattr__ = at_first_use(__name__, _HOMES)

"""Federated fine-tuning in which only LoRA adapters travel: ``run`` a configuration, look at what it left.

The names are resolved at first use, so that importing the package costs neither torch nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy_names import at_first_use

if TYPE_CHECKING:
    from federated.config.schema import ExperimentConfig, load_config
    from federated.tools.front_door import RunResult, open_run, run

__all__ = ["ExperimentConfig", "RunResult", "load_config", "open_run", "run"]

_HOMES: dict[str, tuple[str, ...]] = {
    "config.schema": ("ExperimentConfig", "load_config"),
    "tools.front_door": ("RunResult", "open_run", "run"),
}

__getattr__ = at_first_use(__name__, _HOMES)

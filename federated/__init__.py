"""Federated fine-tuning in which only LoRA adapters travel: ``run`` a configuration, look at what it left.

The names are resolved at first use, so that importing the package costs neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from federated.config.schema import ExperimentConfig, load_config
    from federated.tools.front_door import RunResult, open_run, run

__all__ = ["ExperimentConfig", "RunResult", "load_config", "open_run", "run"]

_HOMES = {
    "config.schema": ("ExperimentConfig", "load_config"),
    "tools.front_door": ("RunResult", "open_run", "run"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"federated.{module}"), name)
    raise AttributeError(f"module 'federated' has no attribute {name!r}")

"""Federated fine-tuning in which only LoRA adapters travel: ``run`` a configuration, look at what it left.

The ``register_…`` functions add aggregators, codecs, data sources, partitioners and model families from
outside (``models.tasks.register_task``: tasks).

The names are resolved at first use, so that importing the package costs neither torch nor pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy_names import at_first_use

if TYPE_CHECKING:
    from federated.communication.codings import register_coding
    from federated.communication.sparsifiers import register_selection
    from federated.config.config_files import load_config
    from federated.config.plugins import load_plugins
    from federated.config.schema import ExperimentConfig
    from federated.data.partitioners import register_partitioner
    from federated.data.sources.source_registry import register_source
    from federated.methods.registry import register_aggregator
    from federated.methods.server_optimizers import register_server_optimizer
    from federated.results.callbacks import Callback
    from federated.rounds.families import register_model_family
    from federated.tools.export import export_model
    from federated.tools.front_door import RunResult, open_run, resume, run
    from federated.tools.predictor import Predictor

__all__ = [
    "Callback",
    "ExperimentConfig",
    "Predictor",
    "RunResult",
    "export_model",
    "load_config",
    "load_plugins",
    "open_run",
    "register_aggregator",
    "register_coding",
    "register_model_family",
    "register_partitioner",
    "register_selection",
    "register_server_optimizer",
    "register_source",
    "resume",
    "run",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "federated.communication.codings": ("register_coding",),
    "federated.communication.sparsifiers": ("register_selection",),
    "federated.config.plugins": ("load_plugins",),
    "federated.config.config_files": ("load_config",),
    "federated.config.schema": ("ExperimentConfig",),
    "federated.data.partitioners": ("register_partitioner",),
    "federated.data.sources.source_registry": ("register_source",),
    "federated.methods.registry": ("register_aggregator",),
    "federated.methods.server_optimizers": ("register_server_optimizer",),
    "federated.rounds.families": ("register_model_family",),
    "federated.tools.export": ("export_model",),
    "federated.results.callbacks": ("Callback",),
    "federated.tools.front_door": ("RunResult", "open_run", "resume", "run"),
    "federated.tools.predictor": ("Predictor",),
    "models.tasks": ("register_task",),
}

__getattr__ = at_first_use(__name__, _HOMES)

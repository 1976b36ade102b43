"""What a run writes once: its partition, the trained weights, the number of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from federated.communication.savings import ModelSizes
from federated.data.partition import save_partition
from federated.rounds.run import Run
from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
from lora.adapters import is_adapter_parameter, unwrap
from lora.verify import count_parameters
from models.state import layout_of, num_values

BYTES_PER_FP32 = 4


def save_clients_rows(run: Run, path: Path) -> None:
    """Write ``partition.json``."""
    labels = run.data.labels() if run.data.label_column else None
    save_partition(run.partition, path, labels, run.data.class_names)


def save_adapter(
    run: Run,
    folder: Path,
    *,
    server_round: int,
    final: float | None,
    products: Mapping[str, Sequence[Tensor]] | None = None,
) -> None:
    """Write the global adapter in PEFT's format, or the full model where there are no adapters.

    Args:
        run: Whose model holds the weights.
        folder: Committed whole.
        server_round: The round that the weights are of.
        final: Its headline metric, if there is one.
        products: What was merged into each base weight.
    """
    about: dict[str, Any] = {
        "server_round": server_round,
        "metrics": {} if final is None else {run.headline_metric: final},
    }
    if run.config.uses_adapters:
        save_lora_adapters(run.model, folder, products=products, notes=run.notes, **about)
    else:
        save_full_checkpoint(run.model, folder, notes=run.notes, **about)


def parameter_counts(run: Run) -> dict[str, int]:
    """Return how many parameters there are, train, and travel up in some round; private parts do not."""
    counts, state = count_parameters(run.model), run.wire_state()
    names = {name for r in (1, 2) for name in run.aggregator.uplink(state, r)}
    exchanged = layout_of({name: state[name] for name in sorted(names)})
    return {"total": counts["total"], "trainable": counts["trainable"], "exchanged": num_values(exchanged)}


def model_sizes(run: Run) -> ModelSizes:
    """Return what one transfer costs in other ways of training, in fp32 bytes."""
    full = count_parameters(run.model)["base"]  # the head included, adapters not
    named = unwrap(run.model).named_parameters()
    head = sum(p.numel() for name, p in named if name.startswith("head.") and not is_adapter_parameter(name))
    preinstalled = run.config.communication.base_preinstalled
    return ModelSizes(
        full_model_bytes=full * BYTES_PER_FP32,
        head_bytes=head * BYTES_PER_FP32 if head else None,
        base_bytes=0 if preinstalled else (full - head) * BYTES_PER_FP32,
        ships_base=not run.config.uses_adapters and run.config.model.fine_tuning in (None, "full"),
    )

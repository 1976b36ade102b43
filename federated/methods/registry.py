"""The aggregators by the names that configurations use."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from federated.config.choices import Choice, build
from federated.methods.dual import dual
from federated.methods.fed_sb import fed_sb
from federated.methods.fedavg import fedavg
from federated.methods.fedex import fedex
from federated.methods.fedsa import fedsa
from federated.methods.fedsvd import fedsvd
from federated.methods.ffa import ffa
from federated.methods.flexlora import flexlora
from federated.methods.flora import flora
from federated.methods.hetlora import hetlora
from federated.methods.lora_fair import lora_fair
from federated.methods.protocol import Aggregator
from federated.methods.rolora import rolora
from models.registration import registering

AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "fedavg": fedavg,
    "ffa": ffa,
    "rolora": rolora,
    "flora": flora,
    "fedex": fedex,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "fedsa": fedsa,
    "lora_fair": lora_fair,
    "fedsvd": fedsvd,
    "fed_sb": fed_sb,
    "dual": dual,
}

register_aggregator = registering("aggregator", AGGREGATORS)
"""``@register_aggregator("name")`` adds a function (*, options) -> Aggregator."""

AGGREGATOR = Choice("aggregator", "aggregation.name", "aggregation.options")


def aggregator_from_name(name: str, options: Mapping[str, Any], *, seed: int = 0) -> Aggregator:
    """Return an aggregator.

    Args:
        name: A key of ``AGGREGATORS``.
        options: Its own.
        seed: The run's; for aggregators that draw factors, unless ``options`` has a seed.

    Raises:
        UserError: There is no such aggregator or option, or a value is out of range.
    """
    draws = name in AGGREGATORS and "seed" in inspect.signature(AGGREGATORS[name]).parameters
    return build(AGGREGATORS, AGGREGATOR, name, {"seed": seed, **options} if draws else options)

"""Which settings of a PEFT adapter are honoured here, which cannot matter, and which are refused by name.

Read when an adapter folder is opened. An adapter is B @ A on top of weights that are not changed otherwise:
whatever computes something else, or starts from changed base weights, would give other outputs in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig

from models.errors import UserError

HONOURED = frozenset({
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "lora_dropout", "bias", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "init_lora_weights",
})  # fmt: skip
"""Keys whose value is used, or compared with the model's."""

WITHOUT_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config",  # how a start was made: init_lora_weights
    "megatron_core", "qalora_group_size",  # of megatron_config and use_qalora, which are refused
})  # fmt: skip
"""Keys that cannot change what saved factors compute."""

REFUSED = frozenset({
    "fan_in_fan_out", "modules_to_save", "megatron_config", "trainable_token_indices", "use_dora",
    "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication",
    "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying",
})  # fmt: skip
"""Keys of PEFT's LoraConfig that must have their default."""

_BASE_KEPT = ("gaussian", "eva", "orthogonal", "mica")
"""Named starts that leave the base weights alone; True and False do so as well."""
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


def check_peft_settings(source: str, settings: Mapping[str, Any]) -> None:
    """Refuse an adapter configuration that says more than plain LoRA on unchanged base weights.

    Args:
        source: The file, for messages.
        settings: Its content.

    Raises:
        UserError: A key that is refused or unknown differs from its default, or the start that the adapter
            was made with changes the base weights.
    """
    harmless = HONOURED | WITHOUT_EFFECT
    unsupported = sorted(k for k, v in settings.items() if k not in harmless and v and v != _default(k))
    if unsupported:
        raise UserError(f"{source}: {unsupported} cannot be loaded here; merge that adapter in PEFT first")
    start = settings.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and start not in _BASE_KEPT:
        reason = "changes the base weights" if _CHANGES_BASE.match(str(start)) else "is not known here"
        raise UserError(
            f"{source}: init_lora_weights={start!r} {reason}, which saved factors do not hold; merge that "
            "adapter in PEFT, or convert it (save_pretrained's path_initial_model_for_weight_conversion)"
        )


def _default(key: str) -> Any:
    for field in fields(LoraConfig):
        if field.name == key:
            return field.default if field.default_factory is MISSING else field.default_factory()
    return None

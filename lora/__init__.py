"""LoRA adapters for federated models: inject, switch, merge, count, save, load.

The names are resolved at first use, so that ``lora.config`` does not cost the import of torch and PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.lazy_names import at_first_use

if TYPE_CHECKING:
    from lora.adapter_saving import save_full_checkpoint, save_lora_adapters
    from lora.adapters import (
        get_lora_state_dict,
        set_lora_state_dict,
    )
    from lora.clip_wrapper import CLIPLoRAWrapper
    from lora.config import LoRAConfig
    from lora.factory import create_model, load_model_with_lora, quick_clip_lora
    from lora.gradient_checkpointing import disable_gradient_checkpointing, enable_gradient_checkpointing
    from lora.injection import apply_lora_to_text_encoder, inject_lora
    from lora.loading import load_full_checkpoint, load_lora_adapters
    from lora.lora_layer import LoRALayer
    from lora.multi_task import MultiTaskCLIP
    from lora.named import (
        compare_embeddings,
        list_adapters,
        load_named_adapter,
        remove_adapter,
        set_active_adapter,
    )
    from lora.split_attention import add_lora_to_attention_block
    from lora.switching import (
        disable_lora,
        enable_lora,
        merge_and_unload,
        merge_lora,
        unmerge_lora,
    )
    from lora.verify import check_lora_injection, count_parameters, print_parameter_stats, verify_gradients

__all__ = [
    "CLIPLoRAWrapper",
    "LoRAConfig",
    "LoRALayer",
    "MultiTaskCLIP",
    "add_lora_to_attention_block",
    "apply_lora_to_text_encoder",
    "check_lora_injection",
    "compare_embeddings",
    "count_parameters",
    "create_model",
    "disable_gradient_checkpointing",
    "disable_lora",
    "enable_gradient_checkpointing",
    "enable_lora",
    "get_lora_state_dict",
    "inject_lora",
    "list_adapters",
    "load_full_checkpoint",
    "load_lora_adapters",
    "load_model_with_lora",
    "load_named_adapter",
    "merge_and_unload",
    "merge_lora",
    "print_parameter_stats",
    "quick_clip_lora",
    "remove_adapter",
    "save_full_checkpoint",
    "save_lora_adapters",
    "set_active_adapter",
    "set_lora_state_dict",
    "unmerge_lora",
    "verify_gradients",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "lora.adapter_saving": (
        "save_full_checkpoint",
        "save_lora_adapters",
    ),
    "lora.adapters": (
        "get_lora_state_dict",
        "set_lora_state_dict",
    ),
    "lora.clip_wrapper": ("CLIPLoRAWrapper",),
    "lora.config": ("LoRAConfig",),
    "lora.factory": (
        "create_model",
        "load_model_with_lora",
        "quick_clip_lora",
    ),
    "lora.gradient_checkpointing": (
        "disable_gradient_checkpointing",
        "enable_gradient_checkpointing",
    ),
    "lora.injection": (
        "apply_lora_to_text_encoder",
        "inject_lora",
    ),
    "lora.loading": (
        "load_full_checkpoint",
        "load_lora_adapters",
    ),
    "lora.lora_layer": ("LoRALayer",),
    "lora.multi_task": ("MultiTaskCLIP",),
    "lora.named": (
        "compare_embeddings",
        "list_adapters",
        "load_named_adapter",
        "remove_adapter",
        "set_active_adapter",
    ),
    "lora.split_attention": ("add_lora_to_attention_block",),
    "lora.switching": (
        "disable_lora",
        "enable_lora",
        "merge_and_unload",
        "merge_lora",
        "unmerge_lora",
    ),
    "lora.verify": (
        "check_lora_injection",
        "count_parameters",
        "print_parameter_stats",
        "verify_gradients",
    ),
}

__getattr__ = at_first_use(__name__, _HOMES)

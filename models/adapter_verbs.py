"""AdapterVerbs: what `lora` does to a model, as methods of the model.

The functions are looked up by name at the call: this package imports nothing of `lora`, which stands above.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from models.state import State


class AdapterVerbs:
    """One line a method; the function of the same name in `lora` says what it does."""

    def apply_lora_to_text_encoder(self, *args: Any, **options: Any) -> int:
        """Adapt the text tower alone; return the number of adapted blocks."""
        return int(_lora("injection").apply_lora_to_text_encoder(self, *args, **options))

    def enable_lora(self) -> None:
        """Switch the adapters on."""
        _lora("switching").enable_lora(self)

    def disable_lora(self) -> None:
        """Switch the adapters off."""
        _lora("switching").disable_lora(self)

    def merge_lora(self) -> None:
        """Fold the adapters into the base weights."""
        _lora("switching").merge_lora(self)

    def unmerge_lora(self) -> None:
        """Take merged adapters out of the base weights."""
        _lora("switching").unmerge_lora(self)

    def get_lora_state_dict(self) -> State:
        """Copy the factors, by wire name."""
        return _lora("adapters").get_lora_state_dict(self)

    def load_lora_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy factors into the model."""
        _lora("adapters").set_lora_state_dict(self, state)

    def lock_image_tower(self) -> None:
        """Let the vision tower's base weights neither train nor travel."""
        _lora("switching").lock_tower(self, "vision")

    def lock_text_tower(self) -> None:
        """Let the text tower's base weights neither train nor travel."""
        _lora("switching").lock_tower(self, "text")

    def set_grad_checkpointing(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002 - open_clip's signature
        """Recompute activations in the backward pass, or keep them."""
        verb = "enable_gradient_checkpointing" if enable else "disable_gradient_checkpointing"
        getattr(_lora("gradient_checkpointing"), verb)(self)


def _lora(module: str) -> Any:
    return import_module(f"lora.{module}")

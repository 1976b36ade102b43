"""LoRAWrapper: what every federated model shares once it is wrapped with LoRA.

Wrapped or not, a model has the same verbs (get_parameters, set_parameters, train_step, evaluate, ...), so
that client, server and training loop do not know whether LoRA is on. The wrapper holds the federated model
and delegates; it copies nothing. What changes is what travels: adapters and the trained head only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from lora import adapters, switching
from lora.config import LoRAConfig
from lora.gradient_checkpointing import disable_gradient_checkpointing, enable_gradient_checkpointing
from lora.injection import BeforeLoRA, inject_lora
from models.errors import UserError
from models.state import State


class LoRAWrapper(nn.Module):
    """A federated model with LoRA. Whatever is not defined here is looked up on the federated model.

    Attributes:
        federated_model: The wrapped model.
        lora_config: What is adapted.
        seed: Seed of the draw of lora_A.
    """

    federated_model: Any

    def __init__(
        self, federated_model: nn.Module, lora_config: LoRAConfig | None = None, *, seed: int = 0
    ) -> None:
        """Hold the model; nothing changes before `apply_lora_to_federated_model`.

        Args:
            federated_model: The model to wrap; used in place, not copied.
            lora_config: What to adapt; the defaults of LoRAConfig if left out.
            seed: Seeds the draw of lora_A; every client and the server must use the same.
        """
        super().__init__()
        self.federated_model = federated_model
        self.lora_config = lora_config or LoRAConfig()
        self.seed = seed
        self._before: BeforeLoRA | None = None
        self._probe: tuple[Any, ...] = ()  # one adapted layer: whether it is merged is asked at every step

    def __getattr__(self, name: str) -> Any:
        """Fall back to the federated model: `wrapper.clip`, `wrapper.encode_text`, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "federated_model":
                raise
            return getattr(super().__getattr__("federated_model"), name)

    def __repr__(self) -> str:
        """One line: the model and its adapters."""
        config = self.lora_config
        adapted = f"r={config.r}, lora_alpha={config.lora_alpha:g}, {'+'.join(config.target_components)}"
        return f"{type(self).__name__}({self.federated_model!r}, {adapted})"

    def apply_lora_to_federated_model(self) -> Self:
        """Inject the adapters, freeze the base model, name what travels. Without effect if not `enabled`.

        Raises:
            UserError: applied twice, or nothing matches the targets.
        """
        if self.lora_config.enabled:
            before = BeforeLoRA.of(self.federated_model)
            inject_lora(self.federated_model, self.lora_config, seed=self.seed)
            self._before = before
            self._probe = tuple(layer for _, layer in adapters.adapter_layers(self.federated_model)[:1])
        return self

    @property
    def is_applied(self) -> bool:
        """Whether the federated model carries adapters."""
        return bool(adapters.adapter_layers(self.federated_model))

    def enable_lora_layers(self) -> None:
        """Switch the adapters on."""
        switching.enable_lora(self.federated_model)

    def disable_lora_layers(self) -> None:
        """Switch the adapters off: the base model, exactly (with the head as it is)."""
        switching.disable_lora(self.federated_model)

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in training."""
        enable_gradient_checkpointing(self.federated_model)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        disable_gradient_checkpointing(self.federated_model)

    def merge_and_unload(self) -> nn.Module:
        """Merge the adapters for good and return the plain federated model.

        What trains and what travels is again what it was before LoRA was applied.
        """
        model: Any = switching.merge_and_unload(self.federated_model)
        self._probe = ()
        if self._before is not None:
            self._before.restore(model)
            self._before = None
        return model

    def get_parameters(self) -> list[np.ndarray]:
        """Adapters and trained head, in the order of `exchanged_names`; never the base model."""
        return self.federated_model.get_parameters()

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        """Copy adapters and trained head into the model; the counterpart of `get_parameters`."""
        self.federated_model.set_parameters(parameters)

    def get_state(self) -> State:
        """The same values as `get_parameters`, by wire name."""
        return self.federated_model.get_state()

    def set_state(self, state: State, **options: Any) -> None:
        """Copy named values into the model; options are those of the federated model (`partial=True`)."""
        self.federated_model.set_state(state, **options)

    def forward(self, data: torch.Tensor | Mapping[str, Any]) -> torch.Tensor:
        """Logits of a batch, as the federated model gives them."""
        return self.federated_model(data)

    def train_step(
        self, data: torch.Tensor | Mapping[str, Any], labels: torch.Tensor | None = None, **options: Any
    ) -> float:
        """One optimizer step on one batch; returns the loss. Options are the federated model's.

        Raises:
            UserError: the adapters are merged or disabled, so that the step could not train them.
        """
        if any(layer.merged or layer.disable_adapters for layer in self._probe):
            raise UserError(
                "the adapters are merged or disabled, so a step would not train them; "
                "call unmerge_lora() or enable_lora() first"
            )
        return self.federated_model.train_step(data, labels, **options)

    def evaluate(
        self,
        data: torch.Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]],
        labels: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Loss, metrics of the task and number of examples, of one batch or of an iterable of batches."""
        return self.federated_model.evaluate(data, labels)

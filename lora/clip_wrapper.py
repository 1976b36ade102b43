"""CLIPLoRAWrapper: a FederatedCLIPModel with adapters in the towers of your choice.

Built once, before round 1. It chooses the towers and the head; everything else is delegation
(`lora.wrapper`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora.config import LoRAConfig
from lora.wrapper import LoRAWrapper
from models.errors import UserError


class CLIPLoRAWrapper(LoRAWrapper):
    """Same interface as the federated model; only adapters, and the head if it trains, train and travel."""

    def __init__(
        self,
        federated_clip_model: nn.Module,
        lora_config: LoRAConfig | None = None,
        target_components: Sequence[str] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Hold the model; nothing changes before `apply_lora_to_federated_model`.

        Args:
            federated_clip_model: A FederatedCLIPModel; used in place, not copied.
            lora_config: What to adapt; the defaults of LoRAConfig if left out.
            target_components: Overrides the config's: any of "encoder" (both towers), "vision", "text" and
                "classifier" (the head gets an adapter instead of training itself).
            seed: Seeds the draw of lora_A; every client and the server must use the same.

        Raises:
            UserError: the model is no federated CLIP.
        """
        if not isinstance(getattr(federated_clip_model, "clip", None), nn.Module):
            raise UserError(
                f"federated_clip_model is a {type(federated_clip_model).__name__} without a CLIP inside; "
                "pass a models.clip.FederatedCLIPModel"
            )
        config = lora_config or LoRAConfig()
        if target_components is not None:
            config = LoRAConfig(**{**config.model_dump(), "target_components": list(target_components)})
        super().__init__(federated_clip_model, config, seed=seed)

    @property
    def target_components(self) -> list[str]:
        """What gets adapters."""
        return list(self.lora_config.target_components)

"""VQALoRAWrapper: a FederatedVQAModel with adapters in the text encoder, the vision tower, or both.

Built once, before round 1. It turns the documented flags into a LoRAConfig; the rest is delegation
(`lora.wrapper`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora.config import LoRAConfig, TowerOverride
from lora.wrapper import LoRAWrapper
from models.errors import UserError
from models.vqa import FederatedVQAModel, check_recipe


class VQALoRAWrapper(LoRAWrapper):
    """Same interface as the federated model; adapters, and what its `head` holds, train and travel."""

    def __init__(
        self,
        federated_vqa_model: nn.Module,
        lora_config: LoRAConfig | None = None,
        *,
        seed: int = 0,
        **recipe: Any,
    ) -> None:
        """Hold the model; nothing changes before `apply_lora_to_federated_model`.

        Args:
            federated_vqa_model: A FederatedVQAModel; used in place, not copied.
            lora_config: What to adapt; what the recipe says if left out.
            seed: Seeds the draw of lora_A; every client and the server must use the same.
            **recipe: Arguments of `recipe_config`, over those that the model was made with.

        Raises:
            UserError: The model is no FederatedVQAModel, or text adapters meet unfrozen encoder layers.
        """
        if not isinstance(federated_vqa_model, FederatedVQAModel):
            raise UserError(
                f"federated_vqa_model is a {type(federated_vqa_model).__name__}: pass a "
                "models.vqa.FederatedVQAModel"
            )
        if lora_config is not None and recipe:
            raise UserError(f"{', '.join(recipe)} and lora_config both say what to adapt: leave one out")
        config = lora_config or recipe_config(**{**federated_vqa_model.recipe, **recipe})
        if config.enabled:
            check_recipe(federated_vqa_model.unfreeze_encoder_layers, config.target_components)
            if federated_vqa_model.decoder_kind != "lora":
                check_recipe(federated_vqa_model.unfreeze_encoder_layers, config.tower_names)
        super().__init__(federated_vqa_model, config, seed=seed)


def recipe_config(
    *,
    use_text_lora: bool = True,
    text_lora_r: int = 16,
    text_lora_alpha: float = 32,
    text_lora_dropout: float = 0.1,
    use_vision_lora: bool = False,
    vision_lora_r: int = 8,
    vision_lora_alpha: float = 16,
) -> LoRAConfig:
    """Return the settings that the flags of the documented recipe stand for.

    Args:
        use_text_lora: Adapt the text encoder.
        text_lora_r: Rank there.
        text_lora_alpha: The update there is scaled by alpha / r.
        text_lora_dropout: Dropout of the adapters' inputs.
        use_vision_lora: Adapt the vision tower.
        vision_lora_r: Rank there.
        vision_lora_alpha: Scaling there, likewise.

    Returns:
        A configuration; not `enabled` where nothing is adapted.
    """
    chosen = {"text": use_text_lora, "vision": use_vision_lora}
    towers = [tower for tower, is_on in chosen.items() if is_on]
    first = (text_lora_r, text_lora_alpha) if use_text_lora else (vision_lora_r, vision_lora_alpha)
    both = use_text_lora and use_vision_lora
    return LoRAConfig(
        r=first[0],
        lora_alpha=first[1],
        lora_dropout=text_lora_dropout,
        target_components=towers or ["text"],
        enabled=bool(towers),
        vision=TowerOverride(r=vision_lora_r, lora_alpha=vision_lora_alpha) if both else None,
    )

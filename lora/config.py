"""LoRAConfig: what is adapted, at which rank, with which scaling.

Read once when adapters are injected (before round 1); nothing looks at it during a round. It is the only
class that describes LoRA; `lora.lora_config` re-exports it under its documented import path.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685); the scaling of
`use_rslora` is Kalajdzievski, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Component = Literal["encoder", "vision", "text", "classifier"]
Bias = Literal["none", "all", "lora_only"]
TOWERS = ("vision", "text")
MAX_RANK = 8192
"""Largest rank: the width of the widest layer of any CLIP, beyond which factors gain nothing."""
MOST_ALPHA = 1e9
"""Largest numerator of the scaling: far beyond what trains, and far from what float32 cannot hold."""


class TowerOverride(BaseModel):
    """What one tower does differently; a field left out keeps the value of the LoRAConfig around it.

    Attributes:
        r: Rank of the factors in this tower.
        lora_alpha: Numerator of the scaling in this tower.
        lora_dropout: Dropout of the adapters in this tower.
        layers: Indices of the blocks to adapt in this tower.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    r: int | None = Field(default=None, ge=1, le=MAX_RANK)
    lora_alpha: int | float | None = Field(default=None, gt=0, le=MOST_ALPHA)
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    layers: list[int] | None = None


class LoRAConfig(BaseModel):
    """Settings of one adapter.

    Attributes:
        r: Rank of the factors, lora_A (r, d_in) and lora_B (d_out, r).
        lora_alpha: The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: Probability of dropping an input feature of the adapter while training.
        target_modules: Names of the layers to adapt, matched as suffixes inside the chosen towers. None takes
            the backend's default (`Towers.default_targets`; q_proj and v_proj for Hugging Face models).
        bias: "none", "lora_only" (biases of the adapted layers train and travel too) or "all" (every bias of
            the adapted towers).
        train_temperature: CLIP's log-temperature (logit_scale) trains, travels and is averaged too.
        save_only_trainable: Saved models hold adapters and head only, not the base model.
        target_components: "encoder" (both towers), "vision", "text", "classifier" (the head gets an adapter).
        enabled: False leaves the model as it is; the wrapper then only delegates.
        use_rslora: Rank-stabilised scaling.
        layers: Indices of the blocks to adapt, counted from 0 in each tower; None adapts all of them.
        vision: What the vision tower does differently.
        text: What the text tower does differently.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    r: int = Field(default=16, ge=1, le=MAX_RANK)
    lora_alpha: int | float = Field(default=32, gt=0, le=MOST_ALPHA)
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    target_modules: list[str] | None = None
    bias: Bias = "none"
    train_temperature: bool = False
    save_only_trainable: bool = True
    target_components: list[Component] = Field(default=["encoder"], min_length=1)
    enabled: bool = True
    use_rslora: bool = False
    layers: list[int] | None = None
    vision: TowerOverride | None = None
    text: TowerOverride | None = None

    @field_validator("target_modules")
    @classmethod
    def _targets_not_empty(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not value:
            raise ValueError("target_modules is an empty list; leave it out to take the model's default")
        return value

    @model_validator(mode="after")
    def _temperature_goes_with_a_tower(self) -> LoRAConfig:
        if self.train_temperature and not self.tower_names:
            raise ValueError(
                "train_temperature goes with adapters in a tower (a head alone scales its own logits): add "
                "vision, text or encoder to target_components, or leave train_temperature out"
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a setting if the whole then holds; what is injected already does not change.

        Raises:
            ValidationError: There is no such setting, or the value does not fit.
        """
        type(self)(**{**dict(self), name: value})
        super().__setattr__(name, value)

    @property
    def tower_names(self) -> tuple[str, ...]:
        """The towers that get adapters, in the order vision, text."""
        return tuple(t for t in TOWERS if t in self.target_components or "encoder" in self.target_components)

    @property
    def adapts_head(self) -> bool:
        """Whether the head gets an adapter instead of being trained itself."""
        return "classifier" in self.target_components

    def for_tower(self, tower: str) -> LoRAConfig:
        """This config with the overrides of `tower` applied ("head" has none)."""
        override = {"vision": self.vision, "text": self.text}.get(tower)
        changes = {} if override is None else override.model_dump(exclude_none=True)
        return self.model_copy(update=changes)

    @property
    def scaling(self) -> float:
        """Factor in front of B @ A: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def for_clip_model(cls, r: int = 16, lora_alpha: float = 32, **overrides: Any) -> LoRAConfig:
        """Adapters in both towers, on the backend's default layers."""
        return cls(**{"r": r, "lora_alpha": lora_alpha, "target_components": ["encoder"], **overrides})

    @classmethod
    def for_classification_head(cls, r: int = 8, lora_alpha: float = 16, **overrides: Any) -> LoRAConfig:
        """An adapter on the head alone; both towers stay frozen."""
        return cls(**{"r": r, "lora_alpha": lora_alpha, "target_components": ["classifier"], **overrides})

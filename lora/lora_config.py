"""The documented import path of LoRAConfig; the class lives in `lora.config`."""

from __future__ import annotations

from lora.config import LoRAConfig, TowerOverride

__all__ = ["LoRAConfig", "TowerOverride"]

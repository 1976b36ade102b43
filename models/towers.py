"""Where a model's towers are; and what every backend gives: a CLIP of two, and all that feeds it.

Before the first round `models.clip_loading` and `models.open_clip_backend` make a CLIP; from then on nothing
asks which of the two it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

Tokens = dict[str, Tensor]
"""input_ids (N, T) and attention_mask (N, T), both int64."""


@dataclass(frozen=True)
class Towers:
    """Where the towers live inside a CLIP, or inside another federated model.

    Attributes:
        backend: "huggingface" or "open_clip"; another family's own name.
        vision: Name prefixes, relative to the module, of the vision tower and its projection; none: there is
            no such tower.
        text: Likewise for the text tower.
        default_targets: Name suffixes of the layers that LoRA adapts when no target is given, in each tower
            those that it has.
    """

    backend: str
    vision: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    default_targets: tuple[str, ...] = ()

    def tower_of(self, name: str) -> str | None:
        """Tower of a module or parameter: "vision", "text", or None (the temperature).

        Args:
            name: Its dotted name relative to the CLIP module.
        """
        for tower, prefixes in (("vision", self.vision), ("text", self.text)):
            if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
                return tower
        return None


@dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP with all that is needed to feed it.

    Attributes:
        clip: The module; its log-temperature is `clip.logit_scale`.
        tokenize: Texts -> tokens, padded to the longest text only (padding after the end-of-text
            token cannot change a causal tower's output, and costs time).
        preprocess: PIL image of any mode and size -> (3, H, W) float32. Deterministic.
        encode_image: (clip, pixel values (B, 3, H, W)) -> projected features (B, D), not normalised.
        encode_text: (clip, tokens) -> projected features (N, D), not normalised.
        towers: Names of the two towers.
        name: The name it was loaded by.
        image_size: H = W in pixels.
        embedding_dim: D.
    """

    clip: nn.Module
    tokenize: Callable[[Sequence[str]], Tokens]
    preprocess: Callable[[Image.Image], Tensor]
    encode_image: Callable[[Any, Tensor], Tensor]
    encode_text: Callable[[Any, Tokens], Tensor]
    towers: Towers
    name: str
    image_size: int
    embedding_dim: int

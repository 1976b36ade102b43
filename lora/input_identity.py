"""How a model's images and texts are prepared: written beside an adapter, and compared when it is loaded.

Weights are half of a model. The other half, means, sizes and words, lies in files of its own that may change
or be mixed up, and other inputs give other features without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora.adapters import unwrap
from models.hub_tokenizer import TokenizerMissingError

PROBE = "A photo of 12 ZEBRAS, naïve: it's 3.5 m!"
"""A text whose tokens tell tokenizers apart."""
_IMAGE_SETTINGS = ("size", "crop", "resample", "scale", "shift")
_DIGITS = 6


def input_settings(model: nn.Module) -> dict[str, Any]:
    """Return how images are resized, cut and scaled, and the tokens of a probe, as far as known.

    Args:
        model: A wrapper or a federated model; a bare CLIP knows nothing of its inputs.
    """
    root = unwrap(model)
    processor, tokenize = getattr(root, "preprocess", None), getattr(root, "tokenize", None)
    values = {name: getattr(processor, name) for name in _IMAGE_SETTINGS if hasattr(processor, name)}
    settings = {f"image_{name}": _plain(value) for name, value in values.items()}
    if callable(tokenize):
        with contextlib.suppress(TokenizerMissingError):  # then the model is used without texts
            settings["tokens"] = tokenize([PROBE])["input_ids"][0].tolist()
    return settings


def differing_settings(mine: Mapping[str, Any], theirs: Any) -> list[str]:
    """Names of the settings that both sides know and that differ."""
    if not isinstance(theirs, Mapping):
        return []
    return sorted(name for name in mine if name in theirs and mine[name] != theirs[name])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [round(number, _DIGITS) for number in value.flatten().tolist()]
    return [int(number) for number in value] if isinstance(value, tuple | list) else value and int(value)

"""How a Hugging Face CLIP wants its images: read from its files, and checked against its vision tower.

Used once, when a model is loaded. A model's mean, standard deviation and size are never guessed: pictures
that are scaled in another way than in training give other features, and nothing else tells.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessorPil

from models.errors import UserError

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""In the order in which transformers takes them."""


def read_image_settings(
    model_name: str,
    source: str,
    image_size: int,
    *,
    pretrained: bool,
    local_only: bool,
    cache_dir: str | None = None,
) -> CLIPImageProcessorPil:
    """Return how a model's images are resized, cut and scaled.

    Args:
        model_name: As the user wrote it, for messages.
        source: Folder or hub name.
        image_size: Side of the vision tower's input in pixels.
        pretrained: Whether weights are loaded; random ones take CLIP's values where there is no file.
        local_only: Look on this machine only.
        cache_dir: Where downloads are kept; the hub's own folder if left out.

    Raises:
        UserError: The file is missing, another model's, or does not fit the vision tower.
    """
    folder = Path(source)
    file = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if file is None and (folder.is_dir() or not pretrained):
        if pretrained:
            raise UserError(
                f"model_name={model_name!r}: {folder / PROCESSOR_FILES[-1]} is missing, which says how "
                "images are resized and scaled; copy it from where the model comes from"
            )
        logger.info("%s: no %s, using CLIP's defaults at %d px", source, PROCESSOR_FILES[-1], image_size)
        square = {"height": image_size, "width": image_size}
        return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square)
    where = f"model_name={model_name!r}: {file or PROCESSOR_FILES[-1]}"
    if file is not None:
        _check_kind(where, file)
    try:
        settings = CLIPImageProcessorPil.from_pretrained(
            source, local_files_only=local_only, cache_dir=cache_dir
        )
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} cannot be read ({reason}); copy or fetch it again") from error
    _check_fits(where, settings, image_size)
    return settings


def _check_kind(where: str, file: Path) -> None:
    """Other processors have other defaults for what their file leaves out."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error}); copy it again") from error
    section = tree.get("image_processor", tree) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{where} holds no settings; copy it again")
    kind = section.get("image_processor_type") or section.get("feature_extractor_type") or "CLIP"
    if not str(kind).startswith("CLIP"):
        raise UserError(f"{where} is for a {kind}, not for CLIP; copy the file that belongs to the weights")


def _check_fits(where: str, settings: Any, image_size: int) -> None:
    size, crop = settings.size or {}, settings.crop_size or {}
    given = crop if settings.do_center_crop else size if settings.do_resize else {}
    if (given.get("height"), given.get("width")) != (image_size, image_size):
        raise UserError(
            f"{where} makes images of {given.get('height')} x {given.get('width')} pixels, the vision tower "
            f"takes {image_size} x {image_size}; copy the file that belongs to the weights"
        )
    if settings.do_normalize and not all(value > 0 for value in settings.image_std):
        raise UserError(f"{where} has image_std={list(settings.image_std)}: each must be above 0")

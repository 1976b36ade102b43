"""From a batch to projected features: what the batch already carries is not computed again.

A batch may carry pixels and tokens, or what a cache (`federated.data.feature_cache`) kept of frozen work:
features of a whole tower, or the activations that enter its first block that changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.errors import UserError
from models.partial_towers import run_from, run_until, tower_module
from models.prompts import first_places
from models.training import Batch

if TYPE_CHECKING:
    from models.clip import FederatedCLIPModel

IMAGE_FEATURES, TEXT_FEATURES = "image_features", "text_features"
ACTIVATIONS = {"vision": "vision_activations", "text": "text_activations"}
CAPTION_ID = "caption_id"
"""Keys of a batch: features (B, D), activations (B, T, width), and equal numbers for equal captions (B,)."""


def image_features(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Projected image features of a batch (B, D): the given ones, else computed."""
    if IMAGE_FEATURES in batch:
        return batch[IMAGE_FEATURES]
    if (hidden := batch.get(ACTIVATIONS["vision"])) is not None:
        hidden = hidden.to(model.dtype)
        with run_from(_transformer(model, "vision"), model.moving.first_blocks["vision"], hidden):
            return model.encode_image(hidden)
    if "pixel_values" not in batch:
        raise UserError(f"the batch has neither pixel_values nor image_features (keys: {sorted(batch)})")
    return model.encode_image(batch["pixel_values"])


def text_features(model: FederatedCLIPModel, batch: Batch) -> Tensor:
    """Projected text features of a batch (B, D): the given ones, else computed.

    Captions of equal "caption_id" are encoded once; their gradients add up over the pairs they are in.
    """
    if TEXT_FEATURES in batch:
        return batch[TEXT_FEATURES]
    if "input_ids" not in batch:
        raise UserError(f"the batch has no input_ids (keys: {sorted(batch)}): tokenize its captions")
    keys = ("input_ids", "attention_mask", ACTIVATIONS["text"])
    captions = {key: batch[key] for key in keys if key in batch}
    if CAPTION_ID not in batch:
        return _encode_captions(model, captions)
    first, places = first_places(batch[CAPTION_ID])
    if first.shape == places.shape:
        return _encode_captions(model, captions)
    return _encode_captions(model, {key: value[first] for key, value in captions.items()})[places]


def patch_features(model: FederatedCLIPModel, pixel_values: Tensor, block: int) -> Tensor:
    """What a block of the vision tower gives for each patch, (B, T, width) float32, the class token left out.

    Args:
        model: The federated model.
        pixel_values: (B, 3, H, W).
        block: Index of the block; negative from the end.

    Raises:
        UserError: The tower has no such block, or is no transformer.
    """
    clip: Any = model.clip
    try:
        blocks = (
            clip.vision_model.encoder.layers
            if model.towers.backend == "huggingface"
            else clip.visual.transformer.resblocks
        )
        chosen = blocks[block]
    except (AttributeError, IndexError) as error:
        raise UserError(f"{model.model_name} has no block {block} of patches in its vision tower") from error
    seen: list[Any] = []
    with chosen.register_forward_hook(lambda _, __, output: seen.append(output)):
        model._encode_image(clip, pixel_values)
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    if not getattr(getattr(chosen, "attn", None), "batch_first", True):
        hidden = hidden.transpose(0, 1)
    return hidden[:, 1:].float()


def activations(model: FederatedCLIPModel, tower: str, batch: Batch) -> Tensor:
    """What enters the first block of a tower that changes over a run, (B, T, width).

    Args:
        model: The federated model.
        tower: "vision" or "text".
        batch: With "pixel_values", or "input_ids" and "attention_mask".
    """
    encode = image_features if tower == "vision" else text_features
    block = model.moving.first_blocks[tower]
    return run_until(_transformer(model, tower), block, lambda: encode(model, batch))


def check_given(model: FederatedCLIPModel, batch: Batch) -> None:
    """Refuse features of a tower that should train.

    Raises:
        UserError: Names the key.
    """
    for key, tower, is_frozen in (
        (IMAGE_FEATURES, "vision", model.vision_is_frozen),
        (TEXT_FEATURES, "text", model.text_is_frozen),
    ):
        if key in batch and not is_frozen:
            raise UserError(
                f"batch[{key!r}] would keep the {tower} tower from training: pass pixel_values and tokens"
            )


def _encode_captions(model: FederatedCLIPModel, captions: Batch) -> Tensor:
    hidden = captions.pop(ACTIVATIONS["text"], None)
    if hidden is None:
        return model.encode_text(captions)
    hidden = hidden.to(model.dtype)
    with run_from(_transformer(model, "text"), model.moving.first_blocks["text"], hidden):
        return model.encode_text(captions)


def _transformer(model: FederatedCLIPModel, tower: str) -> Any:
    module = tower_module(model.clip, model.towers, tower)
    if module is None:
        raise UserError(f"{model.model_name}: the blocks of its {tower} tower cannot be run apart")
    return module

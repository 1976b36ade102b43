"""Frozen work done once: image features, caption features and the activations before the first adapted block.

What never changes over a run is computed at its first use and looked up ever after, exactly: a frozen tower's
output, or what enters the first block that trains (LoRA in blocks l and up). Each cache is on when it is
valid and its switch in the configuration's `cache` section is on; the log says what is cached, and what is
not and why. Conditions: docs/speed.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.config.augmentation_options import Augmentation
from federated.config.schema import CacheSection
from federated.data.captions import Captions
from federated.data.image_tensors import ImageTensors
from federated.data.row_cache import RowCache
from federated.data.splits import IntArray
from models.clip import FederatedCLIPModel
from models.features import ACTIVATIONS, CAPTION_ID, IMAGE_FEATURES, TEXT_FEATURES, activations
from models.prompts import warn_of_cut
from models.spare_memory import park_idle_tower
from models.training import Batch

log = logging.getLogger(__name__)

FEATURES, BLOCKS = "features", "activations"


@dataclass(frozen=True)
class Valid:
    """What of a tower may be computed once.

    Attributes:
        kind: FEATURES (all of it), BLOCKS (up to the first block that changes) or None.
        reason: Why, in words.
    """

    kind: str | None
    reason: str


def valid_cache(model: FederatedCLIPModel, tower: str, settings: CacheSection) -> Valid:
    """Say what of a tower is constant over a run and switched on."""
    is_frozen = model.vision_is_frozen if tower == "vision" else model.text_is_frozen
    if is_frozen:
        on = settings.image_features if tower == "vision" else settings.text_features
        switch = "image_features" if tower == "vision" else "text_features"
        return Valid(FEATURES, "the tower is frozen") if on else Valid(None, f"cache.{switch}=false")
    block, num_blocks = model.moving.first_blocks[tower], model.num_blocks[tower]
    if not 0 < block < num_blocks:
        where = "from its first block on" if block == 0 else "in its projection"
        return Valid(None, f"training changes the {tower} tower {where}, so its work cannot be kept")
    if not settings.activations:
        return Valid(None, "cache.activations=false")
    if tower == "text" and not model.trims_prompts:
        return Valid(None, "cache.trim_prompts=false")
    return Valid(BLOCKS, f"blocks 0 to {block - 1} are frozen")


@dataclass(eq=False)
class FeatureCaches:
    """The caches of a run.

    Attributes:
        image_key: Under which a batch carries what is kept of its images; None: nothing is.
        images: The rows of each split.
        text_key: Likewise for captions.
        texts: The rows of the known captions.
        captions: Tokens.
        shares_captions: Whether a caption that occurs several times in a batch is encoded once.
        augmentation: What changes training batches, and thereby rules their caches out.
        notes: What is cached and what is not, one line each, as logged.
    """

    captions: Captions
    augmentation: Augmentation
    shares_captions: bool = False
    image_key: str | None = None
    images: dict[ImageTensors, RowCache] = field(default_factory=dict)
    text_key: str | None = None
    texts: RowCache | None = None
    notes: list[str] = field(default_factory=list)

    def serves_images(self, images: ImageTensors, *, training: bool) -> bool:
        """Whether batches of a split need no pixels."""
        return images in self.images and not (training and self.augmentation.changes_images)

    def of_images(self, images: ImageTensors, index: Tensor) -> Batch:
        """Return what is kept of some images of a split, to stand in place of their pixels.

        Args:
            images: The split.
            index: Its rows, (B,).
        """
        assert self.image_key is not None
        return {self.image_key: self.images[images].rows(index.numpy())}

    def of_texts(self, captions: Sequence[str]) -> Batch:
        """Return the tokens of some captions, with what is kept of them where all of them are known."""
        tokens = self.captions.batch(captions)
        numbers = tokens[CAPTION_ID]
        if self.texts is not None and self.text_key is not None and int(numbers.max()) < self.texts.num_rows:
            kept = self.texts.rows(numbers.numpy())
            is_whole = self.text_key == TEXT_FEATURES
            tokens[self.text_key] = kept if is_whole else kept[:, : tokens["input_ids"].shape[1]]
        if not self.shares_captions:
            del tokens[CAPTION_ID]
        return tokens

    def note(self, what: str, reason: str, rows: RowCache | None = None) -> None:
        """Log whether something is cached."""
        if rows is None:
            line = f"{what}: not cached ({reason})"
        else:
            place = f"up to {rows.capacity} of {rows.num_rows} rows, {rows.max_bytes / 1e6:.1f} MB"
            line = f"{what}: computed once ({reason}; {place})"
        self.tell(line)

    def tell(self, line: str) -> None:
        """Note and log a line."""
        self.notes.append(line)
        log.info("%s", line)


def build_feature_caches(
    model: FederatedCLIPModel,
    splits: Mapping[str, ImageTensors],
    settings: CacheSection,
    augmentation: Augmentation,
    *,
    batch_size: int,
) -> FeatureCaches:
    """Set up what is valid and switched on; nothing is computed before it is asked for, save one row each.

    Args:
        model: The federated model, with its adapters.
        splits: "train" and "test".
        settings: Switches and budget.
        augmentation: What changes training batches.
        batch_size: Rows computed at a time: that of local steps, so that results agree bit by bit.
    """
    known = (caption for images in splits.values() for caption in images.captions)
    caches = FeatureCaches(Captions(model.tokenize, known), augmentation)
    budget = settings.max_bytes
    vision = valid_cache(model, "vision", settings)
    for name, images in splits.items():
        if vision.kind is None:
            caches.note("images", vision.reason)  # of every split alike
            break
        if name == "train" and augmentation.changes_images:
            caches.note("train images", "client.augmentation changes them")
        else:
            caches.image_key = IMAGE_FEATURES if vision.kind == FEATURES else ACTIVATIONS["vision"]
            compute = _image_rows(model, images, vision.kind)
            rows = _row_cache(compute, len(images), settings, batch_size, budget)
            caches.images[images] = rows
            caches.note(f"{name} image {vision.kind}", vision.reason, rows)
            budget -= rows.max_bytes
    if settings.folder is not None and (parked := park_idle_tower(model, settings.folder)):
        caches.tell(f"text tower: {parked / 1e6:.1f} MB in a file (this run does not read them)")
    if model.task.reads_captions:
        _add_captions(caches, model, settings, batch_size, budget)
    return caches


def text_dropout(model: FederatedCLIPModel) -> bool:
    """Whether dropout is drawn for each caption apart, so that equal captions differ while they train."""
    return any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 and model.towers.tower_of(name) == "text"
        for name, module in model.clip.named_modules()
    )


def _add_captions(
    caches: FeatureCaches, model: FederatedCLIPModel, settings: CacheSection, batch_size: int, max_bytes: int
) -> None:
    captions = caches.captions
    warn_of_cut(model.tokenize, captions.known, "captions")
    caches.shares_captions = settings.deduplicate_captions and not text_dropout(model)
    if not caches.shares_captions:
        why = (
            "dropout differs for each"
            if settings.deduplicate_captions
            else "cache.deduplicate_captions=false"
        )
        caches.note("repeated captions", why)
    text = valid_cache(model, "text", settings)
    if text.kind is None or not captions.known:
        caches.note("captions", text.reason)
        return
    length = captions.longest

    @torch.no_grad()
    def compute(numbers: IntArray) -> Tensor:
        tokens = captions.known_batch(numbers, length)
        return model.encode_text(tokens) if text.kind == FEATURES else activations(model, "text", tokens)

    rows = _row_cache(compute, len(captions.known), settings, batch_size, max_bytes)
    caches.text_key = TEXT_FEATURES if text.kind == FEATURES else ACTIVATIONS["text"]
    caches.texts = rows
    caches.note(f"caption {text.kind}", text.reason, rows)


def _image_rows(model: FederatedCLIPModel, images: ImageTensors, kind: str) -> Callable[[IntArray], Tensor]:
    @torch.no_grad()
    def compute(rows: IntArray) -> Tensor:
        pixel_values = images.pixel_values(rows).to(model.device)
        if kind == FEATURES:
            return model.encode_image(pixel_values)
        return activations(model, "vision", {"pixel_values": pixel_values})

    return compute


def _row_cache(
    compute: Callable[[IntArray], Tensor],
    num_rows: int,
    settings: CacheSection,
    batch_size: int,
    max_bytes: int,
) -> RowCache:
    row_shape = compute(torch.zeros(1, dtype=torch.int64).numpy()).shape[1:]
    return RowCache(
        compute,
        num_rows,
        row_shape,
        batch_size=batch_size,
        max_bytes=max_bytes,
        folder=settings.folder,
    )

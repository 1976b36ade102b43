"""Data sources that bring their own structure: the embedded sets, scikit-learn's digits, image folders.

Every source is one function ``(rng, *, options) -> FederatedData`` and one line in ``SOURCES``; those of
tables are in ``federated.data.sources.csv_source`` and ``federated.data.sources.hub_source``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PilImage

from federated.data.names import listed
from federated.data.pictures import PICTURE, with_pictures
from federated.data.sources import embedded
from federated.data.sources.csv_source import csv
from federated.data.sources.easy_vqa_source import easy_vqa
from federated.data.sources.emoji_scenes import emoji_vqa
from federated.data.sources.folder_scan import ClassFiles, scan_folder
from federated.data.sources.form import FederatedData, image_dataset, readable_images, split_off
from federated.data.sources.hub_source import hub
from federated.data.sources.question_csv import vqa_csv
from models.errors import UserError
from models.registration import registering

logger = logging.getLogger(__name__)

Source = Callable[..., FederatedData]


def fashion_mnist(rng: np.random.Generator, *, full: bool = False) -> FederatedData:
    """Bundled real Fashion-MNIST images in ten classes (Xiao et al. 2017, arXiv:1708.07747).

    Args:
        rng: not used.
        full: all 70,000 images, from the Debian package ``dataset-fashion-mnist``.
    """
    splits = embedded.fashion_mnist(full=full)
    return FederatedData(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        class_names=tuple(splits["train"].features["label"].names),
        label_column="label",
        image_column="image",
        caption_column=None,
        domain_column=None,
        name="fashion_mnist",
    )


def emoji(
    rng: np.random.Generator,
    *,
    vendors: Sequence[str] = embedded.VENDORS,
    test_vendors: Sequence[str] | None = None,
    language: str = "en",
    label: str = "label",
) -> FederatedData:
    """Bundled emoji of several vendors with captions; the test concepts occur in no training row.

    Args:
        rng: not used.
        vendors: whose drawings; each is a domain.
        test_vendors: whose drawings to test on, by default the same.
        language: language of the captions.
        label: which column is the class: "label" (the group) or "subgroup".

    Raises:
        UserError: an unknown vendor, language or label.
    """
    if label not in ("label", "subgroup"):
        raise UserError(
            f"emoji have no label {label!r}; set it to 'label' (the group) or 'subgroup'", options=("label",)
        )
    splits = embedded.emoji(vendors, language)
    test = splits["test"] if test_vendors is None else embedded.emoji(test_vendors, language)["test"]
    return FederatedData(
        train=with_pictures(splits["train"], "image"),
        validation=None,
        test=with_pictures(test, "image"),
        class_names=tuple(splits["train"].features[label].names),
        label_column=label,
        image_column="image",
        caption_column="caption",
        domain_column="vendor",
        name="emoji",
        concept_column="concept",
        picture_column=PICTURE,
    )


def digits(rng: np.random.Generator, *, test_fraction: float = 0.2) -> FederatedData:
    """1,797 real handwritten digits of 8 x 8 pixels from scikit-learn (UCI, Alpaydin and Kaynak 1998).

    Args:
        rng: draws the test rows.
        test_fraction: share of the rows for the test split, stratified.
    """
    from sklearn.datasets import load_digits  # here: it takes seconds to import, for this source alone

    bunch = load_digits()
    names = tuple(str(digit) for digit in bunch.target_names)
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), sixteen grey levels
    columns = {"image": [PilImage.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict(columns, features=features)
    train, test = split_off(rows, test_fraction, rng, label_column="label")
    return FederatedData(
        train=train,
        validation=None,
        test=test,
        class_names=names,
        label_column="label",
        image_column="image",
        caption_column=None,
        domain_column=None,
        name="digits",
        drawn=("test",),
    )


def imagefolder(
    rng: np.random.Generator,
    *,
    path: str,
    skip_corrupt: bool = False,
    check_images: bool = True,
    allow_outside: bool = False,
) -> FederatedData:
    """Your images below ``train/ val/ test/<class>/``, at any depth; ``val`` is optional.

    Args:
        rng: not used.
        path: the folder.
        skip_corrupt: leave images out that cannot be decoded, logged and counted, instead of stopping.
        check_images: decode every image once at loading; without it a corrupt one stops the run when read.
        allow_outside: follow links that leave the folder.

    Raises:
        UserError: a missing split, an empty class folder, classes that differ between splits, images that
            would not be read, a corrupt image; each names the folder or file.
    """
    scan = scan_folder(path, allow_outside=allow_outside)
    if scan.problems:
        raise UserError("; ".join(scan.problems))
    if scan.ignored:
        logger.warning("%d files in %s are not read: %s", len(scan.ignored), path, listed(scan.ignored))
    names = tuple(scan.files["train"])
    splits: dict[str, Dataset] = {}
    num_skipped = 0
    for split, classes in scan.files.items():
        files, labels = _flatten(classes)
        readable = (
            readable_images(files, skip_corrupt=skip_corrupt)
            if check_images
            else np.ones(len(files), np.bool_)
        )
        emptied = sorted(set(labels.tolist()) - set(labels[readable].tolist()))
        if emptied:
            raise UserError(
                f"class folder {Path(path) / split / names[emptied[0]]} has no image that can be decoded"
            )
        kept = np.flatnonzero(readable)
        splits[split] = image_dataset([files[row] for row in kept], labels[kept].tolist(), names)
        num_skipped += len(files) - len(kept)
    return FederatedData(
        train=splits["train"],
        validation=splits.get("val"),
        test=splits["test"],
        class_names=names,
        label_column="label",
        image_column="image",
        caption_column=None,
        domain_column=None,
        name="imagefolder",
        num_skipped=num_skipped,
    )


SOURCES: dict[str, Source] = {
    "fashion_mnist": fashion_mnist,
    "emoji": emoji,
    "digits": digits,
    "imagefolder": imagefolder,
    "csv": csv,
    "hub": hub,
    "easy_vqa": easy_vqa,
    "emoji_vqa": emoji_vqa,
    "vqa_csv": vqa_csv,
}
"""Name -> function (rng, **options) -> FederatedData."""

register_source = registering("data source", SOURCES, ("rng",))
"""``@register_source("name")`` adds a function (rng, *, options) -> FederatedData."""


def _flatten(classes: ClassFiles) -> tuple[list[Path], np.ndarray]:
    files = [image for images in classes.values() for image in images]
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
    return files, labels

"""The ``hub`` source: data sets of the Hugging Face hub, by name or as a local folder in its format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from federated.data.names import check_names, listed
from federated.data.pictures import PICTURE, with_pictures
from federated.data.sources.form import SPLIT_NAMES, FederatedData, completed, logger, our_split
from federated.data.sources.hub_columns import (
    check_columns,
    class_names_of,
    complete_rows,
    readable_rows,
    with_label_numbers,
    with_own_class_names,
)
from models.clip_loading import HUB_TIMEOUT_SECONDS
from models.errors import UserError


def hub(  # noqa: PLR0913 -- the options of the data section, one by one
    rng: np.random.Generator,
    *,
    path: str,
    configuration: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    domain_column: str | None = None,
    concept_column: str | None = None,
    splits: Mapping[str, str] | None = None,
    test_fraction: float = 0.2,
    skip_corrupt: bool = False,
    skip_incomplete: bool = False,
) -> FederatedData:
    """A data set of the Hugging Face hub by name, or a local folder in the hub's format (parquet files).

    Args:
        rng: draws the test rows where there is no test split.
        path: hub name such as "uoft-cs/cifar10", or a local folder.
        configuration: which of the data set's configurations.
        revision: branch, tag or commit of a hub data set; name one to make a run repeatable.
        image_column: the image column; by default the only one of type Image.
        label_column: the class column, of class labels, integers or strings; by default the only one of type
            ClassLabel.
        caption_column: the text column.
        domain_column: the domain column.
        concept_column: rows of equal value show the same thing.
        splits: our split -> the data set's, where they are not found by name, such as ``{test: validation}``.
        test_fraction: share of the rows for testing where there is no test split.
        skip_corrupt: decode every image once at loading, and leave out, logged and counted, those that cannot
            be; otherwise an image is decoded when it is needed, and is an error then.
        skip_incomplete: leave rows out that lack image, label, caption, domain or concept, logged and
            counted, instead of stopping.

    Raises:
        UserError: the data set cannot be had (no network, no such name), lacks a split or column, or has rows
            that cannot be used; named with split and row.
    """
    found = _hub_splits(_load_hub(path, configuration, revision), splits or {}, path)
    train = found["train"]
    image = image_column or _only_column(train, Image, "image", path)
    if image is None:
        raise UserError(
            f"{path} has no image column; set image_column to one of {', '.join(train.column_names)}",
            options=("image_column",),
        )
    label = label_column or _only_column(train, ClassLabel, "label", path)
    columns = [c for c in (image, label, caption_column, domain_column, concept_column) if c is not None]
    for split, rows in found.items():
        check_columns(rows, columns, f"{path}, split {split}")
        if not isinstance(rows.features[image], Image):
            raise UserError(
                f"{path}, split {split}: {image!r} holds no images; set image_column",
                options=("image_column",),
            )
    num_listed = sum(map(len, found.values()))
    found = {
        split: complete_rows(rows, columns, f"{path}, split {split}", skip=skip_incomplete)
        for split, rows in found.items()
    }
    if skip_corrupt:
        found = {split: readable_rows(rows, image, f"{path}, split {split}") for split, rows in found.items()}
    class_names = None
    if label is not None:
        class_names = class_names_of(found["train"], label)
        check_names(class_names, path)
        found = {
            split: with_label_numbers(rows, label, class_names, f"{path}, split {split}")
            for split, rows in found.items()
        }
    if caption_column is not None:
        found = {split: with_pictures(rows, image) for split, rows in found.items()}
    return completed(
        found,
        rng,
        test_fraction,
        class_names=class_names,
        label_column=label,
        image_column=image,
        caption_column=caption_column,
        domain_column=domain_column,
        name="hub",
        concept_column=concept_column,
        picture_column=None if caption_column is None else PICTURE,
        num_skipped=num_listed - sum(map(len, found.values())),
    )


def _load_hub(path: str, configuration: str | None, revision: str | None) -> DatasetDict:
    if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(path)  # what save_to_disk wrote
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    reachable = Path(path).is_dir() or _hub_answers(path, revision)
    try:
        with contextlib.nullcontext() if reachable else _offline():
            loaded = load_dataset(path, configuration, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        reason = error if reachable else "the hub does not answer or has none, and nor has this machine"
        raise UserError(
            f"cannot get the data set {path!r} ({reason}); check the name and the network, fetch it once "
            "with a network so that the cache has it, or give a local folder of parquet files as path"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise UserError(f"cannot read the data set {path!r}: {error}") from error
    return with_own_class_names(loaded, path, configuration) if Path(path).is_dir() else loaded


def _hub_answers(path: str, revision: str | None) -> bool:
    """Whether the hub can be reached and has a data set: one short request; ``datasets`` would make six."""
    try:
        HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except (httpx.HTTPError, OSError, HFValidationError) as error:
        logger.info("%s: looking in the local cache only, the hub says: %s", path, error)
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the libraries look on this machine only."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _hub_splits(loaded: DatasetDict, chosen: Mapping[str, str], path: str) -> dict[str, Dataset]:
    """Our split -> rows, by the chosen names or by the usual ones."""
    unknown = [split for split in chosen if split not in SPLIT_NAMES]
    missing = [name for name in chosen.values() if name not in loaded]
    if unknown or missing:
        raise UserError(
            f"splits {dict(chosen)} do not fit {path}: it has {', '.join(loaded)}, and ours are "
            f"{', '.join(SPLIT_NAMES)}",
            options=("splits",),
        )
    found = {split: loaded[name] for split, name in chosen.items()}
    by_name: dict[str, list[str]] = {}
    for name in loaded:
        if name not in chosen.values():
            by_name.setdefault(our_split(str(name)) or "", []).append(str(name))
    unread = by_name.pop("", [])
    for split, names in by_name.items():
        if split in found:
            unread += names
        elif len(names) > 1:
            raise UserError(
                f"{path}: {' and '.join(names)} are both the {split} split; say which with "
                f"splits={{{split}: ...}}",
                options=("splits",),
            )
        else:
            found[split] = loaded[names[0]]
    if unread:
        logger.warning("%s: splits that are not read: %s", path, listed(unread))
    if "train" not in found:
        raise UserError(
            f"{path} has no train split; it has {', '.join(loaded)}: say which with splits={{train: ...}}",
            options=("splits",),
        )
    return found


def _only_column(rows: Dataset, kind: type, role: str, path: str) -> str | None:
    """The one column of a feature type, None without one; several are for the user to choose from."""
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(columns) > 1:
        raise UserError(
            f"{path} has several {role} columns ({', '.join(columns)}); set {role}_column",
            options=(f"{role}_column",),
        )
    return columns[0] if columns else None

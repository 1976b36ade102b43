"""Checking a csv table of images before a run: every row, image and caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Image

from federated.data.dataset import load_data
from federated.data.names import listed, read_alike
from federated.data.sources.folder_scan import look_alike, look_at_all, of_one_colour
from federated.data.splits import column_values
from models.errors import UserError
from models.progress import Report, quiet


@dataclass(frozen=True)
class TableReport:
    """What is known about a table before it is used.

    Attributes:
        counts: what is counted -> split -> how many: "rows", "pictures" and, as far as there are, "captions"
            that differ and each class.
        captions: all captions.
        one_colour: images whose pixels are all of one colour.
        look_alike: groups of images that differ as files hold them and are equal as a model is shown them.
    """

    counts: Mapping[str, Mapping[str, int]]
    captions: tuple[str, ...]
    one_colour: tuple[Path, ...]
    look_alike: tuple[tuple[Path, ...], ...]


def check_table(path: Path, *, allow_outside: bool = False, report: Report = quiet) -> TableReport:
    """Look at every row and image of a csv file, or of a folder of them.

    Raises:
        UserError: a run could not use it; names file and line, or all images that cannot be decoded.
    """
    data = load_data("csv", path=str(path), allow_outside=allow_outside, check_images=False)
    parts = {"train": data.train, "val": data.validation, "test": data.test}
    splits = {name: rows for name, rows in parts.items() if rows is not None}
    counts: dict[str, dict[str, int]] = {"rows": {name: len(rows) for name, rows in splits.items()}}
    counts["pictures"] = {name: len(set(rows["picture"][:])) for name, rows in splits.items()}
    captions: list[str] = []
    if data.caption_column is not None:
        of_split = {name: list(rows[data.caption_column][:]) for name, rows in splits.items()}
        captions = [caption for found in of_split.values() for caption in found]
        counts["captions"] = {name: len(set(map(read_alike, found))) for name, found in of_split.items()}
    if data.class_names is not None:
        names, labels = data.class_names, data.label_column or ""
        of_class = {
            name: np.bincount(column_values(rows, labels), minlength=len(names))
            for name, rows in splits.items()
        }
        counts |= {
            f"class {class_name}": {name: int(found[number]) for name, found in of_class.items()}
            for number, class_name in enumerate(names)
        }
    files: dict[Path, None] = {}
    for rows in splits.values():
        raw = rows.cast_column(data.image_column, Image(decode=False))[data.image_column]
        files |= {Path(cell["path"]): None for cell in raw}
    corrupt: list[tuple[Path, str]] = []
    looks = look_at_all(list(files), corrupt, report)
    if corrupt:
        named = listed(f"{file} ({reason})" for file, reason in corrupt)
        raise UserError(f"{path} cannot be used: {len(corrupt)} images cannot be decoded: {named}")
    return TableReport(counts, tuple(captions), of_one_colour(looks), look_alike(looks))

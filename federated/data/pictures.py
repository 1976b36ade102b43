"""Which rows show the same picture: the same file, or files of the same bytes.

Retrieval counts pictures, not rows: a picture with five captions is five rows.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

from datasets import Dataset, Image

from federated.data.sources.folder_scan import content_hash

PICTURE = "picture"
"""The column that the sources add."""


def picture_names(files: Sequence[Path]) -> list[str]:
    """Name the picture of each file, (N,): equal names are files of equal bytes.

    Args:
        files: Image files that exist, (N,).
    """
    paths = [os.path.normpath(file) for file in files]
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_size[Path(path).stat().st_size].append(path)
    first: dict[Hashable, str] = {}
    named = {}
    for size, group in by_size.items():  # files of other sizes differ: only the rest are read
        for path in group:
            content = content_hash(Path(path)) if len(group) > 1 else path
            named[path] = first.setdefault((size, content), path)
    return [named[path] for path in paths]


def with_pictures(rows: Dataset, image_column: str) -> Dataset:
    """Add a column that numbers the picture of each row: equal numbers are images of equal bytes."""
    raw = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    numbers: dict[str, int] = {}
    found = []
    for image in raw[image_column]:
        content = image["bytes"]
        digest = content_hash(Path(image["path"])) if content is None else hashlib.sha256(content).hexdigest()
        found.append(numbers.setdefault(digest, len(numbers)))
    return rows.add_column(PICTURE, found)

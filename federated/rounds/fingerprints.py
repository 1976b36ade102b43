"""What a run is made of, as hashes: its rows in their order, its base weights; and the versions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from federated.results.run_folder import package_versions
from federated.rounds.run import Run
from lora.base_identity import base_digests
from models.errors import UserError

log = logging.getLogger(__name__)

_ROWS, _WEIGHTS, _VERSIONS = "rows", "base_weights", "versions"
_BATCH = 1000
_END_BYTES = 1024


def fingerprints(run: Run) -> dict[str, Any]:
    """Return the hashes of a run before its first round, JSON values.

    Of an image the length counts, with its first and its last kilobyte; of every other column all values do.
    """
    rows = {"train": run.data.train, "test": run.data.test}
    return {
        _ROWS: {split: _rows_digest(split_rows, run.data.image_column) for split, split_rows in rows.items()},
        _WEIGHTS: base_digests(run.model),
        _VERSIONS: package_versions(),
    }


def check_fingerprints(before: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Make sure that a run goes on with what it began with; other versions are warned of.

    Args:
        before: Of a commit.
        now: Of this process.
        source: The run, for messages.

    Raises:
        UserError: The rows or the base weights are others.
    """
    for split, digest in now[_ROWS].items():
        if before.get(_ROWS, {}).get(split) != digest:
            raise UserError(
                f"the {split} rows are not those that {source} was run on so far: put the data back as it "
                "was, or set data.path to where it is"
            )
    if before.get(_WEIGHTS) != now[_WEIGHTS]:
        raise UserError(
            f"the base model's weights are not those that {source} was run with so far: put the model back "
            "as it was"
        )
    versions = before.get(_VERSIONS, {})
    others = [
        f"{name} {versions.get(name)} → {now}"
        for name, now in now[_VERSIONS].items()
        if versions.get(name) != now
    ]
    if others:
        log.warning(
            "%s was run with other versions so far (%s): the last bits of what follows may differ",
            source,
            ", ".join(others),
        )


def _rows_digest(rows: Dataset, image_column: str | None) -> str:
    digest = hashlib.sha256()
    table = rows.with_format("arrow")
    others = [name for name in rows.column_names if name != image_column]
    for start in range(0, len(rows), _BATCH):
        batch = table[start : start + _BATCH]
        for image in batch[image_column].to_pylist() if image_column is not None else ():
            digest.update(_image_digest(image))
        values = [batch[name].to_pylist() for name in others]
        digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()


def _image_digest(image: Mapping[str, Any] | None) -> bytes:
    """Return the hash of an image that is embedded as bytes, or of its file."""
    content = (image or {}).get("bytes")
    if content is not None:
        length, first, last = len(content), content[:_END_BYTES], content[-_END_BYTES:]
    else:
        path = Path(str((image or {}).get("path")))
        length = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_END_BYTES)
            file.seek(max(0, length - _END_BYTES))
            last = file.read(_END_BYTES)
    return hashlib.sha256(f"{length}\n".encode() + first + last).digest()

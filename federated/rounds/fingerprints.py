"""What a run is made of, as hashes: its rows in their order, its base weights; and the versions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from federated.results.run_folder import package_versions
from federated.rounds.run import Run
from lora.base_identity import base_digests
from models.errors import UserError
from models.progress import doing
from models.state import State

log = logging.getLogger(__name__)

_ROWS, _WEIGHTS, _START, _VERSIONS = "rows", "base_weights", "start_adapter", "versions"
_BATCH = 100


def fingerprints(run: Run) -> dict[str, Any]:
    """Return the hashes of a run before its first round, JSON values.

    All bytes of all rows count, images included. An adapter that the run starts from counts by its values:
    clients that never took part still begin with what is private in it.

    Raises:
        UserError: An image cannot be read.
    """
    rows = {"train": run.data.train, "test": run.data.test}
    with doing("checking the rows"):
        digests = {split: _rows_digest(part, run.data.image_column) for split, part in rows.items()}
    return {
        _ROWS: digests,
        _WEIGHTS: base_digests(run.model),
        _START: None if run.config.model.adapter is None else _state_digest(run.initial_state),
        _VERSIONS: package_versions(),
    }


def check_fingerprints(before: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Make sure that a run goes on with what it began with; other versions are warned of.

    Args:
        before: Of a commit.
        now: Of this process.
        source: The run, for messages.

    Raises:
        UserError: The rows, the base weights or the adapter that the run starts from are others.
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
    if before.get(_START) != now[_START]:
        raise UserError(
            f"model.adapter has other values than when {source} started from it: put it back as it was, or "
            "set model.adapter to where it is"
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
        return hashlib.sha256(content).digest()
    path = Path(str((image or {}).get("path")))
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def _state_digest(state: State) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

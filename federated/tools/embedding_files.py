"""Embeddings on disk: an array file, and a manifest beside it that says what its rows are and who made them.

``images.safetensors`` (or ``.npy``) holds one array (N, D) float32, ``images.safetensors.json`` the rest.
Both appear whole or not at all; the manifest carries the array's SHA-256, so that a pair that does not belong
together is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from federated.data.sources.folder_scan import content_hash
from federated.tools.embeddings import (
    DEFAULT_OPTIONS,
    InputOptions,
    embed_images,
    embed_texts,
    find_images,
    read_texts,
)
from federated.tools.output_files import check_output
from federated.tools.trained_models import OpenedModel
from lora.adapters import scalings
from models.errors import UserError
from models.files import json_text, write_text, written_whole
from models.untrusted import parsing, read_json, read_tensors

ARRAY_SUFFIXES = (".safetensors", ".npy")
ARRAY_NAME = "embeddings"
"""Name of the array inside a safetensors file."""


@dataclass(frozen=True)
class Manifest:
    """What the rows of an array file are.

    Attributes:
        kind: "image", "text", or "patches" of images, (N, T, D) as a language model reads them.
        rows: Per row the image's path relative to ``folder``, or the text, (N,).
        folder: Folder of the images, absolute; "" for texts.
        model: Name of the base model.
        adapter: Folder or file of the trained part, absolute; None for a plain model.
        run: Run folder, absolute; None where none was given.
        weights_sha256: Of the CLIP's weights, adapters and their scaling included, as they were.
        dimension: D.
        normalised: Whether rows have length 1.
        dtype: Of the array.
        array_sha256: Of the array file.
        corrupt: Images left out because they cannot be decoded, relative to ``folder``.
    """

    kind: Literal["image", "text", "patches"]
    rows: tuple[str, ...]
    folder: str
    model: str
    adapter: str | None
    run: str | None
    weights_sha256: str
    dimension: Annotated[int, Field(ge=1, lt=2**31)]
    normalised: bool
    dtype: str
    array_sha256: str
    corrupt: tuple[str, ...] = ()


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True, eq=False)
class EmbeddingIndex:
    """An array file that was read back.

    Attributes:
        path: The array file.
        manifest: What its rows are.
        embeddings: (N, D) float32, as stored.
    """

    path: Path
    manifest: Manifest
    embeddings: Tensor


def encode_to_file(
    opened: OpenedModel,
    source: str | Path,
    output: str | Path,
    *,
    texts: bool = False,
    normalised: bool = True,
    overwrite: bool = False,
    options: InputOptions = DEFAULT_OPTIONS,
) -> Manifest:
    """Embed images or texts and write array and manifest.

    Args:
        opened: The model.
        source: An image or a folder of images; with ``texts`` a text file, one text a line.
        output: The array file, ending in .safetensors or .npy.
        texts: Whether ``source`` holds texts.
        normalised: Give each row length 1; patches stay as they are.
        overwrite: Replace files of the same name.
        options: How inputs pass through the model; corrupt images left out are listed in the manifest.

    Raises:
        UserError: the output may not be written, or an input is missing, empty or corrupt; nothing is
            written then.
    """
    target = Path(output)
    check_array_output(target, overwrite=overwrite)
    rows, features, about = (
        _text_rows(opened, source, options) if texts else _image_rows(opened, source, options)
    )
    if options.patches:
        about, normalised = {**about, "kind": "patches"}, False
    array = functional.normalize(features, dim=-1) if normalised else features
    return _write(target, array, {**about, "rows": rows, "normalised": normalised}, opened)


def read_index(path: str | Path) -> EmbeddingIndex:
    """Read an array file and its manifest.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    array_path = Path(path)
    manifest = _read_manifest(_manifest_path(array_path))
    if not os.path.isfile(array_path):
        raise UserError(f"{array_path} is missing; write it with: fedlora encode MODEL FOLDER --output FILE")
    if content_hash(array_path) != manifest.array_sha256:
        raise UserError(f"{array_path} is not the file that its manifest describes; encode the folder again")
    if manifest.kind == "patches":
        raise UserError(
            f"{array_path} holds patches of images, which cannot be searched; encode without --patches"
        )
    embeddings = _read_array(array_path)
    if tuple(embeddings.shape) != (len(manifest.rows), manifest.dimension):
        raise UserError(
            f"{array_path} holds an array of shape {tuple(embeddings.shape)}, its manifest says "
            f"({len(manifest.rows)}, {manifest.dimension}); encode the folder again"
        )
    return EmbeddingIndex(array_path, manifest, embeddings)


def weights_sha256(model: nn.Module) -> str:
    """Hash of all weights by name, adapters and their scaling included: equal hashes, equal embeddings."""
    digest = hashlib.sha256(json.dumps(scalings(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_array_output(path: Path, *, overwrite: bool) -> None:
    """Make sure that array and manifest may be written.

    Raises:
        UserError: the suffix is unknown, the folder missing, or a file exists and may not be replaced.
    """
    if path.suffix not in ARRAY_SUFFIXES:
        raise UserError(f"{path}: embeddings are written to a file ending in {' or '.join(ARRAY_SUFFIXES)}")
    for file in (path, _manifest_path(path)):
        check_output(file, overwrite=overwrite)


def _text_rows(
    opened: OpenedModel, source: str | Path, options: InputOptions
) -> tuple[tuple[str, ...], Tensor, dict[str, Any]]:
    texts = read_texts(source)
    return tuple(texts), embed_texts(opened.model, texts, options), {"kind": "text", "folder": ""}


def _image_rows(
    opened: OpenedModel, source: str | Path, options: InputOptions
) -> tuple[tuple[str, ...], Tensor, dict[str, Any]]:
    found = embed_images(opened.model, find_images(source), options)
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    corrupt = _relative([path for path, _ in found.corrupt], root)
    about = {"kind": "image", "folder": str(root.resolve()), "corrupt": corrupt}
    return _relative(found.paths, root), found.features, about


def _write(target: Path, array: Tensor, about: dict[str, Any], opened: OpenedModel) -> Manifest:
    with written_whole(target) as temporary:
        if target.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, array.numpy(), allow_pickle=False)
        else:
            temporary.write_bytes(save({ARRAY_NAME: array.contiguous()}))
        array_sha256 = content_hash(temporary)
    manifest = Manifest(
        **about,
        model=opened.model.model_name,
        adapter=opened.adapter,
        run=opened.run,
        weights_sha256=weights_sha256(opened.model.clip),
        dimension=array.shape[-1],
        dtype=str(array.dtype).removeprefix("torch."),
        array_sha256=array_sha256,
    )
    write_text(_manifest_path(target), json_text(asdict(manifest), indent=1, ensure_ascii=False) + "\n")
    return manifest


def _manifest_path(array_path: Path) -> Path:
    return Path(f"{array_path}.json")


def _read_manifest(path: Path) -> Manifest:
    if not os.path.isfile(path):
        raise UserError(
            f"{path} is missing; an index is a file that `fedlora encode` wrote, with its manifest beside it"
        )
    try:
        return read_json(path, _MANIFEST)
    except UserError as error:
        raise UserError(f"{error}; it is no manifest of embeddings, encode the folder again") from error


def _read_array(path: Path) -> Tensor:
    with parsing(path, "holds no array of embeddings", "encode the folder again"):
        if path.suffix != ".npy":
            array = read_tensors(path)[0][ARRAY_NAME]
        else:  # mapped first: a shape that the file does not hold is refused before there is memory for it
            array = torch.from_numpy(np.array(np.load(path, mmap_mode="r", allow_pickle=False)))
    if array.dtype != torch.float32 or not array.isfinite().all():
        raise UserError(
            f"{path} holds {array.dtype} or what is not finite, not embeddings; encode the folder again"
        )
    return array


def _relative(paths: Sequence[Path], root: Path) -> tuple[str, ...]:
    return tuple(path.relative_to(root).as_posix() for path in paths)

"""Searching embeddings: a text or an image finds the rows of an index that are most like it.

The search is exact, by cosine: faiss finds the candidates where it is installed, torch otherwise, and both
orders are settled by the same float64 scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from federated.tools.embedding_files import EmbeddingIndex, weights_sha256
from federated.tools.embeddings import embed_images, embed_texts, is_image_file
from federated.tools.trained_models import OpenedModel, open_model
from models.errors import UserError
from models.finite import check_finite

SPARE_CANDIDATES = 32
"""Rows fetched beyond those asked for, so that rounding does not decide which of equal ones are cut."""


@dataclass(frozen=True)
class Hit:
    """One row of an index that answers a query.

    Attributes:
        row: Its number.
        score: Cosine with the query.
        item: Path of the image below the index's folder, or the text.
    """

    row: int
    score: float
    item: str


def open_query_model(
    index: EmbeddingIndex, source: str | None = None, *, adapter: str | None = None, device: str = "cpu"
) -> OpenedModel:
    """Open the model that an index was made with, and make sure that it still is the same.

    Args:
        index: The index.
        source: Run, adapter or model; by default what the manifest names.
        adapter: An adapter for a model given by name.
        device: Where the model runs.

    Raises:
        UserError: the model cannot be opened, or its weights are not those that made the index.
    """
    manifest = index.manifest  # its hash of all weights says more than any check of an adapter's base
    if source is not None:
        opened = open_model(source, adapter=adapter, device=device, any_base=True)
    elif adapter is not None:
        opened = open_model(manifest.model, adapter=adapter, device=device, any_base=True)
    elif manifest.run is not None:
        opened = open_model(manifest.run, device=device, any_base=True)
    else:
        opened = open_model(manifest.model, adapter=manifest.adapter, device=device, any_base=True)
    if weights_sha256(opened.model.clip) != manifest.weights_sha256:
        made_with = f"model {manifest.model}, adapter {manifest.adapter or 'none'}"
        raise UserError(
            f"{index.path} was made with other weights ({made_with}) than those of {opened} now; encode the "
            "folder again, or give the model and adapter that it was made with"
        )
    return opened


def search(
    index: EmbeddingIndex, opened: OpenedModel, query: str, *, image: bool = False, top_k: int = 10
) -> list[Hit]:
    """Find the rows of an index that are most like a text, or like an image.

    Args:
        index: The index.
        opened: The model that made it.
        query: A text; with ``image`` the path of an image.
        image: Whether ``query`` is an image.
        top_k: Rows to return, at most.

    Raises:
        UserError: the query is empty, an image that is missing or cannot be decoded, or the path of an image
            where a text is meant.
    """
    if not query.strip():
        raise UserError("the query is empty; give a text, or --image and the path of an image")
    if not image and is_image_file(query):
        raise UserError(f"{query} is an image file, not a text: pass --image to search with it")
    if image and not Path(query).is_file():
        raise UserError(f"{query}: no such file; give the path of an image, or leave --image out for a text")
    if image:
        features = embed_images(opened.model, [Path(query)]).features
    else:
        features = embed_texts(opened.model, [query])
    rows, scores = nearest_rows(index.embeddings, features[0], top_k)
    return [
        Hit(row, score, index.manifest.rows[row])
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def nearest_rows(
    embeddings: Tensor, query: Tensor, top_k: int, *, engine: str | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Find the rows with the largest cosine, exactly; rows of equal score come in the order of their numbers.

    Args:
        embeddings: (N, D) float32, of any lengths but 0.
        query: (D,).
        top_k: K; fewer rows are returned where there are fewer.
        engine: "faiss" or "torch"; by default faiss where it is installed.

    Returns:
        Row numbers (K,), and cosines (K,).

    Raises:
        UserError: Embeddings are not finite.
    """
    find = _with_faiss if (engine or default_engine()) == "faiss" else _with_torch
    rows = functional.normalize(check_finite(embeddings.float()), dim=-1)
    wanted = functional.normalize(query.float(), dim=-1)
    candidates = find(rows, wanted, min(top_k + SPARE_CANDIDATES, len(rows)))
    exact = functional.normalize(embeddings[torch.from_numpy(candidates)].double(), dim=-1)
    scores = (exact * functional.normalize(query.double(), dim=-1)).sum(dim=1).numpy()
    order = np.lexsort((candidates, -scores))[:top_k]
    return candidates[order], scores[order]


def default_engine() -> str:
    """ "faiss" where it is installed, "torch" otherwise."""
    return "torch" if find_spec("faiss") is None else "faiss"


def _with_faiss(rows: Tensor, query: Tensor, count: int) -> npt.NDArray[np.int64]:
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    found: npt.NDArray[np.int64] = index.search(query.numpy()[None], count)[1][0]
    return found


def _with_torch(rows: Tensor, query: Tensor, count: int) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = (rows @ query).topk(count).indices.numpy()
    return found

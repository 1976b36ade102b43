"""Retrieval metrics: recall at k with several right answers per query, by exact search.

Used by the retrieval task's evaluation, in round 0 and after each round. Queries and gallery are images and
texts, each once, however many rows they are in. The search is exhaustive (no approximate index), through
faiss when it is installed and chunked torch otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.errors import UserError, install_command

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SearchEngine = Literal["auto", "faiss", "torch"]

CONCEPT, PICTURE, TEXT = "concept", "picture", "text"
"""Keys of a batch, (B,) int64 each: rows of equal numbers show the same thing, are of the same picture, have
the same text. A row's image and another's text are right for each other where any of them is equal."""

DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, eq=False)
class RetrievalSet:
    """The images and texts of N rows, each once, and which are right answers to which.

    Attributes:
        images: Normalised embeddings, (U, D).
        texts: Normalised embeddings, (V, D).
        right: Whether image and text belong together, (U, V), sparse: they share a row or a concept.
        num_rows: N.
    """

    images: Tensor
    texts: Tensor
    right: csr_array
    num_rows: int

    def recall(self, ks: Sequence[int], *, engine: SearchEngine = "auto") -> dict[str, dict[int, float]]:
        """Return direction -> cut-off -> share of queries with a right answer among the k nearest."""
        return {
            direction: _recall(queries, gallery, right, ks, engine)
            for direction, (queries, gallery, right) in self._directions().items()
        }

    def num_right(self, direction: str) -> npt.NDArray[np.int64]:
        """Return how many right answers each query of a direction has."""
        return np.diff(self._directions()[direction][2].indptr).astype(np.int64)

    def num_gallery(self, direction: str) -> int:
        """Return how many things are searched in a direction."""
        return len(self._directions()[direction][1])

    def _directions(self) -> dict[str, tuple[Tensor, Tensor, csr_array]]:
        there, back = DIRECTIONS
        return {
            there: (self.images, self.texts, self.right),
            back: (self.texts, self.images, self.right.T.tocsr()),
        }


def retrieval_set(images: Tensor, texts: Tensor, ids: Mapping[str, Tensor]) -> RetrievalSet:
    """Take each image and each text of N rows once.

    Args:
        images: Normalised embeddings, (N, D).
        texts: Normalised embeddings, (N, D).
        ids: Of CONCEPT, PICTURE and TEXT what is known, (N,) int64 each; without PICTURE or TEXT each row has
            one of its own.
    """
    from scipy.sparse import csr_array  # here: it takes a while to import, for this task alone

    num_rows = len(images)
    rows = np.arange(num_rows)
    first_image, picture = _each_once(ids[PICTURE].cpu().numpy() if PICTURE in ids else rows)
    first_text, text = _each_once(ids[TEXT].cpu().numpy() if TEXT in ids else rows)

    def incidence(places: npt.NDArray[np.int64], things: npt.NDArray[np.int64]) -> csr_array:
        shape = (int(places.max()) + 1, int(things.max()) + 1)
        return csr_array((np.ones(num_rows, dtype=np.int64), (places, things)), shape=shape)

    right = incidence(picture, text)
    if CONCEPT in ids:
        concept = np.unique(ids[CONCEPT].cpu().numpy(), return_inverse=True)[1]
        right = right + incidence(picture, concept) @ incidence(text, concept).T
    right.sum_duplicates()
    return RetrievalSet(
        images[torch.from_numpy(first_image).to(images.device)],
        texts[torch.from_numpy(first_text).to(texts.device)],
        right,
        num_rows,
    )


def _each_once(ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first row of each distinct id, in the order of the rows (U,), and each row's place there (N,)."""
    _, first, codes = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[codes]


def _recall(
    queries: Tensor, gallery: Tensor, right: csr_array, ks: Sequence[int], engine: SearchEngine
) -> dict[int, float]:
    nearest = nearest_neighbours(queries, gallery, min(max(ks), len(gallery)), engine=engine)  # (N, k)
    rows = np.repeat(np.arange(len(queries)), nearest.shape[1])
    hits = right[rows, nearest.numpy().reshape(-1)] > 0
    return _share_found(torch.from_numpy(np.asarray(hits).reshape(nearest.shape)), ks)


def _share_found(hits: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Cut-off -> share of the rows of hits (N, k) with one among the first."""
    found = hits.cumsum(dim=1) > 0
    return {k: float(found[:, min(k, hits.shape[1]) - 1].double().mean()) for k in ks}


def nearest_neighbours(
    queries: Tensor, gallery: Tensor, k: int, *, engine: SearchEngine = "auto", chunk_size: int = 1024
) -> Tensor:
    """Gallery indices of the k largest inner products, best first.

    Args:
        queries: (N, D).
        gallery: (M, D).
        k: At most M.
        engine: "faiss", "torch" or "auto".
        chunk_size: Queries per block of the similarity matrix (torch only), which bounds memory at
            chunk_size * M values.

    Returns:
        Indices (N, k) on the CPU.

    Raises:
        UserError: faiss is asked for and not installed.
    """
    has_faiss = find_spec("faiss") is not None
    if engine == "faiss" and not has_faiss:
        raise UserError(f"engine='faiss' needs faiss: {install_command('faiss')}, or use engine='torch'")
    if has_faiss and engine != "torch" and gallery.device.type == "cpu":
        return _search_with_faiss(queries, gallery, k)
    chunks = [(chunk @ gallery.T).topk(k, dim=1).indices.cpu() for chunk in queries.split(chunk_size)]
    return torch.cat(chunks)


def _search_with_faiss(queries: Tensor, gallery: Tensor, k: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.float().contiguous().numpy())
    _, nearest = index.search(queries.float().contiguous().numpy(), k)
    return torch.from_numpy(nearest)

"""Retrieval metrics: recall at k with several right answers per query, by exact search.

Used by the retrieval task's evaluation, in round 0 and after each round. The search is exhaustive
(no approximate index), through faiss when it is installed and chunked torch otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from models.errors import UserError, install_command

SearchEngine = Literal["auto", "faiss", "torch"]


def recall_at(
    queries: Tensor,
    gallery: Tensor,
    query_concepts: Tensor,
    gallery_concepts: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    engine: SearchEngine = "auto",
) -> dict[int, float]:
    """Share of queries with at least one right answer among their k nearest gallery entries.

    Args:
        queries: Normalised embeddings (N, D).
        gallery: Normalised embeddings (M, D).
        query_concepts: What each query shows, (N,) int64.
        gallery_concepts: What each gallery entry shows, (M,); equal to the query's = right answer.
        ks: The cut-offs; one above M counts the whole gallery.
        engine: Which exact search to use; "auto" is faiss where installed.

    Returns:
        Cut-off -> recall in [0, 1].
    """
    nearest = nearest_neighbours(queries, gallery, min(max(ks), gallery.shape[0]), engine=engine)  # (N, k)
    right = gallery_concepts.cpu()[nearest] == query_concepts.cpu().unsqueeze(1)  # (N, k)
    first = right.cumsum(dim=1) > 0
    return {k: float(first[:, min(k, nearest.shape[1]) - 1].double().mean()) for k in ks}


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

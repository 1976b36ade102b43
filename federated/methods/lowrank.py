"""Linear algebra on sums of low-rank products, without forming (d_out, d_in) matrices.

An adapter's weight update s * B @ A, a weighted sum of many of them, and the difference between two such sums
are all ``left @ right`` with few columns in ``left``; this file takes their SVD, norm and distance through QR
factorisations of the two thin factors ("QR core"), which costs O((d_out + d_in) q^2) for q columns instead of
O(d_out d_in min(d_out, d_in)). The distance alone forms the product, and only where that takes less time than
the QR factorisations.

The algebra runs in float64 and results return in the dtype that came in: the server's factors are small,
and a float32 QR core already loses the sixth digit at q = 160.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL_PRODUCT = 256 * 256
"""A matrix of so many values is formed in less time than its thin factors are factorised."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``left @ right``, in the orientation of ``nn.Linear.weight``.

    Attributes:
        left: (d_out, q); scalings and weights are folded in here.
        right: (q, d_in).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def num_columns(self) -> int:
        """q, an upper bound of the rank."""
        return self.left.shape[1]

    @property
    def num_values(self) -> int:
        """How many numbers the two factors hold: q * (d_out + d_in)."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Tensor:
        """Return the product, (d_out, d_in)."""
        return self.left @ self.right


def scaled(matrix: LowRank, factor: float) -> LowRank:
    """Return ``factor * matrix``."""
    return LowRank(matrix.left * factor, matrix.right)


def stack(terms: Sequence[LowRank]) -> LowRank:
    """Return the sum of at least one term, exactly: the factors side by side, q = the sum of theirs."""
    return LowRank(torch.cat([t.left for t in terms], dim=1), torch.cat([t.right for t in terms], dim=0))


def difference(first: LowRank, second: LowRank) -> LowRank:
    """Return ``first - second``."""
    return stack([first, scaled(second, -1.0)])


def svd(matrix: LowRank, num_components: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take the thin singular value decomposition through the QR core.

    With Q_l R_l = left and Q_r R_r = right^T, left @ right = Q_l (R_l R_r^T) Q_r^T, and the SVD of the small
    matrix in the middle gives that of the whole. Q_l and Q_r stay Householder reflections and are applied to
    the components asked for.

    Args:
        matrix: At least one column.
        num_components: How many leading components to return; None: all.

    Returns:
        U (d_out, p), the singular values (p,) in descending order and V^T (p, d_in), with
        p = min(q, d_out, d_in) or fewer; U and V have orthonormal columns even where a singular value is 0.
    """
    left, right = _factorise(matrix.left), _factorise(matrix.right.T)
    u, singular_values, vt = torch.linalg.svd(left.core @ right.core.T, full_matrices=False)
    kept = slice(num_components)
    dtype = matrix.left.dtype
    return (
        _apply_basis(left, u[:, kept]).to(dtype),
        singular_values[kept].to(dtype),
        _apply_basis(right, vt[kept].T).T.to(dtype),
    )


@dataclass(frozen=True, eq=False)
class _Factorisation:
    """A QR factorisation: Householder reflections for Q (d, p), and ``core`` = R (p, q)."""

    reflections: Tensor
    coefficients: Tensor
    core: Tensor


def _factorise(tall: Tensor) -> _Factorisation:
    """Factorise a (d, q) matrix in float64; p = min(d, q)."""
    packed, coefficients = torch.geqrf(tall.double())
    num_reflections = coefficients.shape[0]
    return _Factorisation(packed[:, :num_reflections], coefficients, packed[:num_reflections].triu())


def _apply_basis(factorisation: _Factorisation, inner: Tensor) -> Tensor:
    """Return Q @ inner, (d, columns), of an inner (p, columns)."""
    padded = inner.new_zeros(factorisation.reflections.shape[0], inner.shape[1])
    padded[: inner.shape[0]] = inner
    return torch.ormqr(factorisation.reflections, factorisation.coefficients, padded)


def truncate(matrix: LowRank, rank: int) -> LowRank:
    """Return the best approximation of at most ``rank`` columns in Frobenius norm (Eckart and Young).

    The result is in SVD form, (U_r S_r) @ V_r^T; a matrix with no more columns than that returns as it is.
    """
    if matrix.num_columns <= rank:
        return matrix
    if rank == 0:
        return LowRank(matrix.left[:, :0], matrix.right[:0])
    u, singular_values, vt = svd(matrix, rank)
    return LowRank(u * singular_values, vt)


def frobenius_norm(matrix: LowRank) -> float:
    """Return the Frobenius norm, accurate also where the terms of a stack cancel.

    ||left @ right|| = ||R_l R_r^T|| with the triangular factors of ``svd``. The cheaper ``product_norm``
    squares first and so cannot see below about 1e-8 of the terms' own size.
    """
    if matrix.num_columns == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(_factorise(matrix.left).core @ _factorise(matrix.right.T).core.T))


def product_norm(matrix: LowRank) -> float:
    """Return the Frobenius norm of a single product by Gram matrices: sqrt(tr((L^T L)(R R^T))).

    For the size of something (HetLoRA's weights, what an error is relative to), not for differences.
    """
    left, right = matrix.left.double(), matrix.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0.0).sqrt())


def distance_and_size(approximation: LowRank, ideal: LowRank) -> tuple[float, float]:
    """Return ||approximation - ideal||_F and ||ideal||_F, the distance accurate also where it is small."""
    if math.prod(ideal.shape) <= _SMALL_PRODUCT or 4 * ideal.num_columns >= min(ideal.shape):
        dense = ideal.left.double() @ ideal.right.double()
        gap = dense - approximation.left.double() @ approximation.right.double()
        return float(torch.linalg.matrix_norm(gap)), float(torch.linalg.matrix_norm(dense))
    return frobenius_norm(difference(approximation, ideal)), product_norm(ideal)

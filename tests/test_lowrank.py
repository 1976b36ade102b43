"""QR-core linear algebra against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

from federated.methods import lowrank
from federated.methods.lowrank import (
    LowRank,
    difference,
    distance_and_size,
    frobenius_norm,
    product_norm,
    scaled,
    stack,
    svd,
    truncate,
)

SHAPES = [(40, 30, 5), (30, 40, 5), (10, 50, 25), (50, 10, 25), (6, 7, 20), (8, 8, 8), (9, 4, 1)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
shapes = pytest.mark.parametrize(("d_out", "d_in", "columns"), SHAPES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def low_rank(
    d_out: int, d_in: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d_out, columns, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, d_in, generator=generator, dtype=torch.float64)
    return LowRank(left.to(dtype), right.to(dtype))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@shapes
@both_dtypes
def test_qr_core_svd_equals_the_dense_svd(d_out, d_in, columns, dtype):
    matrix = low_rank(d_out, d_in, columns, dtype)
    u, singular_values, vt = svd(matrix)
    dense = matrix.left.double() @ matrix.right.double()
    components = min(d_out, d_in, columns)
    assert u.dtype == singular_values.dtype == vt.dtype == dtype
    assert (u.shape, vt.shape) == ((d_out, components), (components, d_in))
    assert relative(singular_values, torch.linalg.svdvals(dense)[:components]) < TOLERANCE[dtype]
    assert relative((u.double() * singular_values.double()) @ vt.double(), dense) < TOLERANCE[dtype]
    for basis in (u.T.double() @ u.double(), vt.double() @ vt.T.double()):
        torch.testing.assert_close(basis, torch.eye(components).double(), rtol=0, atol=10 * TOLERANCE[dtype])


@shapes
@both_dtypes
def test_truncation_is_the_best_approximation_of_its_rank(d_out, d_in, columns, dtype):
    matrix = low_rank(d_out, d_in, columns, dtype)
    dense = matrix.left.double() @ matrix.right.double()
    u, singular_values, vt = torch.linalg.svd(dense, full_matrices=False)
    for rank in (0, 1, 3):
        best = (u[:, :rank] * singular_values[:rank]) @ vt[:rank]
        cut = truncate(matrix, rank)
        assert cut.num_columns == min(rank, columns)
        assert float((cut.dense().double() - best).norm() / dense.norm()) < 2 * TOLERANCE[dtype]


def test_the_svd_of_zero_has_orthonormal_bases_inside_the_row_space():
    right = low_rank(4, 9, 3).right
    u, singular_values, vt = svd(LowRank(torch.zeros(5, 3).double(), right))
    assert not singular_values.any()
    torch.testing.assert_close(u.T @ u, torch.eye(3).double())
    torch.testing.assert_close(vt @ vt.T, torch.eye(3).double())
    projector = torch.linalg.pinv(right) @ right
    torch.testing.assert_close(vt @ projector, vt)


@shapes
def test_norms_equal_the_dense_norm(d_out, d_in, columns):
    matrix = low_rank(d_out, d_in, columns)
    assert frobenius_norm(matrix) == pytest.approx(float(matrix.dense().norm()), rel=1e-13)
    assert product_norm(matrix) == pytest.approx(float(matrix.dense().norm()), rel=1e-13)


def test_a_stack_is_the_sum_and_scaling_the_multiple():
    terms = [low_rank(8, 5, columns, seed=columns) for columns in (1, 2, 4)]
    dense = sum(term.dense() for term in terms)
    assert stack(terms).num_columns == 7
    torch.testing.assert_close(stack(terms).dense(), dense)
    torch.testing.assert_close(scaled(stack(terms), -0.3).dense(), -0.3 * dense)


def test_a_difference_far_below_its_terms_is_still_measured():
    """Squaring first (Gram matrices) would see nothing below 1e-8 of the terms."""
    matrix, small = low_rank(60, 50, 7), scaled(low_rank(60, 50, 2, seed=9), 1e-12)
    found = frobenius_norm(difference(stack([matrix, small]), matrix))
    assert found == pytest.approx(frobenius_norm(small), rel=1e-2)


@pytest.mark.parametrize("small", [0, 256 * 256])  # products up to this size are formed
@shapes
def test_distance_and_size_equal_the_dense_ones(d_out, d_in, columns, small, monkeypatch):
    monkeypatch.setattr(lowrank, "_SMALL_PRODUCT", small)
    ideal, other = low_rank(d_out, d_in, columns), low_rank(d_out, d_in, 3, seed=1)
    dense = float((other.dense() - ideal.dense()).norm()), float(ideal.dense().norm())
    assert distance_and_size(other, ideal) == pytest.approx(dense, rel=1e-12)


def test_distance_and_size_of_zeros_are_defined():
    zero, other = LowRank(torch.zeros(4, 0), torch.zeros(0, 5)), low_rank(4, 5, 2, torch.float32)
    size = float(other.dense().norm())
    assert distance_and_size(zero, zero) == (0.0, 0.0)
    assert distance_and_size(other, zero) == pytest.approx((size, 0.0))
    assert distance_and_size(zero, other) == pytest.approx((size, size))


def test_counts_are_those_of_the_factors():
    matrix = low_rank(8, 5, 3)
    assert (matrix.shape, matrix.num_columns, matrix.num_values) == ((8, 5), 3, 3 * 13)

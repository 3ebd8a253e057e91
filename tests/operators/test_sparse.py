"""SparseOperator: the same numbers as its dense matrix, direct solves, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from invgen.covariance import Diagonal
from invgen.operators import MatrixOperator, SparseOperator

F64 = torch.float64


def pair(n_data: int = 7, n_model: int = 12) -> tuple[SparseOperator, MatrixOperator]:
    matrix = scipy.sparse.random(n_data, n_model, density=0.3, random_state=np.random.default_rng(3))
    sparse = SparseOperator.from_scipy(matrix, (1, 3, 4), (n_data,))
    return sparse, MatrixOperator(torch.from_numpy(matrix.toarray()), (1, 3, 4), (n_data,))


def test_same_numbers_as_the_dense_matrix() -> None:
    sparse, dense = pair()
    x, d = torch.randn(5, 1, 3, 4, dtype=F64), torch.randn(5, 7, dtype=F64)
    torch.testing.assert_close(sparse(x), dense(x))
    torch.testing.assert_close(sparse.adjoint(d), dense.adjoint(d))
    torch.testing.assert_close(sparse(x.float()).double(), dense(x), rtol=1e-5, atol=1e-6)


def test_entries_given_twice_add_up() -> None:
    A = SparseOperator(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2.0, 3.0]), (2,), (1,))
    torch.testing.assert_close(A.to_dense(), torch.tensor([[0.0, 5.0]], dtype=F64))


@pytest.mark.parametrize("variance", [0.3, torch.tensor([0.1, 0.5, 2.0], dtype=F64)])
def test_direct_solve_is_the_solve_of_the_dense_matrix(variance: float | torch.Tensor) -> None:
    sparse, dense = pair()
    rhs = torch.randn(3, 7, dtype=F64)
    solved = sparse.solve(rhs, 0.2, variance)
    torch.testing.assert_close(solved.x, dense.solve(rhs, 0.2, variance).x)
    diagonal = Diagonal(torch.rand(7, dtype=F64) + 0.1)  # no closed form: conjugate gradients
    torch.testing.assert_close(sparse.solve(rhs, diagonal, 0.5).x, dense.solve(rhs, diagonal, 0.5).x)


@pytest.mark.parametrize(
    ("rows", "columns", "values", "message"),
    [
        ([0, 1], [0], [1.0, 1.0], "one length"),
        ([0], [9], [1.0], "column indices run from 9 to 9"),
        ([-1], [0], [1.0], "row indices"),
        ([0], [0], [float("nan")], "finite"),
    ],
)
def test_bad_input_is_named(rows: list[int], columns: list[int], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseOperator(torch.tensor(rows), torch.tensor(columns), torch.tensor(values), (3,), (2,))


def test_a_scipy_matrix_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="must be its columns and rows"):
        SparseOperator.from_scipy(scipy.sparse.eye(4), (3,), (4,))

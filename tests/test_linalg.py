import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invgen.contracts import LinearOperator
from invgen.covariance import Dense, Diagonal, Scalar, Stationary
from invgen.linalg import cg, dot_test, gmres, inner, lanczos, norm, randomized_eigh


def spd(batch, n, condition=100.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=dtype)).Q
    w = torch.logspace(0, math.log10(condition), n, dtype=dtype.to_real())
    return q @ torch.diag_embed(w.to(dtype)).expand(batch, n, n) @ q.mH


def times(A):
    return lambda v: torch.einsum("bij,bj->bi", A, v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_cg_solves(dtype):
    A, b = spd(5, 20, dtype=dtype), torch.randn(5, 20, dtype=dtype)
    out = cg(times(A), b, rtol=1e-11)
    torch.testing.assert_close(out.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert out.converged.all()
    assert (norm(b - times(A)(out.x)) / norm(b) <= 1e-11).all()
    torch.testing.assert_close(out.residual, norm(b - times(A)(out.x)) / norm(b), rtol=1e-2, atol=1e-15)


def test_cg_items_do_not_depend_on_their_mates():
    def times(A):  # a product that rounds alike for any batch: CG amplifies rounding where it has not converged
        return lambda v: (A * v[:, None, :]).sum(-1)

    A = torch.cat([spd(2, 30, 10.0), spd(2, 30, 1e4, seed=1)])
    b = torch.randn(4, 30, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6, 1.0], dtype=torch.float64)[:, None]
    together = cg(times(A), b, rtol=1e-4, max_iter=40)
    for i in range(4):
        alone = cg(times(A[i : i + 1]), b[i : i + 1], rtol=1e-4, max_iter=40)
        torch.testing.assert_close(together.x[i], alone.x[0], rtol=1e-10, atol=1e-10 * float(b[i].abs().max()))
        assert bool(together.converged[i]) == bool(alone.converged[0])
    assert together.converged[:2].all()


def test_cg_freezes_what_has_converged():
    A = torch.cat([spd(1, 30, 2.0), spd(1, 30, 1e5, seed=1)])
    b = torch.randn(2, 30, dtype=torch.float64)
    short, long = cg(times(A), b, rtol=1e-3, max_iter=20), cg(times(A), b, rtol=1e-3, max_iter=400)
    assert torch.equal(short.x[0], long.x[0])
    assert not short.converged[1]


def test_cg_reports_what_has_not_converged():
    A, b = spd(3, 40, 1e4), torch.randn(3, 40, dtype=torch.float64)
    out = cg(times(A), b, rtol=1e-8, max_iter=5)
    assert not out.converged.any()
    assert (out.residual > 1e-8).all()
    assert out.iterations == 5


def test_cg_in_float32_at_condition_1e6_does_not_claim_success():
    A64 = spd(6, 60, 1e6)
    A, b = A64.float(), torch.randn(6, 60)
    out = cg(times(A), b, rtol=1e-6, max_iter=5000)
    true = norm(b.double() - times(A64.float().double())(out.x.double())) / norm(b.double())
    assert not (out.converged & (true > 1.5e-6)).any()  # the residual itself is evaluated in float32
    assert not out.converged.all()


def test_cg_nan_item_neither_stalls_nor_poisons():
    A, b = spd(3, 20), torch.randn(3, 20, dtype=torch.float64)
    b[1, 3] = float("nan")
    out = cg(times(A), b, rtol=1e-10)
    assert out.converged.tolist() == [True, False, True]
    assert out.iterations < 100
    keep = [0, 2]
    torch.testing.assert_close(out.x[keep], torch.linalg.solve(A, b)[keep], rtol=1e-8, atol=1e-9)


def test_cg_zero_right_hand_side_and_warm_start():
    A, b = spd(2, 20), torch.randn(2, 20, dtype=torch.float64)
    b[0] = 0
    exact = torch.linalg.solve(A, b)
    out = cg(times(A), b, start=torch.ones_like(b), rtol=1e-10)
    assert out.converged.all()
    torch.testing.assert_close(out.x, exact, rtol=1e-8, atol=1e-9)
    cold = cg(times(A), b, rtol=1e-6)
    warm = cg(times(A), b, start=exact + 1e-5 * torch.randn_like(b), rtol=1e-6)
    assert warm.iterations < cold.iterations


def test_cg_preconditioner_saves_iterations():
    d = torch.logspace(0, 5, 50, dtype=torch.float64)
    A = torch.diag(d) + 0.1 * spd(1, 50, 10.0)[0]
    b = torch.randn(4, 50, dtype=torch.float64)
    plain, helped = cg(lambda v: v @ A, b, rtol=1e-9), cg(lambda v: v @ A, b, rtol=1e-9, preconditioner=lambda v: v / d)
    assert helped.converged.all()
    assert helped.iterations < plain.iterations / 2
    torch.testing.assert_close(helped.x, torch.linalg.solve(A, b.mT).mT, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("warm", [False, True])
def test_gmres_non_symmetric(dtype, warm):
    A = torch.randn(4, 12, 12, dtype=dtype) + 4 * torch.eye(12, dtype=dtype)
    b = torch.randn(4, 12, dtype=dtype)
    start = torch.randn_like(b) if warm else None
    out = gmres(times(A), b, iterations=12, start=start)
    torch.testing.assert_close(out.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-10)
    assert out.converged.all()
    short = gmres(times(A), b, iterations=4, start=start)
    torch.testing.assert_close(short.residual, norm(b - times(A)(short.x)) / norm(b), rtol=1e-9, atol=1e-12)


def test_gmres_stops_apart_survives_breakdown_and_nan():
    eye = torch.eye(10, dtype=torch.float64)
    A = torch.stack(
        [
            eye,
            torch.randn(10, 10, dtype=torch.float64) + 4 * eye,
            2 * eye,
            torch.randn(10, 10, dtype=torch.float64) + 4 * eye,
        ]
    )
    b = torch.randn(4, 10, dtype=torch.float64)
    b[3, 0] = float("nan")
    for rtol in (0.0, 1e-12):
        out = gmres(times(A), b, iterations=10, rtol=rtol)
        torch.testing.assert_close(out.x[:3], torch.linalg.solve(A, b)[:3], rtol=1e-9, atol=1e-10)
        assert out.converged.tolist() == [True, True, True, False]
    mixed, alone = gmres(times(A), b, iterations=10, rtol=1e-2), gmres(times(A[1:2]), b[1:2], iterations=10, rtol=1e-2)
    torch.testing.assert_close(mixed.x[1], alone.x[0], rtol=1e-10, atol=1e-12)
    zero = gmres(times(A), torch.zeros_like(b), iterations=3, rtol=1e-9)
    assert torch.equal(zero.x, torch.zeros_like(b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_lanczos(dtype):
    A = spd(3, 15, 50.0, dtype=dtype)
    start = torch.randn(3, 15, dtype=dtype)
    out = lanczos(times(A), start, 15)
    eye = torch.eye(15, dtype=dtype).expand(3, 15, 15)
    torch.testing.assert_close(out.basis.conj() @ out.basis.mT, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.linalg.eigvalsh(out.matrix()), torch.linalg.eigvalsh(A), rtol=1e-8, atol=1e-8)
    part = lanczos(times(A), start, 6)
    Q = part.basis.mT  # columns
    torch.testing.assert_close(Q.mH @ A @ Q, part.matrix().to(dtype), rtol=0, atol=1e-9)
    residual = (A @ Q - Q @ part.matrix().to(dtype)).norm(dim=(1, 2))
    torch.testing.assert_close(residual, part.last, rtol=1e-8, atol=1e-9)


def test_lanczos_exhausted_space():
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)).expand(1, 4, 4)
    out = lanczos(times(A), torch.ones(1, 4, dtype=torch.float64), 4)
    assert torch.isfinite(out.matrix()).all()
    torch.testing.assert_close(
        torch.linalg.eigvalsh(out.matrix()[:, :2, :2]), torch.tensor([[1.0, 5.0]], dtype=torch.float64)
    )
    assert out.off_diagonal[0, 1] == 0
    assert lanczos(times(A), torch.ones(1, 4, dtype=torch.float64), 1).off_diagonal.shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_randomized_eigh(dtype):
    n = 60
    q = torch.linalg.qr(torch.randn(n, n, dtype=dtype)).Q
    w = 0.7 ** torch.arange(n, dtype=torch.float64)
    A = q @ torch.diag(w.to(dtype)) @ q.mH
    values, vectors = randomized_eigh(lambda v: (v.reshape(-1, n) @ A.mT).reshape(v.shape), (6, 10), 8, dtype=dtype)
    torch.testing.assert_close(values, w[:8], rtol=1e-6, atol=1e-9)
    V = vectors.reshape(8, n)
    torch.testing.assert_close(V.conj() @ V.mT, torch.eye(8, dtype=dtype), rtol=0, atol=1e-10)
    low_rank = V.mT @ torch.diag(values.to(dtype)) @ V.conj()
    assert torch.linalg.matrix_norm(A - low_rank, 2) < 1.05 * w[8]  # the best possible is w[8]
    with pytest.raises(ValueError, match="ask for 1 to 60"):
        randomized_eigh(lambda v: v, (60,), 61)


@given(st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_cg_any_size(batch, n, is_complex):
    dtype = torch.complex128 if is_complex else torch.float64
    A, b = spd(batch, n, 10.0, dtype=dtype), torch.randn(batch, n, dtype=dtype)
    torch.testing.assert_close(cg(times(A), b, rtol=1e-12).x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


def test_dot_test_finds_a_wrong_adjoint():
    A = torch.randn(5, 7, dtype=torch.complex128)
    u, v = torch.randn(3, 7, dtype=torch.complex128), torch.randn(3, 5, dtype=torch.complex128)
    assert dot_test(lambda x: x @ A.mT, lambda d: d @ A.conj(), u, v) < 1e-14
    assert dot_test(lambda x: x @ A.mT, lambda d: d @ A, u, v) > 1e-3
    assert dot_test(lambda x: x.to(A.dtype) @ A.mT, lambda d: (d @ A.conj()).real, u.real, v) < 1e-14
    assert inner(u, u).dtype == torch.float64


# --- LinearOperator.solve, the iteration behind every operator without a structure of its own ---------------------------


class Plain(LinearOperator):
    def __init__(self, M, model_shape=None):
        super().__init__(model_shape or (M.shape[1],), (M.shape[0],))
        self.register_buffer("M", M)

    def forward(self, x, **theta):
        return x.flatten(1).to(self.M.dtype) @ self.M.mT

    def adjoint(self, d):
        return (d @ self.M.conj()).reshape(-1, *self.model_shape)


def rows(scale=1.0):
    return Plain(scale * torch.randn(8, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("R", "C"),
    [
        (0.3, 2.0),
        (torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)),
        (Diagonal(torch.logspace(-4, 2, 8, dtype=torch.float64)), Scalar(2.0, (12,))),
        (Dense(spd(1, 8, 30.0)[0]), Dense(spd(1, 12, 30.0)[0])),
    ],
)
def test_solve_and_solve_model_against_dense(R, C):
    from invgen.covariance import as_covariance

    A = rows()
    rhs, back = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    data, model = A.solve(rhs, R, C), A.solve_model(back, R, C)
    assert data.converged.all()
    assert model.converged.all()
    for i in range(3):
        Ri, Ci = (
            as_covariance(v[i] if isinstance(v, torch.Tensor) else v, s).dense() for v, s in ((R, (8,)), (C, (12,)))
        )
        torch.testing.assert_close(data.x[i], torch.linalg.solve(Ri + A.M @ Ci @ A.M.mT, rhs[i]), rtol=1e-6, atol=1e-7)
        normal = A.M.mT @ torch.linalg.solve(Ri, A.M) + torch.linalg.inv(Ci)
        torch.testing.assert_close(model.x[i], torch.linalg.solve(normal, back[i]), rtol=1e-6, atol=1e-7)


def test_noise_levels_cost_no_iterations():
    A, rhs = rows(1e-3), torch.randn(3, 8, dtype=torch.float64)
    spread = A.solve(rhs, Diagonal(torch.logspace(-3, 3, 8, dtype=torch.float64)), 1e-3)
    assert spread.converged.all()
    assert spread.iterations <= 12  # 8 unknowns; unpreconditioned it takes far more in rounding


def test_solve_reports_float32_failure():
    u, _, v = torch.linalg.svd(torch.randn(40, 40, dtype=torch.float64))
    A = Plain((u * torch.logspace(0, -3, 40, dtype=torch.float64)) @ v).float()
    out = A.solve(torch.randn(4, 40), 1e-6, 1.0, rtol=1e-6)
    assert not out.converged.all()
    assert (out.residual[~out.converged] > 1e-6).all()


def test_solve_model_with_a_padded_field_falls_back_to_data_space():
    k = torch.arange(20.0, dtype=torch.float64)
    S = torch.fft.fft((-0.5 * torch.minimum(k, 20 - k) ** 2).exp()).real.clamp_min(0)
    C = Stationary(S, (1, 12))
    A = Plain(torch.randn(8, 12, dtype=torch.float64), (1, 12))
    back = torch.randn(3, 1, 12, dtype=torch.float64)
    out = A.solve_model(back, 0.1, C)
    full = C.dense()
    expected = full - full @ A.M.mT @ torch.linalg.solve(
        0.1 * torch.eye(8, dtype=torch.float64) + A.M @ full @ A.M.mT, A.M @ full
    )
    torch.testing.assert_close(out.x[:, 0], back[:, 0] @ expected.mT, rtol=1e-6, atol=1e-8)
    assert out.converged.all()
    with pytest.raises(TypeError, match="leave start out"):
        A.solve_model(back, 0.1, C, start=back)

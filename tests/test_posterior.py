import numpy as np
import pytest
import torch

from invgen.contracts import Operator
from invgen.grid import Grid
from invgen.noise import GaussianNoise
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem

GRID = Grid((4, 5), (2.0, 3.0), (10.0, 0.0), units=("m", "seconds"), channels=("log_impedance",))


class Gain(Operator):
    theta_names = ("gain",)

    def forward(self, x, *, gain):
        return x * gain.reshape(-1, 1)


def posterior(weights=None, **more):
    return Posterior(
        torch.randn(2, 3, 7, 1, 4, 5, dtype=torch.float64), "approximate", weights=weights, grid=GRID, **more
    )


def weights():
    w = torch.rand(2, 3, 7, dtype=torch.float64)
    w[:, 0, :3] = 0
    return w / w.sum((1, 2), keepdim=True)


def test_unweighted_figures_are_numpys():
    p = posterior()
    s = p.samples.flatten(1, 2).numpy()
    np.testing.assert_allclose(p.mean(), s.mean(1))
    np.testing.assert_allclose(p.std(), s.std(1, ddof=1))
    np.testing.assert_allclose(
        p.quantile(torch.tensor([0.0, 0.05, 0.5, 1.0])), np.quantile(s, [0.0, 0.05, 0.5, 1.0], axis=1)
    )
    assert p.quantile(0.5).shape == (2, 1, 4, 5)


def test_equal_weights_change_nothing_and_zero_weights_leave_out():
    p = posterior()
    q = Posterior(p.samples, "approximate", weights=torch.full((2, 3, 7), 1 / 21, dtype=torch.float64))
    for level in (0.0, 0.05, 0.31, 0.5, 1.0):
        torch.testing.assert_close(q.quantile(level), p.quantile(level))
    torch.testing.assert_close(q.std(), p.std())
    w = torch.ones(2, 3, 7, dtype=torch.float64)
    w[:, 1] = 0
    samples = p.samples.clone()
    samples[:, 1] = float("nan")  # what diverged
    r = Posterior(samples, "approximate", weights=w / 14)
    kept = p.samples[:, [0, 2]].flatten(1, 2).numpy()
    np.testing.assert_allclose(r.mean(), kept.mean(1))
    np.testing.assert_allclose(r.std(), kept.std(1, ddof=1))
    np.testing.assert_allclose(
        r.quantile(torch.tensor([0.0, 0.05, 0.5, 1.0])), np.quantile(kept, [0.0, 0.05, 0.5, 1.0], axis=1)
    )


def test_weighted_figures():
    p = posterior(weights())
    s, w = p.samples.flatten(1, 2).numpy(), p.weights.flatten(1, 2).numpy()
    for o in range(2):
        mean = np.average(s[o], axis=0, weights=w[o])
        np.testing.assert_allclose(p.mean()[o], mean)
        ess = 1 / (w[o] ** 2).sum()
        np.testing.assert_allclose(
            p.std()[o], np.sqrt(np.average((s[o] - mean) ** 2, axis=0, weights=w[o]) * ess / (ess - 1))
        )
        x = s[o, :, 0, 1, 2]
        order = np.argsort(x[w[o] > 0])
        v, m = x[w[o] > 0][order], w[o][w[o] > 0][order]
        position = (np.cumsum(m) - m) / (1 - m)
        for level in (0.0, 0.1, 0.5, 0.9, 1.0):
            np.testing.assert_allclose(float(p.quantile(level)[o, 0, 1, 2]), np.interp(level, position, v))


def test_weighted_quantiles_approach_the_target():
    n = 20000
    x = torch.randn(n, dtype=torch.float64) * 2
    w = torch.exp(-0.5 * (x - 1) ** 2 + 0.125 * x**2)  # importance weights for N(1, 1)
    p = Posterior(x.reshape(1, 1, n, 1), "approximate", weights=(w / w.sum()).reshape(1, 1, n))
    ess = float(1 / (w / w.sum()).square().sum())
    for level, z in ((0.05, -1.6449), (0.5, 0.0), (0.95, 1.6449)):
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        error = np.sqrt(level * (1 - level) / ess) / density
        assert abs(float(p.quantile(level)) - 1 - z) < 5 * error


def test_a_point_estimate_has_no_spread():
    p = Posterior(torch.randn(1, 1, 3, 2), "point")
    p.mean()
    for call in (p.std, lambda: p.quantile(0.5)):
        with pytest.raises(TypeError, match="point estimate"):
            call()
    with pytest.raises(ValueError, match="at least two"):
        Posterior(torch.randn(1, 1, 1, 2), "exact").std()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Posterior(torch.randn(1, 1, 4, 2), "exact").quantile(1.5)


def test_nothing_left_is_nan_not_zero():
    w = torch.zeros(1, 1, 3)
    p = Posterior(torch.full((1, 1, 3, 2), float("nan")), "exact", weights=w)
    assert torch.isnan(p.mean()).all()
    assert torch.isnan(p.std()).all()
    assert torch.isnan(p.quantile(0.5)).all()
    one = Posterior(torch.ones(1, 1, 3, 2), "exact", weights=torch.tensor([[[1.0, 0.0, 0.0]]]))
    assert torch.isnan(one.std()).all()


def test_complex_samples():
    z = torch.randn(1, 1, 50, 3, dtype=torch.complex128)
    p = Posterior(z, "exact")
    torch.testing.assert_close(p.mean(), z[0].mean(1))
    torch.testing.assert_close(p.std()[0], (z[0, 0] - z[0, 0].mean(0)).abs().square().sum(0).div(49).sqrt())
    with pytest.raises(TypeError, match="no order"):
        p.quantile(0.5)


FULL = {
    "weights": None,
    "log_evidence": torch.tensor([1.0, 2.0]),
    "latent": torch.randn(2, 3, 7, 6),
    "theta": {"sd": torch.rand(2, 3, 7)},
    "stats": {
        "first_bad_step": -torch.ones(2, 3, 7, dtype=torch.long),
        "ok": torch.ones(2, 3, 7, dtype=torch.bool),
        "path": torch.rand(2, 3, 7, 2),
    },
    "counts": {"network": 3, "forward": 4, "adjoint": 5},
    "settings": {"solver": "X", "steps": 4, "interrupted": False, "tol": None},
    "seed": 7,
    "seconds": 1.5,
    "versions": {"invgen": "0"},
}


@pytest.mark.parametrize("grid", [GRID, None, Grid((4, 5), (1.0, 1.0))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_save_and_load(tmp_path, grid, dtype):
    p = Posterior(torch.randn(2, 3, 7, 1, 4, 5, dtype=dtype), "exact", grid=grid, **{**FULL, "weights": weights()})
    q = Posterior.load(p.save(tmp_path / "new" / "p.nc"))
    assert torch.equal(q.samples, p.samples)
    assert q.samples.dtype == dtype
    for name in ("weights", "log_evidence", "latent"):
        assert torch.equal(getattr(q, name), getattr(p, name))
    assert torch.equal(q.theta["sd"], p.theta["sd"])
    assert set(q.stats) == set(p.stats)
    assert all(torch.equal(q.stats[k], v) and q.stats[k].dtype == v.dtype for k, v in p.stats.items())
    assert (q.kind, q.counts, q.settings, q.seed, q.seconds, q.versions, q.grid) == (
        p.kind,
        p.counts,
        p.settings,
        p.seed,
        p.seconds,
        p.versions,
        grid,
    )
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["p.nc"]
    q.save(tmp_path / "new" / "p.nc")  # over the old one


def test_files_that_are_not_posteriors(tmp_path):
    (tmp_path / "x.nc").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a posterior"):
        Posterior.load(tmp_path / "x.nc")
    file = posterior().save(tmp_path / "p.nc")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a posterior"):
        Posterior.load(file)
    with pytest.raises(FileNotFoundError, match="no posterior"):
        Posterior.load(tmp_path / "none.nc")
    with pytest.raises(OSError, match="can be written to"):
        posterior().save(tmp_path / "x.nc" / "p.nc")


def test_arviz():
    az = pytest.importorskip("arviz")
    data = Posterior(
        torch.randn(2, 4, 50, 1, 2, 2), "exact", grid=Grid((2, 2), (1.0, 1.0)), stats={"accept": torch.rand(2, 4, 50)}
    ).to_arviz(1)
    assert set(data.groups()) == {"posterior", "sample_stats"}
    assert data.posterior["model"].dims == ("chain", "draw", "channel", "z", "x")
    assert float(az.rhat(data)["model"].max()) < 1.2


def test_predict_passes_the_nuisance_parameters():
    problem = InverseProblem(torch.zeros(3), Gain((3,), (3,)), GaussianNoise(1.0), GaussianPrior(0.0, 1.0, shape=(3,)))
    p = Posterior(torch.randn(1, 2, 5, 3), "exact", theta={"gain": torch.rand(1, 2, 5)}, problem=problem)
    (d,) = p.predict(chunk=3)
    assert d.shape == (1, 2, 5, 3)
    torch.testing.assert_close(d, p.samples * p.theta["gain"][..., None])
    with pytest.raises(ValueError, match="does not know its problem"):
        Posterior(torch.randn(1, 2, 5, 3), "exact").predict()

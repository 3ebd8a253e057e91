"""The report: one file, self-contained, honest about what it shows, for every shape of model."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from invgen.grid import Grid
from invgen.noise import GaussianNoise, LaplaceNoise
from invgen.operators.imaging import Identity
from invgen.operators.matrix import MatrixOperator
from invgen.posterior import Posterior
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem, Term
from invgen.report import write_report
from invgen.report.fit import data_fit
from invgen.solvers import MAP, TotalVariation

GRID = Grid((8, 10), (4.0, 4.0), axes=("z", "x"), units=("m", "m"), channels=("log_impedance",), channel_units=("ln",))


class Box:
    """A prior's outside: shape, grid, nothing else."""

    transform = None

    def __init__(self, shape: tuple[int, ...], grid: Grid | None = None) -> None:
        self.shape, self.grid = shape, grid


def made(shape: tuple[int, ...], n: int = 19, kind: str = "approximate", **more: object) -> Posterior:
    g = torch.Generator().manual_seed(0)
    return Posterior(
        torch.randn(1, 1, n, *shape, generator=g),
        kind=kind,
        settings={"solver": "PnPDM", "iterations": 60, "num_samples": n, "dtype": "float32"},
        counts={"network": 10 * n, "forward": n, "adjoint": 0},
        seconds=3.0,
        seed=7,
        stats={"first_bad_step": torch.full((1, 1, n), -1)},
        **more,  # type: ignore[arg-type]
    )


def field_problem() -> InverseProblem:
    truth = torch.zeros(1, 1, 8, 10)
    terms = [
        Term(truth + 0.1, Identity((1, 8, 10)), GaussianNoise(0.5), name="seismic <1>"),
        Term(
            truth,
            Identity((1, 8, 10)),
            LaplaceNoise(0.5),
            mask=torch.rand((1, 8, 10), generator=torch.Generator().manual_seed(1)) > 0.3,
            name="masked",
        ),
    ]
    return InverseProblem(terms=terms, prior=Box((1, 8, 10), GRID))


def read(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    outside = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:)", outside)
    assert "http" not in outside
    assert "<script" not in outside
    for image in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert base64.b64decode(image)[:8] == b"\x89PNG\r\n\x1a\n"
    return outside


def test_a_field_with_truth_and_two_terms(tmp_path: Path) -> None:
    posterior = made((1, 8, 10), grid=GRID, problem=field_problem())
    page = read(write_report(posterior, tmp_path / "deep" / "r.html", truth=torch.zeros(1, 8, 10), title="A <section>"))
    for text in (
        "A &lt;section&gt;",
        "seismic &lt;1&gt;",
        "Approximate",
        "log impedance",
        "truth inside the min–max band",
        "190",
        "seed=7",
        "invgen.PnPDM(",
        "iterations=60",
        "χ²",
    ):
        assert text in page
    assert "num_samples=" not in page
    assert page.count("<img") == 2 + 1 + 2 * 2


@pytest.mark.parametrize("shape", [(5,), (1, 30), (2, 8, 9), (1, 6, 5, 7)])
def test_every_shape_of_model(tmp_path: Path, shape: tuple[int, ...]) -> None:
    page = read(write_report(made(shape), tmp_path / "r.html", truth=torch.zeros(shape)))
    assert "not the data" in page
    assert page.count("<img") == {1: 1, 2: 1, 3: 6, 4: 3}[len(shape)]


def test_a_point_estimate_claims_no_spread(tmp_path: Path) -> None:
    page = read(write_report(made((1, 8, 10), 1, "point", grid=GRID, problem=field_problem()), tmp_path / "r.html"))
    assert "says nothing about uncertainty" in page
    assert "effective number" not in page
    assert "samples (median" not in page


def test_weights_and_bad_samples(tmp_path: Path) -> None:
    posterior = made((3,), 10, "exact", weights=torch.tensor([0.9, 0.1] + [0.0] * 8).reshape(1, 1, 10))
    posterior.samples[0, 0, 5] = float("nan")
    posterior.stats["first_bad_step"][0, 0, 5] = 3
    page = read(write_report(posterior, tmp_path / "r.html"))
    assert "1 of 10 samples became NaN" in page
    assert "Approximate:" not in page


def test_unconverged_solves_and_a_poor_fit_are_said(tmp_path: Path) -> None:
    problem = InverseProblem(torch.full((4,), 9.0), Identity((4,)), GaussianNoise(0.1), Box((4,)))
    posterior = made((4,), problem=problem)
    posterior.stats["unconverged"] = torch.ones(1, 1, 19)
    page = read(write_report(posterior, tmp_path / "r.html"))
    assert "did not reach their tolerance in 19 of 19 samples" in page
    assert "not explained to within its noise" in page


def test_chi_squared_of_known_residuals() -> None:
    M = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    mask = torch.tensor([True, True, False])
    problem = InverseProblem(
        torch.tensor([2.0, 2.0, 99.0]),
        MatrixOperator(M),
        GaussianNoise(torch.tensor([1.0, 0.5, 1.0])),
        Box((3,)),
        mask=mask,
    )
    samples = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 0.0]]).reshape(1, 1, 2, 3)
    fit = data_fit(Posterior(samples, kind="exact", problem=problem), problem)[0]
    # of the mean (1, 1, 0): residuals 1/1 and 0/0.5; of the samples: (2, 4) and (0, −4)
    assert fit.chi2_mean == pytest.approx(0.5)
    assert fit.chi2_samples == pytest.approx([10.0, 8.0])
    assert torch.isnan(fit.residual[2])


def test_a_solver_without_a_prior_says_so(tmp_path: Path) -> None:
    problem = InverseProblem(
        torch.zeros(1, 4, 4), Identity((1, 4, 4)), GaussianNoise(0.5), GaussianPrior(0.0, 1.0, shape=(1, 4, 4))
    )
    page = TotalVariation(iterations=2).solve(problem, 1).report(tmp_path / "tv.html").read_text()
    assert "TotalVariation takes nothing but the shape" in page
    assert "nothing but the shape" not in MAP(iterations=1).solve(problem, 1).report(tmp_path / "m.html").read_text()


def test_several_observations(tmp_path: Path) -> None:
    problem = InverseProblem(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), Identity((2,)), GaussianNoise(1.0), Box((2,)))
    posterior = Posterior(
        torch.tensor([0.0, 5.0]).reshape(2, 1, 1, 1).expand(2, 1, 3, 2), kind="exact", problem=problem
    )
    assert [data_fit(posterior, problem, o)[0].chi2_mean for o in (0, 1)] == [0.0, 0.0]
    with pytest.raises(ValueError, match="observation 2 does not exist"):
        write_report(posterior, tmp_path / "r.html", observation=2)


def test_bad_truth_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truth has the shape"):
        write_report(made((3,)), tmp_path / "r.html", truth=torch.zeros(4))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Cannot write the report"):
        write_report(made((3,)), tmp_path / "file" / "r.html")


def test_report_of_a_loaded_posterior(tmp_path: Path) -> None:
    made((1, 8, 10), grid=GRID).save(tmp_path / "p.nc")
    loaded = Posterior.load(tmp_path / "p.nc")
    assert "not the data" in read(loaded.report(tmp_path / "a.html"))
    assert "seismic" in read(loaded.report(tmp_path / "b.html", problem=field_problem()))


def test_profile_band_covers_samples() -> None:
    from invgen.report.model import Draws

    draws = Draws.of(made((1, 8, 10), grid=GRID), 0, torch.zeros(1, 8, 10))
    inside = (draws.samples.min(0) <= 0) & (draws.samples.max(0) >= 0)
    assert draws.coverage() == inside.mean()
    assert np.allclose(draws.mean, draws.samples.mean(0), atol=1e-6)

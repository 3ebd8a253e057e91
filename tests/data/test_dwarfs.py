"""Dwarf galaxies against Plummer's profile, the virial theorem, the Jeans equation and simulations by Agama."""

import math

import h5py
import numpy as np
import pytest
import torch
from scipy import integrate, stats

from invgen import InverseProblem, SimulatedNoise, Simulations, Simulator
from invgen.data import DwarfGalaxies
from invgen.priors import UniformPrior

D = torch.float64
G = 4.300917e-6
# gamma, log r_s, log rho_0, r_star/r_s, beta_0, r_a/r_star
GALAXIES = torch.tensor(
    [
        [0.0, 0.0, 7.0, 0.5, -0.3, 1.5],
        [1.0, -0.5, 6.5, 0.25, -0.2, 1.0],
        [1.8, 0.3, 6.0, 1.0, -0.45, 1.2],
        [-0.5, 0.5, 7.5, 0.8, -0.15, 1.9],
    ],
    dtype=D,
)
N = 40_000


@pytest.fixture(scope="module")
def stars():
    return DwarfGalaxies(stars=N, poisson=False).sample(GALAXIES, generator=torch.Generator().manual_seed(1))


class Jeans:
    """Closed forms and cumulative trapezoids on a fine grid of ln r, in units of r_* and km/s."""

    def __init__(self, p):
        gamma, log_r, log_rho, ratio, beta, r_a = p.tolist()
        self.r_star = ratio * 10**log_r
        self.l = np.linspace(-12, 9, 40_001)
        self.r = r = np.exp(self.l)
        x = r * ratio
        growing = integrate.cumulative_trapezoid(x ** (3 - gamma) * (1 + x) ** (gamma - 3), self.l, initial=0)
        start = x[0] ** (3 - gamma) / (3 - gamma)
        self.mass_over_r = 4 * math.pi * G * 10**log_rho * 10 ** (2 * log_r) * (start + growing) / x
        self.nu = (1 + r * r) ** -2.5
        self.anisotropy = (r**2 + beta * r_a**2) / (r**2 + r_a**2)
        # d(w ν σ_r²)/dr = −w ν G M/r² with w = exp ∫ 2 β/r dr
        weight = r ** (2 * beta) * (1 + r * r / r_a**2) ** (1 - beta) * self.nu
        inward = integrate.cumulative_trapezoid((weight * self.mass_over_r)[::-1], self.l, initial=0)[::-1]
        self.radial = inward / weight

    def virial(self):
        return np.trapezoid(3 * self.r**3 * self.nu * self.mass_over_r, self.l)

    def in_line_of_sight(self, inner, outer):
        """⟨v²⟩ of the stars with inner < R < outer, R in r_*: shells of radius r, seen under all angles."""
        # of a shell, mu = cos of the angle to the line of sight: R² = r² (1 − mu²)
        high = np.sqrt(np.clip(1 - (inner / self.r) ** 2, 0, 1))
        low = np.sqrt(np.clip(1 - (outer / self.r) ** 2, 0, 1))
        share, cosine2 = high - low, (high**3 - low**3) / 3
        # v_los² = σ_r² (mu² + (1 − β)(1 − mu²))
        square = self.radial * (cosine2 + (1 - self.anisotropy) * (share - cosine2))
        mass = self.nu * self.r**3
        return np.trapezoid(mass * square, self.l) / np.trapezoid(mass * share, self.l)


def test_stars_follow_plummer_on_the_sky(stars):
    """R²/(R² + r_*²) is uniform; four Kolmogorov tests at 1e-4 each."""
    r_star = GALAXIES[:, 3] * 10 ** GALAXIES[:, 1]
    square = stars.position.square().sum(2)
    for u in (square / (square + r_star[:, None].square())).numpy():
        assert stats.kstest(u, "uniform").pvalue > 1e-4
    angle = torch.atan2(stars.position[..., 1], stars.position[..., 0]).numpy() / (2 * math.pi) + 0.5
    assert min(stats.kstest(a, "uniform").pvalue for a in angle) > 1e-4
    assert not stars.refused.any()


@pytest.mark.parametrize("i", range(len(GALAXIES)))
def test_virial_theorem_and_jeans_equation(stars, i):
    """3⟨v²⟩ = ⟨G M/r⟩ over all stars, and ⟨v²⟩ of rings: within 5 standard errors and 0.4 % of the table's own error."""
    jeans = Jeans(GALAXIES[i])
    R, v2 = stars.position[i].norm(dim=1) / jeans.r_star, stars.velocity[i].square()

    def agrees(found, expected):
        error = float(found.std()) / len(found) ** 0.5
        assert abs(float(found.mean()) - expected) < 5 * error + 0.004 * expected

    agrees(v2, jeans.virial() / 3)
    for inner, outer in ((0.0, 0.3), (0.3, 1.0), (1.0, 3.0)):
        agrees(v2[(inner <= R) & (outer > R)], jeans.in_line_of_sight(inner, outer))


def test_agama_agrees(data_dir):
    """Half-light radius and dispersion of 60 galaxies of about 100 stars: ratio 1 within 3 standard errors."""
    with h5py.File(data_dir / "dwarfs" / "agama_60.h5") as f:
        label = {k: f["labels"][k][:] for k in f["labels"]}
        end, xy, v = f["end"][:], f["pos_kpc"][:], f["v_los_kms"][:]
    r_s, r_star, r_a = (10 ** label[k] for k in ("dm_log_r_dm", "stellar_log_r_star", "df_log_r_a"))
    p = np.stack(
        [label["dm_gamma"], np.log10(r_s), label["dm_log_rho_0"], r_star / r_s, label["df_beta_0"], r_a / r_star], 1
    )
    mine = DwarfGalaxies(stars=4000, poisson=False, negative="cut").sample(
        torch.from_numpy(p), generator=torch.Generator().manual_seed(2)
    )
    accepted = DwarfGalaxies().acceptable(torch.from_numpy(p)).numpy()
    assert 20 < accepted.sum() < 60
    first = np.r_[0, end[:-1]]
    radius = [np.median(np.linalg.norm(xy[a:b], axis=1)) for a, b in zip(first, end)]
    square = [(v[a:b] ** 2).mean() for a, b in zip(first, end)]
    ratios = {
        "radius": np.array(radius) / mine.position.norm(dim=2).median(1).values.numpy(),
        "dispersion": np.array(square) / mine.velocity.square().mean(1).numpy(),
    }
    for chosen in (accepted, ~accepted):
        for name, ratio in ratios.items():
            some = ratio[chosen]
            assert abs(some.mean() - 1) < 3 * some.std() / len(some) ** 0.5, name


def test_a_negative_distribution_function_is_refused():
    p = GALAXIES.clone()
    p[0, 4] = 0.2  # Plummer's core carries no radial centre
    p[3, 0], p[3, 5], p[3, 4] = -0.9, 0.2, 0.0
    refuse, cut = DwarfGalaxies(), DwarfGalaxies(negative="cut")
    assert refuse.acceptable(p).tolist() == [False, True, True, False]
    data = refuse(p)
    assert torch.isnan(data).flatten(1).all(1).tolist() == [True, False, False, True]
    assert torch.isfinite(cut(p)).all()


def test_numbers_of_stars_and_errors():
    p = GALAXIES[:1].expand(400, -1)
    g = torch.Generator().manual_seed(3)
    s = DwarfGalaxies(stars=30.0).sample(p, generator=g)
    count = s.present.sum(1).double()
    assert abs(float(count.mean()) - 30) < 5 * (30 / 400) ** 0.5
    assert float(count.var()) == pytest.approx(30, rel=0.4)
    assert (s.velocity[~s.present] == 0).all()
    wide = DwarfGalaxies(stars=100, poisson=False, error=50.0).sample(p, generator=g)
    plain = DwarfGalaxies(stars=100, poisson=False).sample(p, generator=g)
    assert float(wide.velocity.var() - plain.velocity.var()) == pytest.approx(2500, rel=0.05)


def test_as_a_simulator_with_refusals_counted():
    dwarfs = DwarfGalaxies(stars=20)
    prior = UniformPrior(torch.tensor(dwarfs.low), torch.tensor(dwarfs.high))
    simulator = Simulator(dwarfs, (6,), dwarfs.data_shape, batched=True, tensors=True)
    problem = InverseProblem(torch.zeros(dwarfs.data_shape), simulator, SimulatedNoise(), prior)
    with pytest.warns(UserWarning, match="simulations failed"):
        s = Simulations.of(problem, 100)
    x, _, (d,) = s.batch(slice(None))
    assert (x[:, 4] <= 0).all()
    assert d.shape[1:] == dwarfs.data_shape
    assert torch.isfinite(d).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DwarfGalaxies(negative="clip"), "'refuse' or 'cut'"),
        (lambda: DwarfGalaxies(stars=0), "stars > 0"),
        (lambda: DwarfGalaxies()(torch.zeros(2, 5)), "in the order gamma"),
        (lambda: DwarfGalaxies()(torch.full((1, 6), 2.5)), "positive radii"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()

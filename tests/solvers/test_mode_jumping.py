"""Mode-jumping chains on mixtures of separated Gaussians in latent space whose weights are known."""

import dataclasses
import math
import warnings

import pytest
import torch

from invgen.contracts import Operator
from invgen.noise import GaussianNoise
from invgen.operators import MatrixOperator
from invgen.priors import GaussianPrior
from invgen.problem import InverseProblem
from invgen.solvers import ModeJumping
from invgen.solvers._mode_mixture import Mixture, improved, joined, labels
from invgen.streams import Streams

F64 = torch.float64
DIM = 4
MEANS = torch.tensor([[1.0, -0.8, 0.4, 0.9], [-0.9, 0.7, 1.1, -0.3]], dtype=F64)
ROOTS = torch.tensor(
    [
        [[0.10, 0, 0, 0], [0.06, 0.08, 0, 0], [-0.03, 0.02, 0.15, 0], [0, 0.05, 0, 0.2]],
        [[0.20, 0, 0, 0], [0.00, 0.12, 0, 0], [0.08, 0.0, 0.10, 0], [0.03, 0, -0.04, 0.1]],
    ],
    dtype=F64,
)
QUICK = {"runs": 4, "particles": 128, "settlers": 16, "pilot": 1000}


class Modes(Operator):
    """√(2 Φ) with e^−Φ N(z; 0, I) a mixture of Gaussians: the data 0 with noise 1 have that posterior."""

    derivative_order = 1
    level = 30.0  # keeps Φ positive

    def __init__(self, weights):
        super().__init__((DIM,), (1,))
        self.weights = torch.tensor(weights, dtype=F64)

    def forward(self, x, **theta):
        laws = torch.distributions.MultivariateNormal(MEANS.to(x), scale_tril=ROOTS.to(x))
        logs = (laws.log_prob(x[:, None]) + self.weights.to(x).log()).logsumexp(1)
        return (2 * (self.level - logs - 0.5 * x.square().sum(1))).sqrt()[:, None]


def problem(weights=(0.9, 0.1)):
    prior = GaussianPrior(torch.zeros(DIM, dtype=F64), torch.ones(DIM, dtype=F64))
    return InverseProblem(torch.zeros(1, dtype=F64), Modes(weights), GaussianNoise(1.0), prior)


EVIDENCE = -Modes.level - 0.5 * (DIM + 1) * math.log(2 * math.pi)


def exact(n, weights, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = torch.multinomial(torch.tensor(weights, dtype=F64), n, replacement=True, generator=g)
    return MEANS[k] + (ROOTS[k] @ torch.randn(n, DIM, 1, generator=g, dtype=F64))[..., 0]


def second(draws):
    """1 for draws of the second mode."""
    return (draws[..., 0] < 0).double()


def t_value(each, wanted):
    """Of the mean of independent numbers."""
    return float((each.mean(0) - wanted).abs().max() / (each.std(0) / math.sqrt(len(each))).min())


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.998, 0.002)])
def test_modes_are_visited_as_often_as_they_weigh(weights):
    chains, draws = 32, 250
    posterior = ModeJumping(draws=draws, warmup=50, **QUICK).solve(problem(weights), chains, seed=1, dtype=F64)
    z = posterior.latent[0]
    each = second(z).mean(1)  # of chains that share nothing but a mixture that is fixed
    expected = weights[1] * chains * draws
    error = max(float(each.std()) / math.sqrt(chains), math.sqrt(expected) / (chains * draws))
    assert abs(float(each.mean()) - weights[1]) < 4.2 * error < 1.5 * weights[1]
    inside = (second(z) == 0).double()[..., None]
    centre = (inside * z).sum((1,)) / inside.sum(1)
    assert bool(((centre.mean(0) - MEANS[0]).abs() < 4.5 * centre.std(0) / math.sqrt(chains)).all())
    moved = (inside * (z - MEANS[0]).square()).sum(1) / inside.sum(1)
    wanted = ROOTS[0].square().sum(1)
    assert bool(((moved.mean(0) - wanted).abs() < 4.5 * moved.std(0) / math.sqrt(chains)).all())
    error = float(posterior.stats["log_evidence_error"].flatten()[0])
    assert abs(float(posterior.log_evidence[0]) - EVIDENCE) < 4.5 * error < 0.5
    assert float(posterior.stats["jump"].mean()) > 0.5
    assert float(posterior.stats["modes"].flatten()[0]) == 2
    # as many changes as there are starts of visits
    label = posterior.stats["mode"][0]
    assert float((label.diff(dim=1) != 0).sum()) <= float(posterior.stats["mode_changes"].sum())


@pytest.mark.parametrize("tries", [1, 5])
def test_exact_draws_stay_exact(tries):
    """Also with a mixture that is wrong: too wide, shifted, with wrong shares."""
    weights, n = (0.7, 0.3), 4000
    start, goal = exact(n, weights, seed=3), problem(weights)
    solver = ModeJumping(draws=1, warmup=0, thin=12, tries=tries, starts=start, **QUICK)
    rng = Streams(5, [(0, i) for i in range(n)])
    part = goal.select([0] * n)
    state = solver.init(part, rng)
    means = torch.cat([MEANS + 0.1, MEANS[:1] - 0.1])[None]  # the last component overlaps the first
    roots = torch.cat([1.5 * ROOTS, 0.6 * ROOTS[:1]])[None]
    state |= Mixture(means, roots, torch.tensor([[0.15, 0.7, 0.15]], dtype=F64).log()).entries()
    state |= {"mixture_mode": torch.tensor([[0, 1, 0]]), "stage": torch.tensor(solver.search().num_steps)}
    state |= {n: torch.zeros(1, dtype=F64) for n in ("search_log_evidence", "search_error", "search_ess")}
    state = solver._launched(part, state, rng)
    torch.testing.assert_close(state["z"], start)
    # bad tries are rejected, and a fresh chain would forget where it was: only the law can be tested
    for _ in range(12):
        state = solver.step(part, state, rng)
    z = state["z"]
    assert float((z != start).any(1).double().mean()) > 0.95
    again = exact(200_000, weights, seed=9)
    for f in (second, lambda z: z, lambda z: z.square(), lambda z: z[:, :1] * z[:, 1:]):
        found, wanted = f(z).reshape(n, -1), f(again).reshape(len(again), -1)
        error = (found.var(0) / n + wanted.var(0) / len(again)).sqrt()
        assert bool(((found.mean(0) - wanted.mean(0)).abs() < 4.5 * error).all())


def test_nothing_is_adapted_after_the_warmup_and_superchains_share_a_start():
    solver = ModeJumping(draws=8, warmup=4, superchains=2, **QUICK, sweeps=60)
    rng, part = Streams(0, [(0, i) for i in range(4)]), problem().select([0] * 4)
    state, seen = solver.init(part, rng), []
    for _ in range(solver.num_steps(part)):
        begun = "stage" in state
        state = solver.step(part, state, rng)
        if begun and "stage" not in state:
            assert torch.equal(state["z"][0], state["z"][1])
            assert torch.equal(state["z"][2], state["z"][3])
        if "stage" not in state and int(state["clock"]) >= 4:
            seen.append((state["log_step_mean"].clone(), state["mixture_means"].clone()))
    assert len(seen) == 9
    assert all(torch.equal(a, seen[0][0]) and torch.equal(b, seen[0][1]) for a, b in seen)


def test_chains_in_one_place_are_joined():
    g = torch.Generator().manual_seed(2)
    k = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    noise = torch.randn(2, 4, 8, DIM, 1, generator=g, dtype=F64)
    draws = MEANS[k][:, :, None] + (ROOTS[k][:, :, None] @ noise)[..., 0]
    found = joined(draws, torch.zeros(2, 4, dtype=F64))
    assert found.means.shape == (1, 2, DIM)
    torch.testing.assert_close(found.log_shares.exp().sum(), torch.ones((), dtype=F64))
    gap = (found.means[0][:, None] - MEANS).abs().amax(2).min(1).values
    assert float(gap.max()) < 0.15
    assert labels(found).unique().numel() == 2
    lost = joined(torch.full_like(draws, math.nan), torch.zeros(2, 4, dtype=F64))
    assert lost.means.shape == (1, 1, DIM)


def test_importance_weights_improve_a_mixture():
    weights, n = torch.tensor([0.998, 0.002], dtype=F64), 4000
    mixture = Mixture(MEANS[None] + 0.1, 1.3 * ROOTS[None], torch.tensor([[0.5, 0.5]], dtype=F64).log())
    laws = torch.distributions.MultivariateNormal(MEANS, scale_tril=ROOTS)
    g = torch.Generator().manual_seed(4)

    def ess(mixture):
        u, xi = torch.rand(1, n, generator=g, dtype=F64), torch.randn(1, n, DIM, generator=g, dtype=F64)
        gamma = torch._standard_gamma(torch.full((1, n), 4.0, dtype=F64), generator=g)
        z = mixture.draw(u, xi, gamma)
        logs = (laws.log_prob(z[0][:, None]) + weights.log()).logsumexp(1)[None] - mixture.parts(z).logsumexp(2)
        w = logs.exp()
        assert abs(float(w.mean()) - 1) < 4.5 * float(w.std()) / math.sqrt(n)  # both are normalised
        return float(w.sum() ** 2 / w.square().sum() / n), z, logs

    before, z, logs = ess(mixture)
    for _ in range(4):
        mixture = improved(mixture, z, logs)._replace(log_shares=mixture.log_shares)
        _, z, logs = ess(mixture)
    found = improved(mixture, z, logs)
    assert ess(found)[0] > 0.6 > 2 * before
    share = float(found.log_shares.exp()[0, 1])
    assert abs(share - 0.002) < 4.5 * 0.002 / math.sqrt(0.25 * n)


def test_what_does_not_fit_is_refused():
    big = GaussianPrior(torch.zeros(101, dtype=F64), torch.ones(101, dtype=F64))
    wide = InverseProblem(
        torch.zeros(2, dtype=F64), MatrixOperator(torch.ones(2, 101, dtype=F64)), GaussianNoise(1.0), big
    )
    with pytest.raises(TypeError, match=r"at most 100 latent numbers.*HMC.*ParallelTempering"):
        ModeJumping().solve(wide, 2)
    with pytest.raises(ValueError, match="tries"):
        ModeJumping(tries=0)
    with pytest.raises(ValueError, match="settlers"):
        ModeJumping(particles=16)
    with pytest.raises(ValueError, match="latent coordinates"):
        ModeJumping(space="u")


def test_a_search_that_does_not_arrive_says_so():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        small = dataclasses.replace(ModeJumping.examples()[0], sweeps=2)
        small.solve(problem(), 2, dtype=F64)
    assert any("no population" in str(w.message) for w in found)

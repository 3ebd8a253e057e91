r"""The dark halo of a dwarf galaxy from about a hundred stars: positions on the sky and velocities along the line of sight.

    python examples/dwarf_galaxies.py --figure dwarf.png --save dwarf.safetensors          (one CPU minute)

Unknown x = (γ, log₁₀ r_s, log₁₀ ρ_0, r_*/r_s, β_0, r_a/r_*), uniform in a box: a halo and the orbits of the stars in it,

    ρ(r) = ρ_0 (r/r_s)^(−γ) (1 + r/r_s)^(γ−3),     ν(r) ∝ (1 + r²/r_*²)^(−5/2),     β(r) = (r² + β_0 r_a²)/(r² + r_a²)

(`invgen.data.DwarfGalaxies`: stars drawn from the distribution function itself, no moments). The likelihood of a set of
stars is an integral for each of them; here nobody writes it. A galaxy is a set {(lg R_i, lg |v_i|)}, all that a spherical
system at rest has to say, and the posterior a normalizing flow on DeepSets, ρ(mean_i φ(star_i)), which does not know their
order. Trained once, it answers any galaxy in milliseconds.

What is asked of it:

    ranks        200 new galaxies (SBC of all parameters and TARP, family-wise)
    Agama        60 galaxies of an independent code, where `../shared/data/dwarfs` has them
    mass         within the half-light radius r_½ = 1.305 r_*, M = 4π ρ_0 r_s³ ∫_0^(W) w^(2−γ)/(1 − w) dw, W = r_½/(r_s + r_½);
                 beside 4 σ² r_*/G (Wolf et al. 2010, equation 1), which needs no halo and has no error for β and γ
    foreground   could the simulator have made these stars? `MisspecificationTest` of quantiles of R and |v|, on clean galaxies
                 and on ones with a fifth of their stars replaced by others that belong to the Milky Way

For stars of your own: distances in kpc from the centre on the sky and km/s from the systemic velocity, `features` of
`(1, stars, 4)` with 1 in the last entry of every star, zeros to fill up; `DwarfGalaxies(error=...)` in `GALAXIES` for the
errors of the velocities, and train again; another number of stars as `stars=`.

Measured: ranks and TARP pass (200 galaxies); on 60 galaxies of Agama the 90 % intervals of the six parameters cover 0.87 to
0.97 (± 0.04). Medians of lg M are off by 0.14 dex rms without being told r_*, 4 σ² r_*/G with the true r_* by 0.12; the interval of M
is 0.7 dex wide and covered all 60, so it is too wide: the network has not learnt how tightly ρ_0, γ and r_s hang together, which
ranks of single parameters do not show. A fifth of foreground stars is flagged in 94 % of the galaxies at 3 % false alarms by
their quantiles, in 6 % by the distance of their embedding: a network keeps what it needs for x, not what gives strangers away.

Weak: spherical, in equilibrium, one population, no binaries, every star a member, no selection in radius. Corners of the box have no
positive distribution function; there it is cut at zero, as Agama does. Posteriors of γ, β_0 and r_a are hardly narrower than
the prior: a hundred line-of-sight velocities do not tell them apart. The mass is what is known.

References: Nguyen, Mishra-Sharma, Williams & Necib, PRD 107, 043015, 2023, arXiv:2208.12825 (this family and prior); Wolf et al.,
MNRAS 406, 1220, 2010, arXiv:0908.2995; Walker et al., ApJ 704, 1274, 2009, arXiv:0906.0341.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import script
import torch
from agreement import beside, covered
from torch import Tensor

from invgen import SimulatedNoise, Simulations, Simulator
from invgen.data import DwarfGalaxies
from invgen.diagnostics import MisspecificationTest, calibrate
from invgen.priors import UniformPrior
from invgen.problem import InverseProblem
from invgen.solvers import NPE, AmortizedPosterior

GALAXIES = DwarfGalaxies(negative="cut")
SIMULATIONS, EPOCHS, SEED = 8_000, 20, 21  # the seed of the galaxy that is shown
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "dwarfs" / "agama_60.h5"
G = 4.300917e-6  # kpc (km/s)² / solar mass
HALF = 1 / math.sqrt(2 ** (2 / 3) - 1)  # half of a Plummer sphere lies within this many r_*
LABELS = (r"$\gamma$", r"$\lg r_s$ (kpc)", r"$\lg \rho_0$", r"$r_*/r_s$", r"$\beta_0$", r"$r_a/r_*$")
MASS = r"$\lg M_{1/2}$ ($M_\odot$)"


def features(stars: Tensor) -> Tensor:
    """lg R, lg |v| and 1 of every star `(n, m, 4)` -> `(n, m, 3)`; empty entries are zero."""
    there = stars[..., 3:]
    pair = torch.stack([torch.hypot(stars[..., 0], stars[..., 1]), stars[..., 2].abs()], -1)
    return torch.cat([pair.clamp_min(1e-4).log10() * there, there], -1)


def observe(parameters: Tensor) -> Tensor:
    """The simulator: parameters `(n, 6)` to sets `(n, m, 3)`."""
    return features(GALAXIES(parameters))


def dwarf_problem() -> InverseProblem:
    """Prior and simulator."""
    shape = (GALAXIES.data_shape[0], 3)
    prior = UniformPrior(torch.tensor(GALAXIES.low), torch.tensor(GALAXIES.high))
    simulator = Simulator(observe, (6,), shape, batched=True, tensors=True)
    return InverseProblem(torch.zeros(shape), simulator, SimulatedNoise(), prior)


def log_mass(x: Tensor) -> Tensor:
    """log₁₀ of the dark mass in solar masses within the half-light radius, `(..., 6)` -> `(...)`.

    With w = W u^(1/(3−γ)) the integral is W^(3−γ)/(3−γ) ∫_0^1 du/(1 − w), by 64 Gauss–Legendre nodes.
    """
    gamma, log_r_s, log_rho, share, _, _ = x.double().unbind(-1)
    W = HALF * share / (1 + HALF * share)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    u, weight = torch.from_numpy(0.5 * (nodes + 1)), torch.from_numpy(0.5 * weights)
    power = 1 / (3 - gamma)
    integral = W ** (1 / power) * power * ((1 - W[..., None] * u ** power[..., None]).reciprocal() @ weight)
    return math.log10(4 * math.pi) + log_rho + 3 * log_r_s + integral.log10()


def virial_mass(stars: Tensor, x: Tensor) -> Tensor:
    """log₁₀ of 4 σ² r_*/G with σ² the mean of v² of the stars of features `(n, m, 3)`, r_* taken from the truth."""
    there = stars[..., 2].double()
    speed = (10 ** stars[..., 1].double()).square() * there
    return (4 * speed.sum(1) / there.sum(1) * x[:, 3] * 10 ** x[:, 1] / G).log10()


def quantiles(stars: Tensor) -> Tensor:
    """What the foreground test looks at: nine quantiles each of lg R and lg |v|, and their correlation, `(n, 19)`."""
    out = []
    levels = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    for galaxy in stars.double():
        pair = galaxy[galaxy[:, 2] > 0, :2]
        correlation = torch.corrcoef(pair.T)[0, 1]
        out.append(torch.cat([pair.quantile(levels, dim=0).T.flatten(), correlation[None]]))
    return torch.stack(out)


def with_foreground(stars: Tensor, share: float, seed: int) -> Tensor:
    """Stars of the Milky Way in the place of some: evenly spread over the field, 60 ± 40 km/s from the galaxy's velocity."""
    generator = torch.Generator().manual_seed(seed)
    mixed = stars.clone()
    taken = (torch.rand(stars.shape[:2], generator=generator) < share) & (stars[..., 2] > 0)
    widest = stars[..., 0].masked_fill(stars[..., 2] == 0, -9.0).quantile(0.98, dim=1, keepdim=True)
    radius = widest + 0.5 * torch.rand(stars.shape[:2], generator=generator).clamp_min(1e-3).log10()
    speed = (60 + 40 * torch.randn(stars.shape[:2], generator=generator)).abs().clamp_min(1e-2).log10()
    mixed[..., 0] = torch.where(taken, radius, mixed[..., 0])
    mixed[..., 1] = torch.where(taken, speed, mixed[..., 1])
    return mixed


def agama(path: Path) -> tuple[Tensor, Tensor] | None:
    """Features of the 60 galaxies of the shared file and their parameters, or None where it is missing."""
    if not path.exists():
        return None
    import h5py

    with h5py.File(path) as file:
        ends, position, velocity = (torch.from_numpy(file[k][()]) for k in ("end", "pos_kpc", "v_los_kms"))
        label = {k: torch.from_numpy(v[()]).double() for k, v in file["labels"].items()}
    stars = torch.zeros(len(ends), GALAXIES.data_shape[0], 4)
    first = 0
    for i, end in enumerate(ends.tolist()):
        count = min(end - first, stars.shape[1])
        stars[i, :count, :2] = position[first : first + count].float()
        stars[i, :count, 2] = velocity[first : first + count].float()
        stars[i, :count, 3] = 1.0
        first = end
    star, halo = label["stellar_log_r_star"], label["dm_log_r_dm"]
    columns = [label["dm_gamma"], halo, label["dm_log_rho_0"], 10 ** (star - halo), label["df_beta_0"]]
    return features(stars), torch.stack([*columns, 10 ** (label["df_log_r_a"] - star)], 1)


def draw(
    path: str,
    draws: Tensor,
    truth: Tensor,
    stars: Tensor,
    masses: dict[str, Tensor],
    calibration: Any,
    p_values: dict[str, np.ndarray],
) -> None:
    """Stars, masses, ranks and p-values on one page; the corner of one galaxy on another."""
    import plots

    from invgen.report import corner_plot

    figure, axes = plots.page(2, 3, height=4.0, title="dwarf galaxies: halo parameters from a hundred stars")
    there = stars[:, 2] > 0
    axes[0, 0].plot(10 ** stars[there, 0], 10 ** stars[there, 1], "o", ms=4, color=plots.MEAN, alpha=0.7)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="distance on the sky (kpc)", ylabel="|velocity| (km/s)")
    axes[0, 0].set_title(f"one galaxy, {int(there.sum())} stars")
    axis, true = axes[0, 1], masses["truth"].numpy()
    middle, low, high = (masses[k].numpy() for k in ("median", "low", "high"))
    axis.errorbar(
        true, middle - true, [middle - low, high - middle], fmt="o", ms=3, lw=0.8, color=plots.MEAN, label="NPE, 5-95 %"
    )
    axis.plot(
        true, masses["virial"].numpy() - true, "x", ms=4, color=plots.OTHER, label=r"$4\sigma^2 r_*/G$, $r_*$ known"
    )
    axis.axhline(0, color="black", lw=1)
    axis.set(
        xlabel="lg of the true mass within the half-light radius",
        ylabel="estimate − truth (dex)",
        title=masses_of(masses),
    )
    axis.legend(fontsize=8)
    for name, values in p_values.items():
        axes[0, 2].hist(values, bins=np.linspace(0, 1, 21), alpha=0.5, density=True, label=name)
    axes[0, 2].axhline(1, color="black", lw=0.8)
    axes[0, 2].set(xlabel="p-value of the galaxy", ylabel="density", title="could the simulator have made these stars?")
    axes[0, 2].legend(fontsize=8)
    calibration.plot([axes[1, 0], axes[1, 1]])
    span = np.array(GALAXIES.high) - np.array(GALAXIES.low)
    names = ["γ", "lg r_s", "lg ρ_0", "r_*/r_s", "β_0", "r_a/r_*"]
    axes[1, 2].barh(names[::-1], (math.sqrt(12) * draws.std(0).numpy() / span)[::-1], color=plots.MEAN)
    axes[1, 2].axvline(1, color="black", lw=1)
    axes[1, 2].set(xlabel="posterior sd / prior sd", title="what the stars of this galaxy tell")
    plots.save(figure, path)
    every = torch.cat([draws, log_mass(draws)[:, None]], 1)
    lines = torch.cat([truth, log_mass(truth)[None]])
    plots.save(corner_plot(every.numpy(), names=(*LABELS, MASS), truth=lines.numpy()), beside(path, "corner"))


def masses_of(masses: dict[str, Tensor]) -> str:
    """Title of the panel of masses."""
    return f"{len(masses['truth'])} {'galaxies of Agama' if 'agama' in masses else 'new galaxies'}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, samples=2000, fast="few simulations in seconds, to see that it runs")
    parser.add_argument("--data", type=Path, default=DATA, help="galaxies of Agama, HDF5")
    parser.add_argument("--save", type=Path, help="write the amortised posterior here")
    args = parser.parse_args(argv)
    count, epochs, tested, known = (400, 2, 40, 240) if args.fast else (SIMULATIONS, EPOCHS, 200, 2000)
    samples = 200 if args.fast else args.samples
    times: dict[str, float] = {}
    began = time.process_time()

    def lap(name: str) -> None:
        nonlocal began
        times[name], began = time.process_time() - began, time.process_time()

    problem = dwarf_problem()
    simulations = Simulations.of(problem, count, seed=1)
    lap("simulate")
    amortized = NPE(embedding="deepsets", space="u", members=1, layers=4, epochs=epochs).fit(
        problem, simulations, seed=0
    )
    if args.save:
        amortized = AmortizedPosterior.load(amortized.save(args.save), problem)
    lap("train")
    calibration = calibrate(problem, amortized, tested, 200, seed=5)
    print(calibration)
    lap("calibrate")

    real = agama(args.data)
    if real is None:
        print(f"{args.data} is missing: coverage on galaxies of the simulator itself")
        truth, _, (sets,) = problem.simulate(60, seed=6)
        truth = truth.double()
    else:
        sets, truth = real
    draws = amortized(sets, 400, seed=7).samples[:, 0].double()
    coverage = {
        name: covered(truth[:, k], *draws[..., k].quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=1))
        for k, name in enumerate(GALAXIES.names)
    }
    mass, levels = log_mass(draws), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, median, high = mass.quantile(levels, dim=1)
    masses = {"truth": log_mass(truth), "low": low, "median": median, "high": high, "virial": virial_mass(sets, truth)}
    if real is not None:
        masses["agama"] = truth[:0]
    coverage["mass"] = covered(masses["truth"], low, high)
    rms = {k: float((masses[k] - masses["truth"]).square().mean().sqrt()) for k in ("median", "virial")}
    lap("60 galaxies")

    # three groups of simulations that the network has not seen: reference, clean, and with foreground
    _, _, (fresh,) = problem.simulate(known + 200, seed=8)
    test = MisspecificationTest(quantiles(fresh[:known]), level=0.05)
    clean, mixed = fresh[known : known + 100], with_foreground(fresh[known + 100 :], 0.2, seed=9)
    p_values = {"clean": test(quantiles(clean)).p_value, "a fifth foreground": test(quantiles(mixed)).p_value}
    far = {k: amortized.typicality(v)[1] for k, v in (("clean", clean), ("a fifth foreground", mixed))}
    flags = {k: float((v <= 0.05).mean()) for k, v in p_values.items()}
    distances = {k: float((v <= 0.05).double().mean()) for k, v in far.items()}
    lap("foreground")

    x, _, (d,) = problem.simulate(1, seed=SEED)
    posterior = amortized(d[0], samples, seed=10)
    one = posterior.samples[0, 0].double()
    interval = log_mass(one).quantile(levels).tolist()
    error = math.sqrt(0.09 / len(truth))
    print(
        f"coverage of 90 % intervals, {len(truth)} galaxies of {'Agama' if real else 'the simulator'} (± {error:.2f}):"
    )
    print("  " + ", ".join(f"{k} {v:.2f}" for k, v in coverage.items()))
    print(f"mass within the half-light radius: rms error {rms['median']:.3f} dex, 4σ²r_*/G {rms['virial']:.3f} dex")
    print(
        f"  one galaxy: lg M = {interval[1]:.2f} ({interval[0]:.2f} to {interval[2]:.2f}), truth {float(log_mass(x[0])):.2f}"
    )
    print(f"flagged at 5 %: {flags}; by the distance of their embedding: {distances}")
    print("CPU seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in times.items()))
    if args.figure:
        draw(args.figure, one, x[0].double(), d[0], masses, calibration, p_values)
    line = {
        "example": "dwarf_galaxies",
        "figures": {
            "coverage": coverage,
            "mass": {"rms_dex": rms["median"], "virial_rms_dex": rms["virial"], "width_dex": interval[2] - interval[0]},
            "flagged": flags,
            "flagged by distance": distances,
        },
        "galaxies": "agama" if real is not None else "simulator",
        "sbc_p": calibration.p_value,
        "held_out_loss": amortized.history["held_out_loss"][0],
        "simulations": count,
        "cpu_seconds": times,
    }
    return script.finish(line)


if __name__ == "__main__":
    main()

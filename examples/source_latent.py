r"""A lensed galaxy in the latent of a learned generator: one network for every image, beside chains on the same posterior.

    python examples/source_latent.py --figure source.png          (100 CPU seconds)

Source x = f(z), z ~ N(0, I_10), f the decoder of a variational autoencoder trained here on `SersicGalaxies`; image

    d = A x + n,      A = P L: rays through an isothermal ellipsoid with shear, a point-spread function (`GravitationalLens`),

and the posterior p(z | d) ∝ p(d | A f(z)) N(z; 0, I), decoded. An image has 576 numbers, its latent ten:

    NPE           q(z | d), a normalizing flow learnt from images made of z ~ N(0, I) (`space="z"`); milliseconds an image
    HMC           chains in z with the likelihood, started from the prior: the reference
    NPE, chains   `amortized.refine`: short chains started from NPE's draws

Three questions, three answers. Is q right for images of the generator: ranks of the true z (SBC). Is it right for this one:
means and standard deviations against HMC, in z and pixel by pixel. Is the generator right for this galaxy: one that the
generator never made asks for what no z gives, and no sampler mends that.

Measured: ranks of z pass (200 images, p = 0.10). For an image of the generator NPE is off by 0.5 posterior sd in z (0.3 in the
pixels), its sd 1.2 times HMC's; thirty steps of chains from its draws take it to HMC's answer. For a galaxy of `SersicGalaxies` that was
not among the training images NPE is off by 1.8 sd: an extrapolation, flagged with p = 0.01. HMC has χ² 1.08 there, within its
chance (± 0.06), and yet 73 % of the true pixels lie outside its 90 % bands: data that are fitted do not vouch for a generator.

For data of your own: put images of sources like yours into `sources`, your lens and PSF into `lens`, your noise into
`NOISE`; a generator of your own needs `decode` and `latent_shape` (`invgen.priors.pretrained`, `VAE.load`, a diffusion prior).

Weak: what the decoder cannot draw is not in the posterior (spiral arms, clumps: ten numbers hold size, tilt and core), and no
diagnostic of the sampler tells. The lens is taken as known.

References: Kingma & Welling 2014, arXiv:1312.6114; Bora et al. 2017, arXiv:1703.03208 (inverse problems in the range of a
generator); Papamakarios & Murray 2016, arXiv:1605.06376.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import script
import torch
from agreement import agreement, beside
from torch import Tensor, nn

from invgen.data import SersicGalaxies
from invgen.diagnostics import sbc
from invgen.noise import GaussianNoise
from invgen.operators import SIE, ExternalShear, GravitationalLens, sky_grid
from invgen.posterior import Posterior
from invgen.priors import VAE, ArrayData, Training
from invgen.priors.networks import MLP
from invgen.problem import InverseProblem
from invgen.solvers import HMC, NPE

LATENT, SOURCE, IMAGE = 10, 24, 22  # numbers in z; pixels of a side: 22² = 484 data, few enough for a linear part
NOISE = 0.05  # of an image in the units below, in which the peak of a lensed galaxy is about 1
SIMULATIONS, EPOCHS, SEED = 10_240, 30, 4  # simulations of an epoch


def sources(n: int, seed: int) -> Tensor:
    """`(n, 1, 24, 24)` galaxies of unlike size, shape and tilt, of about one flux; mean of the brightest pixels 1."""
    made = SersicGalaxies(
        (SOURCE, SOURCE), (0.08, 0.08), magnitude=(21.0, 21.5), half_light=(0.2, 0.45), psf_fwhm=0.1
    ).sample(n, seed=seed)
    return torch.from_numpy(made) / 300.0  # nJy


def lens() -> GravitationalLens:
    """A lens of 0.7 arcsec, the source pixels 0.08 and the image pixels 0.14 arcsec wide."""
    blur = torch.exp(-0.5 * (torch.arange(-2, 3, dtype=torch.float64) * 0.14 / 0.1) ** 2)
    psf = blur[:, None] * blur
    model = SIE(0.7, 0.75, 0.4, 0.03, -0.05) + ExternalShear(0.04, -0.02)
    source, image = sky_grid((SOURCE, SOURCE), 0.08), sky_grid((IMAGE, IMAGE), 0.14)
    return GravitationalLens(model, source, image, psf / psf.sum(), oversampling=2)


def generator(images: Tensor, steps: int) -> VAE:
    """A small variational autoencoder; decoded galaxies are positive."""
    pixels = SOURCE * SOURCE
    encoder = nn.Sequential(nn.Flatten(), MLP(pixels, 2 * LATENT, width=128, depth=2))
    decoder = nn.Sequential(
        MLP(LATENT, pixels, width=128, depth=2), nn.Softplus(), nn.Unflatten(1, (1, SOURCE, SOURCE))
    )
    vae = VAE(encoder, decoder, (1, SOURCE, SOURCE), latent=LATENT)
    Training(steps=steps, batch_size=64, learning_rate=2e-3, ema=0.99).fit(vae, ArrayData(images), progress=False)
    return vae.eval().requires_grad_(False)


def chi2(problem: InverseProblem, x: Tensor) -> float:
    """Misfit of draws `(n, 1, h, w)` over the number of data, their mean."""
    term = problem.terms[0]
    return float(((term.data - term.operator(x)) / NOISE).square().mean())


def latents(posterior: Posterior) -> Tensor:
    """z `(n, 10)` of the first observation."""
    assert posterior.latent is not None
    return posterior.latent[0].reshape(-1, LATENT).double()


def draw(path: str, rows: dict[str, dict[str, Tensor]], ranks: Any, z: dict[str, Tensor], truth: Tensor) -> None:
    """One row a galaxy (data, truth, mean, sd, error in sd), the ranks below; the corner of z on another page."""
    import plots

    from invgen.report import corner_plot

    source, image = sky_grid((SOURCE, SOURCE), 0.08), sky_grid((IMAGE, IMAGE), 0.14)

    def sky(axis: Any, values: Tensor, grid: Any, title: str, **style: Any) -> None:
        style = {"cmap": "magma", "aspect": "equal", **style}
        plots.section(axis, values[0].numpy(), grid, title=title, **style)
        axis.set_xlabel("x (arcsec)")
        axis.invert_yaxis()  # up is up

    figure, axes = plots.page(3, 5, width=3.2, height=2.9, title="a lensed galaxy in the latent of a generator")
    for row, (name, found) in enumerate(rows.items()):
        top = float(found["truth"].max())
        panels = [("data", "data", image, {"vmax": float(found["data"].max())})]
        panels += [(k, k, source, {"vmin": 0.0, "vmax": top}) for k in ("truth", "NPE mean", "HMC mean")]
        panels += [("error", "(NPE mean − truth)/sd", source, {"vmin": -4.0, "vmax": 4.0, "cmap": "RdBu_r"})]
        for axis, (key, title, grid, style) in zip(axes[row], panels, strict=True):
            sky(axis, found[key], grid, title, **style)
        axes[row, 0].set_title(f"{name}: data")
    ranks.plot(axes[2, 0])
    axes[2, 0].set_title(f"ranks of z: {'passed' if ranks.passed else 'FAILED'}")
    for axis, key, title in zip(axes[2, 1:3], ("sd", "HMC sd"), ("NPE sd", "HMC sd"), strict=True):
        highest = float(rows["generated"]["HMC sd"].max())
        sky(axis, rows["generated"][key], source, f"generated: {title}", cmap="viridis", vmin=0.0, vmax=highest)
    first, second = (z[k].std(0) for k in ("NPE", "HMC"))
    axes[2, 3].plot(second, first, "o", color=plots.MEAN)
    axes[2, 3].plot([0, 1], [0, 1], color="black", lw=0.8)
    axes[2, 3].set(xlabel="sd of z, HMC", ylabel="sd of z, NPE", title="generated: spread in the latent")
    axes[2, 4].set_axis_off()
    plots.save(figure, path)
    some = second.argsort()[:5]  # what the data hold best
    page = corner_plot(
        {k: v[:, some].numpy() for k, v in z.items()}, [f"$z_{{{int(j)}}}$" for j in some], truth=truth[some].numpy()
    )
    plots.save(page, beside(path, "corner"))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = script.parser(__doc__, samples=1000, fast="small networks in seconds, to see that it runs")
    args = parser.parse_args(argv)
    fast = args.fast
    count, epochs, steps, tested = (400, 2, 120, 30) if fast else (SIMULATIONS, EPOCHS, 2500, 200)
    samples = 200 if fast else args.samples
    torch.manual_seed(0)  # the first weights of the generator
    times: dict[str, float] = {}
    began = time.process_time()

    def lap(name: str) -> None:
        nonlocal began
        times[name], began = time.process_time() - began, time.process_time()

    vae = generator(sources(500 if fast else 5000, seed=1), steps)
    lap("generator")
    operator = lens()
    problem = InverseProblem(torch.zeros(operator.data_shape), operator, GaussianNoise(NOISE), vae)
    # new images every epoch: with 10,000 for all epochs the network learns their noise by heart, and is over-confident
    estimator = NPE(fresh=True, space="z", members=1, layers=3, embedding="mlp", batch_size=256, epochs=epochs)
    amortized = estimator.fit(problem, count, seed=0)
    lap("NPE")

    # images of the generator: their z are known, and so are the ranks of z
    g = torch.Generator().manual_seed(SEED)
    z = torch.randn(tested, LATENT, generator=g)
    clean = operator(vae.decode(z))
    images = clean + NOISE * torch.randn(clean.shape, generator=g)
    found = amortized(images, 99, seed=4)
    assert found.latent is not None
    ranks = sbc(z, found.latent[:, 0], names=[f"z{j}" for j in range(LATENT)])
    lap("ranks")

    real = sources(1, seed=99)
    d_real = operator(real) + NOISE * torch.randn(operator.data_shape, generator=g)[None]
    hmc = HMC(space="z", warmup=25 if fast else 120, draws=4 if fast else 25, thin=2)
    chains = 12 if fast else 32
    figures: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Tensor]] = {}
    corner: dict[str, Tensor] = {}
    for name, data, truth in (("generated", images[:1], vae.decode(z[:1])), ("a new galaxy", d_real, real)):
        p = problem.with_data(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image outside the simulations is said below, with its p-value
            amortised = amortized.solve(p, samples, seed=5)
            refined = amortized.refine(p, amortised, method="chains", warmup=10 if fast else 30)
        exact = hmc.solve(p, chains, seed=6)
        by = {"NPE": amortised, "NPE, chains": refined, "HMC": exact}
        x = {k: v.samples[0].flatten(0, 1) for k, v in by.items()}
        for k in ("NPE", "NPE, chains"):
            pixels = agreement(x[k], x["HMC"], ess=chains)
            figures[f"{name}: {k}"] = agreement(latents(by[k]), latents(exact), ess=chains)
            figures[f"{name}: {k}"] |= {"pixel_mean_error": pixels["mean_error"], "pixel_sd_ratio": pixels["sd_ratio"]}
        for k, v in x.items():
            outside = ((truth - v.mean(0)).abs() > 1.645 * v.std(0)).double().mean()
            figures.setdefault(f"{name}: {k}", {})
            figures[f"{name}: {k}"] |= {"chi2": chi2(p, v[:: max(1, len(v) // 200)]), "pixels_outside": float(outside)}
        figures[f"{name}: NPE"]["p_value"] = float(amortized.typicality(data[0])[1])
        mean, sd = x["NPE"].mean(0), x["NPE"].std(0)
        rows[name] = {"data": data[0], "truth": truth[0], "NPE mean": mean, "HMC mean": x["HMC"].mean(0)}
        rows[name] |= {"sd": sd, "HMC sd": x["HMC"].std(0), "error": (mean - truth[0]) / sd}
        if name == "generated":
            corner = {k: latents(by[k]) for k in ("NPE", "HMC")}
        lap(name)

    print(f"ranks of z: {'passed' if ranks.passed else 'FAILED'} (p = {ranks.p_value:.3g})")
    head = ("mean error", "sd ratio", "of pixels", "sd ratio", "chi2", "outside")
    print(f"{'in posterior sd of HMC':28}" + "".join(f"{h:>11}" for h in head))
    for name, f in figures.items():
        keys = ("mean_error", "sd_ratio", "pixel_mean_error", "pixel_sd_ratio", "chi2", "pixels_outside")
        print(f"{name:28}" + "".join(f"{f[k]:11.2f}" if k in f else " " * 11 for k in keys))
    p_values = {k.split(":")[0]: f["p_value"] for k, f in figures.items() if "p_value" in f}
    print(f"is the image like the simulated ones: {p_values}; of the pixels 0.10 should lie outside")
    print("CPU seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in times.items()))
    if args.figure:
        draw(args.figure, rows, ranks, corner, z[0].double())
    line = {
        "example": "source_latent",
        "figures": figures,
        "ranks_p": ranks.p_value,
        "held_out_loss": amortized.history["held_out_loss"][0],
        "simulations": count * epochs,
        "cpu_seconds": times,
    }
    return script.finish(line)


if __name__ == "__main__":
    main()

"""The lens operator: adjoint, equality with caustics and with a dense matrix, speed side by side, gradients.

Called by `lensing.py`, with the lens that it states. caustics (the simulator of Stone et al. 2024, arXiv:2406.15542) is
imported where the environment of the peers has it; without it the figures that need it are recorded as not measured.

    lens_dot_test    largest |⟨A x, d⟩ − ⟨x, Aᵀ d⟩| over |A x| |d|: odd, even, non-square and separable PSFs, masks,
                     oversampling, flux, cubic interpolation, one lens for each sample; float64.
    lens_error       largest difference over the image's maximum, float64, random sources: to caustics on square images
                     (with and without PSF, 2 × 2 rays a pixel), both at the positions that caustics means (its own are
                     rounded to float32); and to a dense matrix of loops and `scipy.signal.convolve2d` on non-square ones.
    lens_speedup     CPU time of caustics under `torch.vmap` over ours: 64 sources of 64 × 64 to 80 × 80 pixels, float32,
                     one ray a pixel, no PSF; ours is the mean of 20 calls in turn with one of caustics.
    lens_speedup_psf the same with the Gaussian PSF; an elliptical Moffat PSF of 25 × 25 beside it.
    lens_gradient    gradient of |A(θ) x − d|² in all eight parameters of lens and shear against central differences,
                     the largest error of one over its own size; float64, 2 × 2 rays a pixel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Benchmark, interleaved
from scipy.signal import convolve2d
from torch import Tensor

from invgen.linalg import dot_test as mismatch
from invgen.operators import EPL, ExternalShear, GravitationalLens, LensModel, sky_grid

F64 = torch.float64
PIXEL, SOURCE, IMAGE = 0.05, 64, 80
MASS = {"einstein_radius": 1.0, "axis_ratio": 0.75, "angle": 0.4, "center_y": -0.01, "center_x": 0.02, "slope": 1.1}
SHEAR = {"gamma_1": 0.03, "gamma_2": -0.02}
LENS = EPL(**MASS) + ExternalShear(**SHEAR)


def gaussian(shape: tuple[int, int] = (11, 11), fwhm: float = 0.1) -> Tensor:
    """Gaussian PSF of full width at half maximum in arcsec; a product along the axes."""
    y, x = ((torch.arange(n, dtype=F64) - n // 2) * PIXEL for n in shape)
    psf = torch.exp(-0.5 * (y[:, None].square() + x.square()) / (fwhm / 2.354820) ** 2)
    return psf / psf.sum()


def moffat(shape: tuple[int, int] = (25, 25)) -> Tensor:
    """Elliptical Moffat PSF, turned against the axes: not a product."""
    y, x = (torch.arange(n, dtype=F64) - n // 2 for n in shape)
    u, v = 0.9 * y[:, None] + 0.3 * x, 1.1 * x - 0.2 * y[:, None]
    psf = (1 + (u.square() + v.square()) / 2.5**2) ** -2.5
    return psf / psf.sum()


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- caustics ----------------------------------------------------------------------------------------------------------


def caustics_image(psf: Tensor | None, upsample: int, dtype: torch.dtype, mass: str = "EPL") -> Any:
    """A simulator of the same lens, or None where caustics is not installed."""
    try:
        import caustics
    except ImportError:
        return None
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    place = {"cosmology": cosmology, "z_l": 0.5, "z_s": 1.5}
    shape = {"x0": MASS["center_x"], "y0": MASS["center_y"], "q": MASS["axis_ratio"], "phi": MASS["angle"]}
    shape["Rein"] = MASS["einstein_radius"]
    main = (
        caustics.SIE(name="main", **place, **shape)
        if mass == "SIE"
        else caustics.EPL(name="main", t=MASS["slope"], **place, **shape)
    )
    shear = caustics.ExternalShear(name="shear", x0=0.0, y0=0.0, **SHEAR, **place)
    lens = caustics.SinglePlane(name="lens", lenses=[main, shear], **place)
    source = caustics.Pixelated(name="source", x0=0.0, y0=0.0, pixelscale=PIXEL, shape=(SOURCE, SOURCE))
    simulator = caustics.LensSource(
        lens=lens,
        source=source,
        pixelscale=PIXEL,
        pixels_x=IMAGE,
        psf=[[1.0]] if psf is None else psf,
        upsample_factor=upsample,
    ).to(dtype=dtype)
    half = 0.5 * PIXEL / upsample
    simulator._grid = tuple(torch.round(g.double() / half).to(dtype) * half for g in simulator._grid)
    return simulator


# --- figures -----------------------------------------------------------------------------------------------------------


def dot_test(bench: Benchmark) -> None:
    """Adjoint against forward."""
    source, image = sky_grid((31, 24), 0.1), sky_grid((37, 42), (0.1, 0.09))
    mask = random(image.shape, 1) > 0.4
    cases: list[dict[str, Any]] = [
        {},
        {"psf": moffat((7, 7)), "oversampling": 2},
        {"psf": moffat((6, 8)), "mask": mask, "quantity": "flux"},
        {"psf": gaussian((5, 8)), "edge": "extrapolate"},
        {"psf": moffat((37, 42)), "interpolation": "cubic"},
        {"mask": mask, "oversampling": 3},
    ]
    worst = 0.0
    for k, options in enumerate(cases):
        A = GravitationalLens(LENS, source, image, free=("einstein_radius", "slope"), **options)
        x, d = random((3, *A.model_shape), k) - 0.5, random((3, *A.data_shape), k + 50) - 0.5
        samples = A.fixed(einstein_radius=0.9 + 0.2 * random((3,), k), slope=1 + 0.2 * random((3,), k + 9))
        for operator in (A, samples):
            worst = max(worst, mismatch(operator, operator.adjoint, x, d))
    bench.add("lens_dot_test", worst, note=f"{2 * len(cases)} operators, float64")


def error(bench: Benchmark) -> None:
    """Equality with caustics on square images, and with a dense matrix on non-square ones."""
    worst, against = _dense_error(), "a dense matrix only, caustics is not installed"
    cases: list[tuple[str, Tensor | None, int]] = [
        ("EPL", None, 1),
        ("SIE", None, 2),
        ("EPL", gaussian(), 1),
        ("EPL", moffat(), 1),
        ("SIE", moffat((6, 6)), 1),
    ]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(F64)  # caustics takes its parameters' precision from it
    try:
        for k, (mass, psf, rays) in enumerate(cases):
            simulator = caustics_image(psf, rays, F64, mass)
            if simulator is None:
                break
            slope = 1.0 if mass == "SIE" else MASS["slope"]
            lens: LensModel = EPL(**{**MASS, "slope": slope}) + ExternalShear(**SHEAR)
            A = GravitationalLens(
                lens, sky_grid((SOURCE,) * 2, PIXEL), sky_grid((IMAGE,) * 2, PIXEL), psf, rays, edge="extrapolate"
            )
            x = random((1, *A.model_shape), k)
            want = simulator(x.reshape(-1))
            worst = max(worst, float((A(x)[0, 0] - want).abs().max() / want.abs().max()))
            against = f"caustics in {len(cases)} cases, a dense matrix in 3"
    finally:
        torch.set_default_dtype(previous)
    bench.add("lens_error", worst, "of the maximum", note=against)


def _dense_error() -> float:
    worst = 0.0
    for k, (psf, shape) in enumerate([(moffat((5, 4)), (22, 17)), (gaussian((3, 6)), (15, 26)), (None, (20, 13))]):
        source, image, s = sky_grid((17, 12), 0.12), sky_grid(shape, (0.13, 0.11)), 2
        A = GravitationalLens(LENS, source, image, psf, s)
        y, x = GravitationalLens.ray_positions(image, s, psf)
        beta = [b.numpy() for b in LENS.rays(y, x)]
        rows, columns = beta[0].shape
        frames = np.zeros((rows // s, columns // s, 17, 12))
        for i in range(rows):
            for j in range(columns):
                p = [(b[i, j] - o) / d for b, o, d in zip(beta, source.origin, source.spacing, strict=True)]
                for a in (math.floor(p[0]), math.floor(p[0]) + 1):
                    for c in (math.floor(p[1]), math.floor(p[1]) + 1):
                        if 0 <= a < 17 and 0 <= c < 12:
                            frames[i // s, j // s, a, c] += (1 - abs(p[0] - a)) * (1 - abs(p[1] - c)) / s**2
        flat = frames.reshape(rows // s, columns // s, -1)
        if psf is not None:
            flat = np.stack([convolve2d(f, psf.numpy(), "valid") for f in np.moveaxis(flat, -1, 0)], axis=-1)
        dense = torch.from_numpy(flat.reshape(-1, 17 * 12))
        v = random((4, *A.model_shape), k)
        want = v.flatten(1) @ dense.T
        worst = max(worst, float((A(v).flatten(1) - want).abs().max() / want.abs().max()))
    return worst


def speedup(bench: Benchmark) -> None:
    """CPU time of caustics over ours, in one run."""
    calls, sources = 20, random((64, 1, SOURCE, SOURCE), 3, torch.float32)
    repeats = 5 if bench.fast else 9
    for name, psf in (("", None), ("_psf", gaussian()), ("_moffat", moffat())):
        A = GravitationalLens(LENS, sky_grid((SOURCE,) * 2, PIXEL), sky_grid((IMAGE,) * 2, PIXEL), psf)
        simulator = caustics_image(psf, 1, torch.float32)
        if simulator is None:
            bench.add(
                f"lens_speedup{name}", math.nan, "x", note="caustics is not installed; run with the peers' python"
            )
            continue
        theirs = torch.vmap(lambda x, f=simulator: f(x.reshape(-1)))
        seconds = interleaved(
            {"caustics": lambda f=theirs: f(sources), "invgen": lambda f=A: _repeat(f, sources, calls)}, repeats
        )
        ours = seconds["invgen"].median / calls
        note = f"{1e3 * seconds['caustics'].median:.1f} ms against {1e3 * ours:.2f} ms, CPU, {torch.get_num_threads()} thread(s)"
        bench.add(f"lens_speedup{name}", seconds["caustics"].median / ours, "x", note=note)


def _repeat(function: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> None:
    for _ in range(calls):
        function(x)


def gradient(bench: Benchmark) -> None:
    """Gradient in the lens parameters against central differences."""
    names, step = tuple(LENS.parameters), 3e-8
    source, image = sky_grid((SOURCE,) * 2, PIXEL), sky_grid((IMAGE,) * 2, PIXEL)
    y, x = (torch.as_tensor(source.coordinates(k)) for k in ("y", "x"))
    light = torch.exp(-0.5 * ((y[:, None] - 0.1).square() + (x - 0.05).square()) / 0.25**2)[None, None]
    worst = {}
    for kind in ("bilinear", "cubic"):
        A = GravitationalLens(LENS, source, image, gaussian(), 2, free=names, interpolation=kind)
        d = A(light) + 0.1 * (random((1, *A.data_shape), 4) - 0.5)

        def misfit(values: list[Tensor], A: GravitationalLens = A, d: Tensor = d) -> Tensor:
            return (A(light, **dict(zip(names, values, strict=True))) - d).square().sum()

        at = [torch.tensor([1.02 * v + 0.01], dtype=F64, requires_grad=True) for v in LENS.parameters.values()]
        exact = torch.autograd.grad(misfit(at), at)
        errors = []
        for k, g in enumerate(exact):
            with torch.no_grad():
                plus, minus = ([v + h * (j == k) for j, v in enumerate(at)] for h in (step, -step))
                numeric = (misfit(plus) - misfit(minus)) / (2 * step)
            errors.append(float((g - numeric).abs() / numeric.abs()))
        worst[kind] = max(errors)
    bench.add(
        "lens_gradient", worst["bilinear"], "relative", note=f"{len(names)} parameters; cubic {worst['cubic']:.1e}"
    )


def measure(bench: Benchmark) -> None:
    """All figures of the operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for part in (dot_test, error, speedup, gradient):
            part(bench)


if __name__ == "__main__":
    measure(bench := Benchmark("lensing", __doc__ or ""))
    bench.finish()

"""deepinv and azula as `peers_diffusion.py` calls them: the same denoiser, blur, data and noise levels for both.

Three conventions for the same diffusion, with D(u, σ) = E[u0 | u0 + σ n = u]:

    invgen    u = u0 + σ ξ, D(u, σ)
    deepinv   x = s (u0 + σ ξ), D(x / s, σ); images in [0, 1], its samplers work on 2 u0 − 1 unless minus_one_one=False
    azula     x = α u0 + σ' ξ, σ' = α σ, D(x / α, σ' / α); no range of its own, its image models take [−1, 1]

Imported only by an interpreter that has both libraries.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import math
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "AzulaDenoiser",
    "Blur",
    "DeepinvDenoiser",
    "azula_run",
    "azula_sample",
    "deepinv_physics",
    "deepinv_run",
    "paper_step_dps",
]

Denoise = Callable[[Tensor, Any], Tensor]


class _EmptyModule(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _EmptyTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves torchvision and its submodules as empty modules.

    deepinv and azula require torchvision for datasets and image models, which no sampler touches; pip installs the
    build for graphics cards, and that one refuses to be imported beside the CPU build of torch (its operators are not
    registered). Only where the import fails are the empty modules put in its place.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        mine = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError, OSError):
    for broken in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[broken]
    sys.meta_path.insert(0, _EmptyTorchvision())

warnings.filterwarnings("ignore", category=SyntaxWarning)  # of docstrings in the peers, at their first import
# the peers come after the finder: they import torchvision
from azula.denoise import Denoiser, DiracPosterior  # noqa: E402
from azula.noise import Schedule  # noqa: E402
from deepinv.physics import BlurFFT  # noqa: E402
from deepinv.physics import GaussianNoise as DeepinvGaussianNoise  # noqa: E402
from deepinv.sampling import (  # noqa: E402
    DDPMSolver,
    DPSDataFidelity,
    EDMDiffusionSDE,
    NoisyDataFidelity,
    PosteriorDiffusion,
)


class Blur:
    """Periodic convolution of `(batch, 1, n, n)` by two real FFTs: the plain function azula asks for.

    Args:
        kernel: odd square, its middle is the centre. n: pixels a side.
    """

    def __init__(self, kernel: Tensor, n: int) -> None:
        placed = torch.zeros(n, n, dtype=torch.float64)
        placed[: len(kernel), : len(kernel)] = kernel
        half = len(kernel) // 2
        self.n, self.transfer = n, torch.fft.rfft2(placed.roll((-half, -half), (0, 1)))

    def to(self, dtype: torch.dtype) -> Blur:
        """In place: the dtype of the fields to come."""
        self.transfer = self.transfer.to(dtype.to_complex())
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.transfer, s=(self.n, self.n))

    def pseudo_inverse(self, d: Tensor, cut: float) -> Tensor:
        """A† d; singular values below `cut` count as zero."""
        inverse = torch.where(self.transfer.abs() > cut, 1 / self.transfer, torch.zeros_like(self.transfer))
        return torch.fft.irfft2(torch.fft.rfft2(d) * inverse, s=(self.n, self.n))


def prior_mean(denoise: Denoise, sigma: float, side: int) -> Tensor:
    """`(1, 1, side, side)`, D(D(0)) at a level that swamps the prior: where invgen starts, too."""
    zero = torch.zeros(1, 1, side, side, dtype=torch.float64)
    return denoise(denoise(zero, sigma), sigma)


# --- deepinv ---------------------------------------------------------------------------------------------------------


def deepinv_physics(kernel: Tensor, n: int, noise: float) -> BlurFFT:
    """The same blur and noise as `Blur`, with the singular value decomposition deepinv knows for it."""
    model = DeepinvGaussianNoise(sigma=noise)
    return BlurFFT(img_size=(1, n, n), filter=kernel[None, None].float(), noise_model=model)


class DeepinvDenoiser(nn.Module):
    """D(u, sigma) as a deepinv denoiser; sigma comes as a number, `()` or `(batch, 1, 1, 1)`."""

    def __init__(self, denoise: Denoise) -> None:
        super().__init__()
        self.denoise = denoise

    def forward(self, x: Tensor, sigma: Any, *_: Any, **__: Any) -> Tensor:
        return self.denoise(x, sigma.reshape(-1) if isinstance(sigma, Tensor) else float(sigma))


def deepinv_run(
    fidelity: NoisyDataFidelity, denoise: Denoise, physics: BlurFFT, y: Tensor, levels: Sequence[float], n: int
) -> Tensor:
    """`(n, …)` samples on given noise levels with the ancestral (DDPM) solver, in the denoiser's own range.

    `minus_one_one=False` switches the [−1, 1] convention off; the clip of the denoised image is the fidelity's.
    """
    sde = EDMDiffusionSDE(sigma_t=lambda t: t, variance_exploding=True, alpha=1.0, minus_one_one=False)
    solver = DDPMSolver(timesteps=torch.tensor(levels, dtype=torch.float64))
    model = PosteriorDiffusion(fidelity, DeepinvDenoiser(denoise), sde, solver, minus_one_one=False)
    start = prior_mean(denoise, levels[0], y.shape[-1]) + levels[0] * torch.randn(n, *y.shape[1:], dtype=torch.float64)
    return model(y.expand(n, *y.shape[1:]).float(), physics, x_init=start)


def paper_step_dps(scale: float, levels: Sequence[float]) -> DPSDataFidelity:
    """deepinv's DPS term with the step of the paper (Chung et al. 2022, algorithm 1) by a weight for each level.

    deepinv treats λ|r| as a negative log-likelihood, so that its shift of u from σ to σ' is λ (σ² − σ'²) ∇|r|. The paper
    subtracts (ζ/|r|) ∇|r|² = 2 ζ ∇|r| from a variance-preserving chain, a shift of 2 ζ/(α α') ∇_u |r| with
    α² = 1/(1 + σ²). The two agree for λ = 2 ζ √((1 + σ²)(1 + σ'²))/(σ² − σ'²).
    """
    now, after = torch.tensor(levels[:-1]).double(), torch.tensor(levels[1:]).double()
    weights = 2 * scale * ((1 + now**2) * (1 + after**2)).sqrt() / (now**2 - after**2)

    class PaperStep(DPSDataFidelity):
        def forward(self, x: Tensor, y: Tensor, physics: Any, sigma: Tensor, *args: Any, **options: Any) -> Any:
            self.weight = float(weights[(now - sigma.double()).abs().argmin()])
            return super().forward(x, y, physics, sigma, *args, **options)

    return PaperStep(clip=None)


# --- azula -----------------------------------------------------------------------------------------------------------


class Levels(Schedule):
    """Variance-preserving (α, σ') of given noise levels, visited one by one by a sampler of `len(levels) − 1` steps."""

    def __init__(self, levels: Sequence[float]) -> None:
        self.sigma = torch.tensor(levels, dtype=torch.float64)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma[((1 - t) * (len(self.sigma) - 1)).round().long()]
        alpha = (1 + sigma**2).rsqrt()
        return alpha.to(t), (alpha * sigma).to(t)


class AzulaDenoiser(Denoiser):
    """D(u, sigma) as an azula denoiser; the state may be flat, `(batch, n²)`, which azula's linear solvers need."""

    def __init__(self, denoise: Denoise, schedule: Schedule) -> None:
        super().__init__()
        self.denoise, self.schedule = denoise, schedule

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> DiracPosterior:
        alpha, sigma = self.schedule(t)
        side = math.isqrt(x_t[0].numel())
        clean = self.denoise((x_t / alpha).reshape(-1, 1, side, side), (sigma / alpha).reshape(-1))
        return DiracPosterior(mean=clean.reshape(x_t.shape))


def azula_run(make: Callable[[Denoiser], Any], denoise: Denoise, levels: Sequence[float], n: int, dim: int) -> Tensor:
    """`(n, dim)` samples on given noise levels; `make(denoiser)` returns the sampler."""
    sampler = make(AzulaDenoiser(denoise, Levels(levels)))
    mean = prior_mean(denoise, levels[0], math.isqrt(dim)).reshape(1, dim)
    return sampler(sampler.init((n, dim), mean=mean, var=0.0, dtype=torch.float64))


def azula_sample(sampler: Any, n: int, dim: int) -> Tensor:
    """`(n, dim)` float64 samples from the sampler's own start."""
    return sampler(sampler.init((n, dim), dtype=torch.float64))

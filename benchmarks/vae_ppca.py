"""A variational autoencoder with a linear decoder against probabilistic PCA, whose maximum likelihood is closed form.

    ln p = −n/2 [d ln 2π + Σ_{j ≤ q} ln λ_j + (d − q) ln σ² + d],   σ² = mean of λ_j, j > q

(Tipping and Bishop 1999, equations 3 and 8), λ_j the eigenvalues of the sample covariance. The linear VAE reaches it:
at the maximum the posterior of z is diagonal in the principal axes, which a constant log-variance can express (Lucas et
al. 2019, arXiv:1911.02469). The figure is what the trained ELBO lacks, in nats a dimension, on the training data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invgen.priors import VAE
from invgen.priors.networks import MLP, LinearEncoder
from invgen.transforms import Affine

__all__ = ["ppca_gap"]


def data(n: int, d: int, q: int, seed: int) -> Tensor:
    """Draws of a factor model with a non-zero mean, loadings of different strength and noise of sd 0.5, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    loadings = torch.linalg.qr(normal(d, q))[0] * torch.linspace(3.0, 1.0, q, dtype=torch.float64)
    return normal(d) * 2 + normal(n, q) @ loadings.mT + 0.5 * normal(n, d)


def maximum_log_likelihood(x: Tensor, q: int) -> float:
    """Mean log-likelihood of probabilistic PCA at its maximum, nats an example."""
    d = x.shape[1]
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    log_det = values[:q].log().sum() + (d - q) * values[q:].mean().log()
    return -0.5 * float(d * math.log(2 * math.pi) + log_det + d)


def ppca_gap(*, n: int = 1000, d: int = 16, q: int = 4, steps: int = 2000, seed: int = 0) -> float:
    """(maximum log-likelihood of probabilistic PCA − ELBO of the trained linear VAE) / d, nats a dimension, float64.

    Args:
        n: examples. d: dimensions of x. q: latent units. steps: full-batch Adam steps. seed: of data and training.
    """
    x = data(n, d, q, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # one scale for all entries: the noise of probabilistic PCA stays isotropic, and the Jacobian enters the ELBO
        transform = Affine(x.mean(0), float(x.std(0).mean()))
        vae = VAE(LinearEncoder(d, q), MLP(q, d, depth=0), (d,), latent=q, transform=transform).double()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = vae.training_loss({"x": x}, generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    elbos = [vae.log_prob_estimate(x, samples=1, seed=k, chunk=n).mean() for k in range(32)]
    return (maximum_log_likelihood(x, q) - float(torch.stack(elbos).mean())) / d


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"ppca_gap {ppca_gap():.5f} nats/dim")

"""Gaussian mixtures from examples: expectation-maximisation from a k-means++ start."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from invgen.grid import Grid
from invgen.priors.fitting import as_examples
from invgen.priors.mixture import GaussianMixturePrior
from invgen.transforms import Transform

__all__ = ["fit_mixture"]


def _seeding(u: Tensor, components: int, generator: torch.Generator) -> Tensor:
    """k-means++ centres `(K, n)`: each next one drawn with probability ∝ squared distance (Arthur & Vassilvitskii 2007)."""
    first = int(torch.randint(u.shape[0], (1,), generator=generator))
    chosen = [first]
    nearest = (u - u[first]).square().sum(1)
    for _ in range(components - 1):
        if not bool(nearest.sum() > 0):
            raise ValueError(
                f"The examples hold only {len(chosen)} distinct values, fewer than the {components} components asked for."
            )
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (u - u[chosen[-1]]).square().sum(1))
    return u[chosen]


def _log_joint(u: Tensor, log_weights: Tensor, means: Tensor, values: Tensor, vectors: Tensor | None) -> Tensor:
    """log w_k N(u; m_k, C_k), `(examples, K)`."""
    offset = u[:, None] - means
    if vectors is not None:
        offset = torch.einsum("bki,kij->bkj", offset, vectors)
    return log_weights - 0.5 * ((offset.square() / values + values.log()).sum(-1) + u.shape[1] * math.log(2 * math.pi))


def fit_mixture(
    data: Tensor | np.ndarray,
    components: int,
    *,
    seed: int = 0,
    iterations: int = 200,
    tol: float = 1e-6,
    shrinkage: float = 0.0,
    floor: float = 1e-3,
    structure: str = "dense",
    grid: Grid | None = None,
    transform: Transform | None = None,
) -> GaussianMixturePrior:
    """Fit Σ_k w_k N(m_k, C_k) to `(n, *shape)` examples of x, in the coordinates u = T⁻¹(x).

    Maximises Σ_i log p(u_i) − κ/2 Σ_k [log |C_k| + τ tr C_k⁻¹] subject to C_k ≥ floor · τ · I, with τ the mean
    variance of the data, κ = shrinkage · n/K, and at least 1/K² pseudo-examples of weight: the M step

        C_k = clip[(N_k S_k + κ τ I)/(N_k + κ)],        w_k ∝ N_k + 1/K²

    is the exact maximiser (the clip acts on eigenvalues), so that the objective never falls and no component can
    collapse onto an example or vanish.

    Args:
        data: examples in physical units. components: K.
        seed: of the k-means++ start.
        iterations: at the most. tol: stop when the objective gains less than this per example.
        shrinkage: strength of the spherical prior on the covariances, in parts of the mean number of examples a
            component. floor: smallest eigenvalue, in parts of τ.
        structure: "dense" or "diagonal".
        grid, transform: of the prior.

    Returns:
        `GaussianMixturePrior`; its `history` holds the objective per example after each iteration.

    Cost: K n d² an iteration, and K d³.

    Raises:
        ValueError: fewer than K distinct examples, non-finite values, options out of range.

    Reference: Dempster, Laird & Rubin 1977.
    """
    data = as_examples(data)
    if not isinstance(data, Tensor) or data.ndim < 2 or not bool(torch.isfinite(data).all()):
        raise ValueError(
            "fit needs a tensor of finite examples (n, *shape); drop or fill the NaN and infinite values first."
        )
    if not 1 <= components <= data.shape[0]:
        raise ValueError(
            f"A mixture of {components} components needs at least as many examples, and one component; {data.shape[0]} were given."
        )
    if structure not in ("dense", "diagonal") or shrinkage < 0 or not 0 < floor < 1 or iterations < 1:
        raise ValueError(
            f"fit takes structure 'dense' or 'diagonal', shrinkage >= 0, 0 < floor < 1 and iterations >= 1; got {structure!r}, {shrinkage}, {floor}, {iterations}."
        )
    full = (transform.inverse(data) if transform is not None else data).double()
    shape, u = tuple(full.shape[1:]), full.flatten(1)
    n = u.shape[0]
    spread = float((u - u.mean(0)).square().mean())
    if not spread > 0:
        raise ValueError("All examples are equal; a mixture needs examples that differ.")
    means = _seeding(u, components, torch.Generator().manual_seed(seed))
    nearest = torch.cdist(u, means).argmin(1)
    share = torch.nn.functional.one_hot(nearest, components).double()
    kappa, pseudo = shrinkage * n / components, 1.0 / components**2
    history: list[float] = []
    for _ in range(iterations):
        count = share.sum(0)
        log_weights = ((count + pseudo) / (n + components * pseudo)).log()
        # an emptied component keeps its place: its mean is then free of the data
        means = torch.where(count[:, None] > 1e-8, share.mT @ u / count[:, None].clamp_min(1e-8), means)
        values, vectors = _maximise(u, share, means, count, kappa, spread, floor, structure)
        log_joint = _log_joint(u, log_weights, means, values, vectors)
        penalty = 0.5 * kappa * (values.log() + spread / values).sum() - pseudo * log_weights.sum()
        history.append(float((log_joint.logsumexp(1).sum() - penalty) / n))
        share = log_joint.softmax(1)
        if len(history) > 1 and history[-1] - history[-2] < tol:
            break
    if vectors is None:
        covariances = values.reshape(components, *shape)
    else:
        covariances = vectors * values[:, None] @ vectors.mT
        covariances = (covariances + covariances.mT) / 2
    prior = GaussianMixturePrior(
        log_weights.exp(), means.reshape(components, *shape), list(covariances), grid=grid, transform=transform
    )
    prior.history = history
    return prior


def _maximise(
    u: Tensor, share: Tensor, means: Tensor, count: Tensor, kappa: float, spread: float, floor: float, structure: str
) -> tuple[Tensor, Tensor | None]:
    """Covariances of the M step as eigenvalues `(K, n)` and eigenvectors."""
    total = (count + kappa).clamp_min(1e-8)
    if structure == "diagonal":
        scatter = torch.stack([share[:, k] @ (u - m).square() for k, m in enumerate(means)])
        return ((scatter + kappa * spread) / total[:, None]).clamp_min(floor * spread), None
    scatter = torch.stack([(u - m).mT @ ((u - m) * share[:, k, None]) for k, m in enumerate(means)])
    eye = torch.eye(u.shape[1]).to(u)
    matrix = (scatter + kappa * spread * eye) / total[:, None, None]
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.clamp_min(floor * spread), vectors

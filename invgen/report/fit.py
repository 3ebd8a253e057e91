"""How well samples explain the data: predictions, whitened residuals, chi² per datum, term by term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invgen.noise import GaussianNoise
from invgen.posterior import Posterior
from invgen.problem import InverseProblem, Term

__all__ = ["TermFit", "data_fit"]

_MOST_SAMPLES = 64  # chi² of more samples than this would cost forward runs without telling more


@dataclass(frozen=True, eq=False)
class TermFit:
    """One data set against the predictions of the posterior.

    Attributes:
        term: the data set. data, prediction: `data_shape`; the prediction is that of the posterior mean.
        residual: (data − prediction)/sigma, whitened where the noise is correlated, NaN where nothing was measured;
            its shape may be flat for covariances that whiten to another shape.
        chi2_mean: mean squared residual of the posterior mean, over measured data.
        chi2_samples: the same for each sample.
    """

    term: Term
    data: Tensor
    prediction: Tensor
    residual: Tensor
    chi2_mean: float
    chi2_samples: list[float]


@torch.no_grad()
def data_fit(posterior: Posterior, problem: InverseProblem, observation: int = 0) -> list[TermFit]:
    """Compare one observation with what the posterior predicts.

    For a noise that is not Gaussian the residual is divided by the standard deviation of the data around the
    prediction. Cost: one forward item for the mean and one for each of at most 64 samples.
    """
    samples, weights = posterior.flat()
    good = (weights[observation] > 0).nonzero().flatten()[:_MOST_SAMPLES]
    draws = samples[observation, good]
    theta = {k: v.flatten(1, 2)[observation, good] for k, v in posterior.theta.items()}
    w = weights[observation]
    mean_theta = {k: (v.flatten(1, 2)[observation] * w.to(v)).nansum().reshape(1) for k, v in posterior.theta.items()}
    mean = posterior.mean()[observation][None]
    fits = []
    predictions = problem.predict(mean, **mean_theta)
    spread: list[list[Tensor]] = [[] for _ in problem.terms]
    for first in range(0, draws.shape[0], 16):
        part = {k: v[first : first + 16] for k, v in theta.items()}
        for i, p in enumerate(problem.predict(draws[first : first + 16], **part)):
            spread[i].append(p)
    for i, term in enumerate(problem.terms):
        data = term.data[observation if term.n_obs > 1 else 0].to(predictions[i])
        residual, chi2 = _residual(term, data, predictions[i], mean_theta)
        _, chi2_samples = _residual(term, data, torch.cat(spread[i]), theta)
        fits.append(TermFit(term, data, predictions[i][0], residual[0], float(chi2[0]), chi2_samples.tolist()))
    return fits


def _residual(term: Term, data: Tensor, prediction: Tensor, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Whitened residuals `(batch, …)` and their mean square `(batch,)`."""
    difference = data - prediction
    mask = term.mask
    if mask is not None and isinstance(term.noise, GaussianNoise):
        R = term.noise.restricted(mask).covariance((int(mask.sum()),), **theta)
        seen = R.whiten(difference[:, mask])
        out = torch.full(difference.shape, float("nan"), dtype=difference.dtype)
        if seen.shape[1:] == (int(mask.sum()),):
            out[:, mask] = seen
    else:
        if isinstance(term.noise, GaussianNoise):
            out = term.noise.covariance(tuple(data.shape), **theta).whiten(difference)
        else:
            out = difference / term.noise(prediction, **theta).variance.clamp_min(1e-30).sqrt()
        if mask is not None:
            out = torch.where(mask, out, torch.nan)
        seen = out if mask is None else out[:, mask]
    return out, seen.abs().square().flatten(1).mean(1)

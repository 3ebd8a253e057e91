r"""Variational autoencoders with an explicit likelihood (Kingma and Welling 2014, arXiv:1312.6114).

A decoder gives p(u | z), z ~ N(0, I), an encoder q(z | u) = N(μ(u), diag s²(u)), and for every example

    log p(u) ≥ ELBO(u) = E_q[log p(u | z)] − KL(q(z | u) ‖ N(0, I)) = −distortion − rate,        (their equation 3)
    KL = ½ Σ_j (μ_j² + s_j² − 1 − ln s_j²),

sums over the entries of u and over the latent units, in nats: averaging the one over pixels and the other over units,
as is often done, multiplies the rate by pixels / units and hides the noise level of the likelihood. β-VAE (Higgins et
al. 2017) weights the rate by β in the training loss alone; what is reported is always the bound itself.

With K importance samples the bound tightens to log p(u) as K grows (Burda, Grosse and Salakhutdinov 2016,
arXiv:1509.00519, equation 8):

    L_K = E[log 1/K Σ_k p(u | z_k) N(z_k; 0, I) / q(z_k | u)],   ELBO = L_1 ≤ L_K ≤ L_{K+1} ≤ log p(u).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invgen.contracts import check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.priors import networks
from invgen.priors._fitting_networks import made_from
from invgen.priors._likelihoods import GaussianLikelihood, likelihood_of
from invgen.priors._saving import damaged, read_prior, write_prior
from invgen.transforms import Affine, Identity, Transform

__all__ = ["VAE"]

ACTIVE = 0.01  # Var_x E_q[z_j] above which a latent unit is called active (Burda et al. 2016, section 5.2)


class VAE(nn.Module):
    """A decoder f(z) = T(E[u | z]), z ~ N(0, I), trained with an encoder by the evidence lower bound.

    Has `sample`, `HasLatent` (the prior of latent solvers is the law of `decode(z)`, without the likelihood's noise)
    and `HasDensityEstimate` (the importance-weighted bound on log p(x), with the likelihood's noise).

    Args:
        encoder: `(batch, *shape)` -> `(batch, 2 latent)`: means, then log-variances, of q(z | u).
        decoder: `(batch, latent)` -> `(batch, *shape)`; K times the channels for a categorical likelihood with K values.
        shape: `(channels, *spatial)` or `(dim,)` of one field.
        latent: dimension of z.
        likelihood: "gaussian" (mean from the decoder), "bernoulli" (logits; u holds 0 and 1) or "categorical" (logits).
        sigma: standard deviation of the Gaussian likelihood in u: a number, one value an entry, or None to learn it.
        per_entry: learn one sigma an entry instead of one in all.
        values: the values that the entries of u take, for a categorical likelihood; None for fields that are one-hot
            over their channels.
        beta: weight of the rate in the training loss; 1 is the bound.
        transform: x = T(u); the identity when omitted.
        grid: where the field lives.

    Raises:
        ValueError: shapes of the networks that do not fit, unknown likelihoods.

    Example:
        >>> prior = VAE.convolutional((1, 64, 64), latent=64, likelihood="bernoulli")
        >>> Training(steps=4000).fit(prior, ArrayData(facies))

    Cost: `decode` and `sample` one decoder call an item, `encode` one encoder call.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        shape: tuple[int, ...],
        *,
        latent: int,
        likelihood: str = "gaussian",
        sigma: float | Tensor | None = None,
        per_entry: bool = False,
        values: Sequence[float] | Tensor | None = None,
        beta: float = 1.0,
        transform: Transform | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        if not (beta >= 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be finite and non-negative, got {beta}; 1 is the evidence lower bound.")
        self.encoder, self.decoder, self.shape, self.grid = encoder, decoder, tuple(shape), grid
        self.latent_shape: tuple[int, ...] = (int(latent),)
        self.transform = transform or Identity()
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"The prior's shape {self.shape} does not fit its grid {grid.field_shape}.")
        self.kind, self.beta = likelihood, float(beta)
        self.likelihood = likelihood_of(likelihood, self.shape, sigma=sigma, per_entry=per_entry, values=values)
        self.seen: dict[str, Any] = {}
        self._checked = False
        self._check_networks()

    def _check_networks(self) -> None:
        code, out = made_from(self.encoder, self.shape), made_from(self.decoder, self.latent_shape)
        wanted = (self.likelihood.multiple * self.shape[0], *self.shape[1:])
        if code != (2 * self.latent_shape[0],):
            raise ValueError(
                f"The encoder of a VAE with {self.latent_shape[0]} latent units returns {2 * self.latent_shape[0]} numbers an item (means, log-variances), this one {code}."
            )
        if out != wanted:
            raise ValueError(
                f"The decoder must return items of the shape {wanted} for a {self.kind} likelihood on {self.shape}, this one returns {out}."
            )

    @classmethod
    def convolutional(
        cls,
        shape: tuple[int, int, int],
        *,
        latent: int = 64,
        widths: tuple[int, ...] = (32, 48, 64, 96),
        patch: int = 2,
        spatial: bool = False,
        **options: Any,
    ) -> VAE:
        """With `ConvEncoder` and `ConvDecoder` on `(channels, height, width)`; options are those of the constructor.

        `spatial`: the latent is a coarse map of the field (15 numbers as 5 × 3 for 80 × 48 pixels).

        Sizes must be multiples of patch · 2^(len(widths) − 1), 16 with the defaults. 0.67 million parameters for 64×64.
        """
        kinds = ("likelihood", "sigma", "per_entry", "values")
        chosen = {k: options[k] for k in kinds if k in options}
        multiple = likelihood_of(chosen.pop("likelihood", "gaussian"), tuple(shape), **chosen).multiple
        size = (shape[1], shape[2])
        encoder = networks.ConvEncoder(shape[0], size, 2 * latent, widths=widths, patch=patch)
        decoder = networks.ConvDecoder(latent, multiple * shape[0], size, widths=widths, patch=patch, spatial=spatial)
        return cls(encoder, decoder, tuple(shape), latent=latent, **options)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    # --- the model -------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor) -> Tensor:
        """f(z) = T(E[u | z]).

        Args:
            z: `(batch, latent)`.

        Returns:
            `(batch, *shape)`, in the dtype of z; differentiable.
        """
        return self.transform(self.likelihood.mean(self._outputs(z)))

    def _outputs(self, z: Tensor) -> Tensor:
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return self.decoder(z.to(self._dtype)).to(z.dtype)

    def encode(self, x: Tensor) -> torch.distributions.Independent:
        """q(z | x), a diagonal Gaussian: `.mean`, `.stddev` and `.rsample()` are `(batch, latent)`.

        Args:
            x: `(batch, *shape)` in physical units.
        """
        mean, log_sd = self._encode(self._to_u(x, "encode"))
        return torch.distributions.Independent(torch.distributions.Normal(mean, log_sd.exp()), 1)

    def _to_u(self, x: Tensor, method: str) -> Tensor:
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.{method}")
        return self.transform.inverse(x)

    def _encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(u.to(self._dtype)).to(u.dtype).chunk(2, dim=1)
        # exp of what an untrained or diverging encoder may return must stay finite
        return mean, 0.5 * log_variance.clamp(-20.0, 20.0)

    def _terms(self, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u | z) at z = μ + s · noise, `(batch,)`, and the rate of every unit, `(batch, latent)`, in nats."""
        mean, log_sd = self._encode(u)
        rate = 0.5 * (mean.square() + (2 * log_sd).exp() - 1 - 2 * log_sd)
        outputs = self._outputs(mean + log_sd.exp() * noise)
        return self.likelihood.log_prob(u, outputs), rate

    def _volume(self, u: Tensor) -> Tensor:
        """log |det dT/du|: what turns a density of u into one of x; a probability mass has none."""
        return u.new_zeros(len(u)) if self.likelihood.discrete else self.transform.log_det(u)

    # --- training --------------------------------------------------------------------------------------------------

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """(−E_q log p(u | z) + beta · KL) / entries of each example, `(batch,)`: nats per dimension of u.

        One reparametrised z an example, drawn on the CPU from `generator`. The division only sets the scale of the
        gradients; both terms are sums before it, so that with beta = 1 this is −ELBO / entries.
        """
        u = self._to_u(batch["x"], "training_loss")
        if not self._checked:  # the whole data set is not here; a wrong coding shows in the first batch
            self.likelihood.check(u)
            self._checked = self.training
        noise = torch.randn(len(u), *self.latent_shape, generator=generator).to(u)
        log_likelihood, rate = self._terms(u, noise)
        return (self.beta * rate.sum(1) - log_likelihood) / self.likelihood.entries

    @torch.no_grad()
    def validation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """ELBO, rate and distortion (nats per example, in x), bits per dimension, active units, rms error.

        bits_per_dim is −ELBO/(entries ln 2), of a density in the units of x for the Gaussian likelihood. A latent
        unit is active when the variance over examples of its posterior mean exceeds 0.01 (Burda et al. 2016). Fixed
        noise, so that runs compare.

        Warns:
            UserWarning: fewer than half of the latent units are active (posterior collapse).
        """
        x = batch["x"]
        self.likelihood.check(self._to_u(x, "validation"))
        noise = torch.randn(len(x), *self.latent_shape, generator=torch.Generator().manual_seed(0)).to(x)
        log_likelihoods, rates, means, errors = [], [], [], []
        for first in range(0, len(x), 64):
            u = self.transform.inverse(x[first : first + 64])
            log_likelihood, rate = self._terms(u, noise[first : first + 64])
            log_likelihoods.append(log_likelihood - self._volume(u))
            rates.append(rate)
            means.append(self._encode(u)[0])
            errors.append((self.likelihood.mean(self._outputs(means[-1])) - u).square().flatten(1).mean(1))
        active = int((torch.cat(means).var(0) > ACTIVE).sum()) if len(x) > 1 else 0
        total, distortion = float(torch.cat(rates).sum(1).mean()), -float(torch.cat(log_likelihoods).mean())
        figures: dict[str, float] = {
            "elbo": -total - distortion,
            "rate": total,
            "distortion": distortion,
            "bits_per_dim": (total + distortion) / (self.likelihood.entries * math.log(2)),
            "active_units": float(active),
            "reconstruction_rmse": float(torch.cat(errors).mean().sqrt()),
        }
        if isinstance(self.likelihood, GaussianLikelihood):
            figures["sigma"] = float(self.likelihood.sigma.mean())
        if len(x) > 1 and 2 * active < self.latent_shape[0]:
            warnings.warn(
                f"Posterior collapse: only {active} of {self.latent_shape[0]} latent units carry information (variance of the posterior mean above {ACTIVE}); use a smaller latent, a smaller beta or sigma, or train longer.",
                stacklevel=3,
            )
        return figures

    # --- densities -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob_estimate(self, x: Tensor, *, samples: int = 64, seed: int = 0, chunk: int = 64) -> Tensor:
        """Importance-weighted bound L_K on log p(x), K = `samples`; equation 8 of Burda et al. 2016.

        A stochastic lower bound (its expectation grows with K to log p(x)), never for an acceptance step.

        Args:
            x: `(batch, *shape)`. samples: K; 1 is an estimate of the ELBO. seed: of the draws.
            chunk: decoder calls at a time.

        Returns:
            `(batch,)` nats, of the density of x (Jacobian included), or of the probability of x for discrete
            likelihoods. Cost: K decoder calls and one encoder call an item.
        """
        if samples < 1:
            raise ValueError(f"The importance-weighted bound needs at least 1 sample, got {samples}.")
        u = self._to_u(x, "log_prob_estimate")
        self.likelihood.check(u)
        bounds = [
            self._bound(
                u[i : i + chunk], samples, Streams(seed, range(i, min(i + chunk, len(u))), device=u.device), chunk
            )
            for i in range(0, len(u), chunk)
        ]
        return torch.cat(bounds) - self._volume(u)

    def _bound(self, u: Tensor, samples: int, rng: Streams, chunk: int) -> Tensor:
        n, together, weights = len(u), max(1, chunk // len(u)), []
        mean, log_sd = self._encode(u)
        for first in range(0, samples, together):
            k = min(together, samples - first)
            # one draw at a time: the numbers must not depend on how many go through the decoder together
            noise = torch.stack([rng.normal(self.latent_shape, dtype=u.dtype) for _ in range(k)], 1)
            z = mean[:, None] + log_sd.exp()[:, None] * noise
            log_ratio = (0.5 * (noise.square() - z.square()) + log_sd[:, None]).sum(2)  # log N(z; 0, I) − log q(z | u)
            outputs = self._outputs(z.flatten(0, 1))
            log_likelihood = self.likelihood.log_prob(u.repeat_interleave(k, 0), outputs).reshape(n, k)
            weights.append(log_likelihood + log_ratio)
        return torch.cat(weights, 1).logsumexp(1) - math.log(samples)

    @torch.no_grad()
    def rate_distortion(self, x: Tensor, *, seed: int = 0, points: int = 17) -> dict[str, Tensor]:
        """The rate–distortion curve of this model: what each latent unit costs and what it buys.

        The units are ordered by their rate E_x KL_j. For growing k the first k are drawn from q(z_j | x), the others
        from N(0, 1), where they cost nothing: −rate_k − distortion_k is a lower bound on E log p(x) for every k, and
        for k = latent it is the ELBO. (A curve over β takes one trained model a point: its points are the last entries
        of these.)

        Args:
            x: `(batch, *shape)`. seed: of the draws. points: how many values of k, 0 and `latent` among them.

        Returns:
            "units" `(points,)` k; "rate" and "distortion" `(points,)` nats per example; "rate_per_unit" `(latent,)`
            in the units' own order. Cost: `points` decoder calls an item.
        """
        u = self._to_u(x, "rate_distortion")
        self.likelihood.check(u)
        latent = self.latent_shape[0]
        rng = Streams(seed, range(len(u)), device=u.device)
        noise = rng.normal((latent,), dtype=u.dtype)
        parts = [self._encode(u[i : i + 64]) for i in range(0, len(u), 64)]
        mean, log_sd = torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])
        per_unit = (0.5 * (mean.square() + (2 * log_sd).exp() - 1 - 2 * log_sd)).mean(0)
        order = per_unit.argsort(descending=True)
        counts = torch.linspace(0, latent, min(points, latent + 1)).round().long().unique()
        rates, distortions = [], []
        for k in counts.tolist():
            keep = torch.zeros(latent, dtype=torch.bool, device=u.device)
            keep[order[:k]] = True
            z = torch.where(keep, mean + log_sd.exp() * noise, noise)
            log_p = [
                self.likelihood.log_prob(u[i : i + 64], self._outputs(z[i : i + 64])) for i in range(0, len(u), 64)
            ]
            rates.append(per_unit[keep].sum())
            distortions.append((self._volume(u) - torch.cat(log_p)).mean())
        return {
            "units": counts,
            "rate": torch.stack(rates),
            "distortion": torch.stack(distortions),
            "rate_per_unit": per_unit,
        }

    # --- draws -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, n: int, *, seed: int = 0, noise: bool = False, chunk: int = 64, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """`(n, *shape)` draws decode(z), z ~ N(0, I); with `noise` draws of x ~ p(x | z), the law of the bound."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        device, out = next(self.decoder.parameters()).device, []
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)), device=device)
            outputs = self._outputs(rng.normal(self.latent_shape, dtype=dtype))
            u = self.likelihood.draw(outputs, rng) if noise else self.likelihood.mean(outputs)
            out.append(self.transform(u))
        return torch.cat(out)

    @classmethod
    def examples(cls) -> list[VAE]:
        """Small ones with random weights: on vectors, and on 16 × 16 fields with values and in physical units."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vector = cls(networks.MLP(3, 4, width=16), networks.MLP(2, 3, width=16), (3,), latent=2, sigma=0.1)
            small = {"latent": 4, "widths": (8, 12), "patch": 2}
            values = cls.convolutional(
                (1, 16, 16),
                likelihood="categorical",
                values=(0.0, 1.0, 2.0),
                **small,  # type: ignore[arg-type]
            )
            grid = Grid((16, 16), (10.0, 10.0))
            units = cls.convolutional((1, 16, 16), grid=grid, transform=Affine(2500.0, 300.0), **small)  # type: ignore[arg-type]
        return [p.eval().requires_grad_(False) for p in (vector, values, units)]

    # --- disk ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors; `half` stores float16 weights (half the size, 1e-3 relative)."""
        settings = {
            "shape": list(self.shape),
            "latent": self.latent_shape[0],
            "likelihood": self.kind,
            "beta": self.beta,
            **self.likelihood.settings(),
        }
        return write_prior(
            path,
            self,
            {"encoder": self.encoder, "decoder": self.decoder},
            settings,
            tensors=self.likelihood.tensors(),
            half=half,
            card=card,
        )

    @classmethod
    def load(cls, path: str | Path) -> VAE:
        """Read a checkpoint; nothing in it is executed, and only invgen's networks are built."""
        stored = read_prior(path, cls.__name__)
        try:
            options = {k: v for k, v in stored.settings.items() if k not in ("shape", "learned")}
            if not stored.settings.get("learned", True):
                options["sigma"] = 1.0  # stated: its value is restored below
            prior = cls(
                stored.networks["encoder"],
                stored.networks["decoder"],
                tuple(stored.settings["shape"]),
                transform=stored.transform,
                grid=stored.grid,
                **options,
            )
            prior.likelihood.restore(stored.tensors)
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error
        prior.seen = stored.card
        return prior.eval().requires_grad_(False)

"""Autoencoders: a field as a short code, and a law of codes on top.

    min over e, d of  E |u − d(e(u))|² / entries           (or the Bernoulli cross-entropy of logits, for 0 and 1)

alone (Hinton and Salakhutdinov 2006, doi:10.1126/science.1127647) says nothing about which codes are likely: `prior` fits
a Gaussian or a kernel density to the codes of examples and returns the pushforward x = T(d(y)), y ~ that law. It is as good
as that law of codes is: nothing in the training makes codes Gaussian, which is what a `VAE` is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors import networks
from invgen.priors._fitting_networks import made_from
from invgen.priors._saving import damaged, read_prior, write_prior
from invgen.priors.gaussian import GaussianPrior
from invgen.priors.kde import KernelDensityPrior
from invgen.priors.pushforward import Pushforward
from invgen.transforms import Identity, Transform

__all__ = ["Autoencoder"]

LOSSES = ("squared", "bernoulli")


class Autoencoder(nn.Module):
    """An encoder and a decoder trained to reconstruct; no prior by itself (see `prior`).

    Args:
        encoder: `(batch, *shape)` -> `(batch, codes)`.
        decoder: `(batch, codes)` -> `(batch, *shape)`.
        shape: of one field. codes: dimension of a code.
        loss: "squared", or "bernoulli" for fields of 0 and 1 (the decoder returns logits, `decode` probabilities).
        transform: x = T(u); the networks see u. grid: where the field lives.

    Raises:
        ValueError: networks whose shapes do not fit, an unknown loss.

    Example:
        >>> autoencoder = Autoencoder.convolutional((1, 64, 64), codes=121, loss="bernoulli")
        >>> Training(steps=4000).fit(autoencoder, ArrayData(channels))
        >>> prior = autoencoder.prior(channels, kind="gaussian")
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        shape: tuple[int, ...],
        *,
        codes: int,
        loss: Literal["squared", "bernoulli"] = "squared",
        transform: Transform | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"The loss of an autoencoder is one of {', '.join(LOSSES)}, got {loss!r}.")
        self.encoder, self.decoder, self.shape, self.grid = encoder, decoder, tuple(shape), grid
        self.codes, self.loss = int(codes), loss
        self.transform = transform or Identity()
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"The shape {self.shape} does not fit the grid {grid.field_shape}.")
        self.seen: dict[str, Any] = {}
        self._checked = False
        code, made = made_from(encoder, self.shape), made_from(decoder, (self.codes,))
        if code != (self.codes,) or made != self.shape:
            raise ValueError(
                f"Fields {self.shape} and codes of {self.codes} units need an encoder to {(self.codes,)} and a decoder to {self.shape}, these return {code} and {made}."
            )

    @classmethod
    def convolutional(
        cls,
        shape: tuple[int, int, int],
        *,
        codes: int = 121,
        widths: tuple[int, ...] = (32, 48, 64, 96),
        patch: int = 2,
        **options: Any,
    ) -> Autoencoder:
        """With `ConvEncoder` and `ConvDecoder` on `(channels, height, width)`; options are those of the constructor."""
        spatial = (shape[1], shape[2])
        encoder = networks.ConvEncoder(shape[0], spatial, codes, widths=widths, patch=patch)
        decoder = networks.ConvDecoder(codes, shape[0], spatial, widths=widths, patch=patch)
        return cls(encoder, decoder, tuple(shape), codes=codes, **options)

    def encode(self, x: Tensor) -> Tensor:
        """Codes `(batch, codes)` of fields `(batch, *shape)` in physical units."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.encode")
        u = self.transform.inverse(x)
        return self.encoder(u.to(next(self.encoder.parameters()).dtype)).to(u.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Fields `(batch, *shape)` in physical units of codes `(batch, codes)`; differentiable."""
        made = self._outputs(codes)
        return self.transform(made.sigmoid() if self.loss == "bernoulli" else made)

    def _outputs(self, codes: Tensor) -> Tensor:
        check_batch(codes, (self.codes,), f"The codes given to {type(self).__name__}.decode")
        return self.decoder(codes.to(next(self.decoder.parameters()).dtype)).to(codes.dtype)

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Reconstruction loss of each example, `(batch,)`, a mean over its entries; draws nothing from `generator`."""
        x = batch["x"]
        u = self.transform.inverse(x)
        if self.loss == "bernoulli" and not self._checked:
            if not bool(((u == 0) | (u == 1)).all()):
                raise ValueError(
                    f"The Bernoulli loss takes fields of 0 and 1, these hold values between {float(u.min()):g} and {float(u.max()):g}; use loss='squared'."
                )
            self._checked = self.training
        made = self._outputs(self.encode(x))
        if self.loss == "bernoulli":
            return F.binary_cross_entropy_with_logits(made, u, reduction="none").flatten(1).mean(1)
        return (made - u).square().flatten(1).mean(1)

    @torch.no_grad()
    def validation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """ "reconstruction_rmse" in x; "mean_code_correlation", the mean |correlation| between two units."""
        x = batch["x"]
        parts = [x[i : i + 64] for i in range(0, len(x), 64)]
        codes = torch.cat([self.encode(p) for p in parts])
        errors = [
            (self.decode(codes[64 * i : 64 * i + 64]) - p).square().flatten(1).mean(1) for i, p in enumerate(parts)
        ]
        figures = {"reconstruction_rmse": float(torch.cat(errors).mean().sqrt())}
        if self.codes > 1 and len(x) > 2:
            off = torch.corrcoef(codes.double().mT).nan_to_num().abs()
            figures["mean_code_correlation"] = float((off.sum() - off.trace()) / (self.codes * (self.codes - 1)))
        return figures

    @torch.no_grad()
    def prior(
        self,
        x: Tensor,
        *,
        kind: Literal["gaussian", "kde"] = "gaussian",
        bandwidth: float | str = "likelihood",
        chunk: int = 64,
    ) -> Pushforward:
        """The pushforward x = decode(y) of a law fitted to the codes of examples.

        Args:
            x: `(n, *shape)` examples, e.g. those of the training.
            kind: "gaussian": y ~ N(m, Σ̂), and `decode(z)` of the result is decode(m + L z), L Lᵀ = Σ̂, z ~ N(0, I); with
                fewer examples than units, or units that do not vary, Σ̂ is lifted by 1e-6 of its mean variance. "kde": a
                `KernelDensityPrior`; the result has `sample` only, since a draw begins with a discrete choice.
            bandwidth: of the kernels.

        Returns:
            A `Pushforward` in physical units, on this autoencoder's grid.
        """
        if len(x) < 2:
            raise ValueError(f"A law of codes needs at least two examples, got {len(x)}.")
        codes = torch.cat([self.encode(x[i : i + chunk]) for i in range(0, len(x), chunk)]).double().cpu()
        base: GaussianPrior | KernelDensityPrior
        if kind == "gaussian":
            covariance = torch.cov(codes.mT).reshape(self.codes, self.codes)
            lift = 1e-6 * float(covariance.diagonal().mean())
            if not lift > 0:
                raise ValueError("All examples have the same code; train the autoencoder, or give examples that vary.")
            eye = torch.eye(self.codes, dtype=torch.float64)
            base = GaussianPrior.dense(codes.mean(0), covariance + lift * eye)
        elif kind == "kde":
            base = KernelDensityPrior(codes, bandwidth=bandwidth)
        else:
            raise ValueError(f"The law of the codes is 'gaussian' or 'kde', got {kind!r}.")
        return Pushforward(self.decode, base, shape=self.shape, grid=self.grid)

    def save(self, path: str | Path, *, half: bool = False, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors (not the law of the codes: `prior` fits it again from examples)."""
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        settings = {"shape": list(self.shape), "codes": self.codes, "loss": self.loss}
        return write_prior(path, self, parts, settings, half=half, card=card)

    @classmethod
    def load(cls, path: str | Path) -> Autoencoder:
        """Read a checkpoint; nothing in it is executed, and only invgen's networks are built."""
        stored = read_prior(path, cls.__name__)
        try:
            options: dict[str, Any] = dict(stored.settings)
            made = cls(
                stored.networks["encoder"],
                stored.networks["decoder"],
                tuple(options.pop("shape")),
                transform=stored.transform,
                grid=stored.grid,
                **options,
            )
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error
        made.seen = stored.card
        return made.eval().requires_grad_(False)

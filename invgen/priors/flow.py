r"""Normalizing flows on vectors, built from zuko: an invertible network f with a triangular Jacobian.

u = f(z), z ~ N(0, I), so that log p(u) = log N(f⁻¹(u); 0, I) + log |det ∂f⁻¹/∂u|, exactly (Dinh et al. 2014,
arXiv:1410.8516; Papamakarios et al. 2021, arXiv:1912.02762, equation 1). Each layer transforms features one by one with
parameters computed from others: in a *coupling* layer half of the features give the parameters of the other half, and
both directions take one pass; in an *autoregressive* layer feature i sees the features before it, which is more flexible,
and one direction takes a pass a feature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invgen.checkpoints import read_checkpoint, write_checkpoint
from invgen.contracts import check_batch
from invgen.grid import Grid
from invgen.priors._ode import log_normal
from invgen.priors._preconditioning import known
from invgen.priors._saving import affine_of, affine_tensors, damaged
from invgen.transforms import Identity, Transform

__all__ = ["Flow"]

_KINDS = ("nice", "realnvp", "nsf", "maf", "nsf-ar")


class Flow(nn.Module):
    """A normalizing flow p(u) for vectors, trained by maximum likelihood; x = T(u).

    Has: `sample`, exact `log_prob` (`HasDensity`), `decode` (`HasLatent`). Cost: one pass of `transforms` layers for
    `log_prob`; the same for `decode` with couplings, `dim` passes with autoregressive layers.

    Args:
        dim: entries of a vector.
        kind: "nice" (additive couplings, volume preserving), "realnvp" (affine couplings, Dinh et al. 2017,
            arXiv:1605.08803), "nsf" (rational-quadratic splines, couplings, Durkan et al. 2019, arXiv:1906.04032), "maf"
            (affine, autoregressive, Papamakarios et al. 2017), "nsf-ar" (splines, autoregressive).
        transforms: layers. hidden: width of each hidden layer of the parameter networks. bins: of the splines, which are
            the identity outside [−5, 5]: let `transform` standardise the data.
        transform: x = T(u); the identity when omitted.

    Raises:
        ValueError: a kind that does not exist, or couplings of fewer than two features.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: str = "nsf",
        transforms: int = 5,
        hidden: tuple[int, ...] = (64, 64),
        bins: int = 8,
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.kind = known(kind, _KINDS, "kind of flow")
        if dim < 2 or transforms < 2:
            raise ValueError(f"A flow needs dim >= 2 and transforms >= 2, got {dim} and {transforms}.")
        self.settings = {"dim": dim, "kind": kind, "transforms": transforms, "hidden": list(hidden), "bins": bins}
        self.shape = self.latent_shape = (dim,)
        self.grid: Grid | None = None
        self.transform = transform or Identity()
        self.network = _build(dim, kind, transforms, tuple(hidden), bins)
        self.seen: dict[str, Any] = {}

    @classmethod
    def examples(cls) -> list[Flow]:
        """One of each kind in three dimensions, random weights."""
        out = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for kind in _KINDS:
                out.append(cls(3, kind=kind, transforms=2, hidden=(8,)).eval().requires_grad_(False))
        return out

    @property
    def _like(self) -> Tensor:
        return next(self.network.parameters())

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) `(batch,)` of x `(batch, dim)`, the Jacobian of the transform included; exact."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.log_prob")
        u = self.transform.inverse(x)
        z, log_det = self.network().transform.call_and_ladj(u.to(self._like))
        return (log_normal(z) + log_det).to(x) - self.transform.log_det(u)

    def decode(self, z: Tensor) -> Tensor:
        """f(z) `(batch, dim)` of z ~ N(0, I) `(batch, dim)`."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return self.transform(self.network().transform.inv(z.to(self._like)).to(z))

    def encode(self, x: Tensor) -> Tensor:
        """z with f(z) = x."""
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.encode")
        return self.network().transform(self.transform.inverse(x).to(self._like)).to(x)

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, dim)` draws of x, row i a function of (seed, i)."""
        return self.decode(draw_latent(n, seed, self.latent_shape, dtype, self._like.device))

    def training_loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """−log p(x)/dim of each example, `(batch,)`, in nats."""
        return -self.log_prob(batch["x"]) / self.shape[0]

    @torch.no_grad()
    def validation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Mean −log p(x), in nats a vector."""
        return {"nll": float(-self.log_prob(batch["x"]).mean())}

    def save(self, path: str | Path, *, card: dict[str, Any] | None = None) -> Path:
        """Write weights and settings as safetensors."""
        meta = {"settings": self.settings, "card": card or self.seen}
        return write_checkpoint(path, "Flow", self.network.state_dict() | affine_tensors(self.transform), meta)

    @classmethod
    def load(cls, path: str | Path) -> Flow:
        """Read a checkpoint; nothing in it is executed."""
        tensors, meta = read_checkpoint(path, "Flow")
        try:
            transform = affine_of(tensors)
            settings = dict(meta["settings"])
            flow = cls(**{**settings, "hidden": tuple(settings["hidden"])}, transform=transform)
            flow.network.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise damaged(path, error) from error
        flow.seen = meta.get("card", {})
        return flow.eval().requires_grad_(False)


def draw_latent(n: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(n, *shape)` standard normal numbers, row i a function of (seed, i)."""
    from invgen.streams import Streams

    if n < 1:
        raise ValueError(f"The number of draws must be at least 1, got {n}.")
    return Streams(seed, range(n), device=device).normal(shape, dtype=dtype)


def _build(dim: int, kind: str, transforms: int, hidden: tuple[int, ...], bins: int) -> nn.Module:
    try:
        import zuko
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Flow needs zuko, a dependency of invgen; install it with `pip install zuko`."
        ) from error

    if kind in ("maf", "nsf-ar"):
        options: dict[str, Any] = {"transforms": transforms, "hidden_features": hidden, "activation": nn.SiLU}
        return zuko.flows.MAF(dim, **options) if kind == "maf" else zuko.flows.NSF(dim, bins=bins, **options)
    univariate: Any = zuko.transforms.MonotonicAffineTransform
    shapes: list[tuple[int, ...]] = [(), ()]
    if kind == "nice":
        univariate, shapes = zuko.transforms.AdditiveTransform, [()]
    elif kind == "nsf":
        univariate, shapes = zuko.transforms.MonotonicRQSTransform, [(bins,), (bins,), (bins - 1,)]
    layers = []
    for i in range(transforms):
        # alternate halves of a permutation that differs from pair to pair, so that all features meet
        generator = torch.Generator().manual_seed(i // 2)
        order = torch.randperm(dim, generator=generator) if i > 1 else torch.arange(dim)
        layers.append(
            zuko.flows.GeneralCouplingTransform(
                dim,
                mask=order % 2 == i % 2,
                univariate=univariate,
                shapes=shapes,
                hidden_features=hidden,
                activation=nn.SiLU,
            )
        )
    base = zuko.flows.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True
    )
    return zuko.flows.Flow(layers, base)

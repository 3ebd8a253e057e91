"""The adversarial game: a generator x = T(G(z)), z ~ N(0, I), against a critic f; no density.

The non-saturating game of Goodfellow et al. 2014 (arXiv:1406.2661, section 3), f a log-odds "this is data":

    critic     min_f  E softplus(−f(u)) + E softplus(f(G(z)))  [+ r1/2 E |∇f(u)|²,  Mescheder et al. 2018]
    generator  min_G  E softplus(−f(G(z)))

The penalty r1 is that of Mescheder, Geiger and Nowozin 2018 (arXiv:1801.04406, equation 9). This critic only says how well
it tells draws from data; that of a `WGAN` (wgan.py) estimates a distance.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invgen.contracts import check_batch
from invgen.driver import Streams
from invgen.grid import Grid
from invgen.priors import networks
from invgen.priors._adversarial import sample_figures
from invgen.priors._fitting_networks import made_from
from invgen.priors._saving import damaged, read_prior, write_prior
from invgen.transforms import Affine, Identity, Transform

__all__ = ["GAN"]


class GAN(nn.Module):
    """A generator trained by the non-saturating game (Goodfellow et al. 2014); see the module's text.

    Has `sample` and `HasLatent`. No density: what it has not learned to make has no probability at all.

    Args:
        generator: `(batch, *latent_shape)` -> `(batch, *shape)`, or more than `shape` in space, which is cut at the far
            edges.
        critic: `(batch, *shape)` -> `(batch, 1)`; None for a prior that is not trained any more.
        shape: `(channels, *spatial)` or `(dim,)` of one field.
        latent_shape: of z; known by itself for a `StationaryGenerator`.
        transform: x = T(u); the identity when omitted.
        grid: where the field lives.
        critic_steps: updates of the critic for each one of the generator.
        r1: weight of the penalty on the critic's gradient at the data; 0 is the game of the paper. Without it images
            collapse within some hundred steps; what steadies them is of the order of the squared distance between two
            examples in u (30 to 100 for 32×32 channels of 0 and 1, where 5 collapsed).

    Training: learning rate 5e-4, Adam betas (0, 0.99) without weight decay (Mescheder et al. 2018); the moving
    average covers the generator. Cost of `decode`: one generator call.

    Raises:
        ValueError: networks whose shapes do not fit.
    """

    betas: ClassVar[tuple[float, float]] = (0.0, 0.99)

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module | None,
        shape: tuple[int, ...],
        *,
        latent_shape: tuple[int, ...] | None = None,
        transform: Transform | None = None,
        grid: Grid | None = None,
        critic_steps: int = 1,
        r1: float = 0.0,
    ) -> None:
        super().__init__()
        self.generator, self.critic, self.shape, self.grid = generator, critic, tuple(shape), grid
        if latent_shape is None:
            if not isinstance(generator, networks.StationaryGenerator):
                raise ValueError(f"State the latent_shape of a {type(generator).__name__}, e.g. latent_shape=(64,).")
            latent_shape = generator.latent_shape(self.shape[1:])
        self.latent_shape: tuple[int, ...] = tuple(latent_shape)
        self.transform = transform or Identity()
        if grid is not None and grid.field_shape != self.shape:
            raise ValueError(f"The prior's shape {self.shape} does not fit its grid {grid.field_shape}.")
        if critic_steps < 1 or r1 < 0:
            raise ValueError(f"critic_steps must be at least 1 and r1 non-negative, got {critic_steps} and {r1}.")
        self.critic_steps, self.r1 = int(critic_steps), float(r1)
        self.seen: dict[str, Any] = {}
        self._trained_on: Tensor | None = None  # the last training batch: the critic's measure of overfitting
        self._check_networks()

    def _check_networks(self) -> None:
        made = made_from(self.generator, self.latent_shape, self._generate)
        scores = (1,) if self.critic is None or made != self.shape else made_from(self.critic, self.shape)
        if made != self.shape:
            raise ValueError(
                f"The generator makes items of the shape {made} from latents {self.latent_shape}, but the prior's shape is {self.shape}."
            )
        if scores != (1,):
            raise ValueError(f"A critic returns one number an item, this one items of the shape {scores}.")

    @classmethod
    def stationary(
        cls,
        shape: tuple[int, int, int],
        *,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (96, 64, 48, 24),
        critic_widths: tuple[int, ...] = (24, 48, 64, 96),
        patch: int = 2,
        output: str = "linear",
        **options: Any,
    ) -> Self:
        """With `StationaryGenerator` and `StationaryCritic`: the latent is a field, `at(shape)` makes bigger images.

        Options are those of the constructor. 0.38 + 0.17 million parameters with the default widths; the latent of a
        64×64 image is (4, 10, 10).
        """
        generator = networks.StationaryGenerator(
            shape[0], latent_channels=latent_channels, widths=widths, output=cast(Any, output)
        )
        critic = networks.StationaryCritic(shape[0], widths=critic_widths, patch=patch)
        return cls(generator, critic, tuple(shape), **options)

    @classmethod
    def convolutional(
        cls,
        shape: tuple[int, int, int],
        *,
        latent: int = 100,
        widths: tuple[int, ...] = (32, 48, 64, 96),
        critic_widths: tuple[int, ...] = (24, 48, 64, 96),
        patch: int = 2,
        output: str = "linear",
        **options: Any,
    ) -> Self:
        """DCGAN-like, with `ConvDecoder` and `ConvCritic`: one size, the latent a vector.

        Options are those of the constructor. 0.35 + 0.17 million parameters with the default widths for 64×64.
        """
        spatial = (shape[1], shape[2])
        generator = networks.ConvDecoder(
            latent, shape[0], spatial, widths=widths, patch=patch, output=cast(Any, output)
        )
        critic = networks.ConvCritic(shape[0], spatial, widths=critic_widths, patch=patch)
        return cls(generator, critic, tuple(shape), latent_shape=(latent,), **options)

    @classmethod
    def of(
        cls, teacher: Any, *, critic_widths: tuple[int, ...] = (24, 48, 64, 96), patch: int = 2, **options: Any
    ) -> Self:
        """A generator that starts from a copy of a VAE's decoder, against a new `ConvCritic`; train it on.

        The game then starts from draws that cover the data but are blurred, and not from noise.

        Args:
            teacher: a `VAE` with a `ConvDecoder` and a Gaussian or Bernoulli likelihood (then the generator ends in a
                sigmoid: its mean). options: of the constructor.
        """
        decoder, kind = getattr(teacher, "decoder", None), getattr(teacher, "kind", None)
        if not isinstance(decoder, networks.ConvDecoder) or kind not in ("gaussian", "bernoulli"):
            raise TypeError(
                f"Only a VAE with a ConvDecoder and a Gaussian or Bernoulli likelihood lends its decoder to a game, got {type(teacher).__name__}; build one with VAE.convolutional."
            )
        settings = dict(decoder.settings)
        if kind == "bernoulli":
            settings["output"] = "sigmoid"
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        generator = networks.ConvDecoder(**settings)
        generator.load_state_dict(decoder.state_dict())
        shape = tuple(teacher.shape)
        critic = networks.ConvCritic(shape[0], (shape[1], shape[2]), widths=critic_widths, patch=patch)
        known = {"latent_shape": teacher.latent_shape, "transform": teacher.transform, "grid": teacher.grid}
        prior = cls(generator, critic, shape, **(known | options))
        prior.seen = {"started_from": dict(teacher.seen)}
        return prior

    # --- the model -------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.generator.parameters()).dtype

    def decode(self, z: Tensor) -> Tensor:
        """f(z) = T(G(z)): `(batch, *latent_shape)` to `(batch, *shape)` in the dtype of z; differentiable."""
        check_batch(z, self.latent_shape, f"The z given to {type(self).__name__}.decode")
        return self.transform(self._generate(z))

    def _generate(self, z: Tensor) -> Tensor:
        u = self.generator(z.to(self._dtype)).to(z.dtype)
        return u[..., : self.shape[-2], : self.shape[-1]] if len(self.shape) == 3 else u

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, chunk: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
        """`(n, *shape)` draws decode(z), z ~ N(0, I); one generator call a draw."""
        if n < 1:
            raise ValueError(f"The number of draws must be at least 1, got {n}.")
        device, out = next(self.generator.parameters()).device, []
        for first in range(0, n, chunk):
            rng = Streams(seed, range(first, min(first + chunk, n)), device=device)
            out.append(self.decode(rng.normal(self.latent_shape, dtype=dtype)))
        return torch.cat(out)

    def at(self, shape: tuple[int, ...], *, origin: tuple[float, ...] | None = None, grid: Grid | None = None) -> Self:
        """The same prior on another grid, the weights shared: a bigger latent, a bigger image.

        Args:
            shape: spatial shape of the new grid.
            origin: coordinate of its first sample; the present one when omitted.
            grid: state the whole grid instead.

        Raises:
            TypeError: the generator makes images of one size.
        """
        if not isinstance(self.generator, networks.StationaryGenerator):
            raise TypeError(
                f"A {type(self.generator).__name__} makes fields of one size; train a stationary generator ({type(self).__name__}.stationary) for other grids."
            )
        spatial = tuple(shape)
        if grid is None and self.grid is not None:
            grid = self.grid.with_shape(spatial, origin)
        if grid is not None and grid.shape != spatial:
            raise ValueError(f"at() was asked for the shape {spatial} but the grid given has {grid.shape}.")
        options: dict[str, Any] = self._options()
        other = type(self)(
            self.generator, None, (self.shape[0], *spatial), transform=self.transform, grid=grid, **options
        )
        other.critic, other.seen = self.critic, self.seen
        return other.train(self.training)

    def _options(self) -> dict[str, float]:
        return {"critic_steps": self.critic_steps, "r1": self.r1}

    # --- the game --------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The two players."""
        return {"critic": list(self._critic().parameters()), "generator": list(self.generator.parameters())}

    def schedule(self, step: int) -> list[str]:
        """`critic_steps` updates of the critic, then one of the generator."""
        return ["critic"] * self.critic_steps + ["generator"]

    def optimizer_settings(self, name: str) -> dict[str, Any]:
        """Adam with the betas of the class, no weight decay, no clipping."""
        return {"betas": self.betas, "weight_decay": 0.0, "clip": None}

    def averaged(self) -> list[str]:
        """The moving average covers the generator."""
        return ["generator"]

    def losses(self, name: str, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """What the group `name` ("critic" or "generator") minimises, `(batch,)`.

        Args:
            batch: {"x": `(batch, *shape)`} in physical units; the generator's update uses its size alone.
            generator: source of all random numbers, on the CPU.
        """
        x = batch["x"]
        z = torch.randn(len(x), *self.latent_shape, generator=generator).to(x)
        critic = self._critic()
        if name == "generator":
            return self.generator_loss(critic(self._generate(z))[:, 0].to(x))
        if name != "critic":
            raise ValueError(f"The players are 'critic' and 'generator', got {name!r}.")
        check_batch(x, self.shape, f"The x given to {type(self).__name__}.losses")
        self._trained_on = x.detach()
        u = self.transform.inverse(x)
        with torch.no_grad():
            made = self._generate(z)
        scores = critic(torch.cat([u, made]).to(self._dtype))[:, 0].to(u)
        return self.critic_loss(scores[: len(u)], scores[len(u) :]) + self.penalty(u, made, generator)

    def critic_loss(self, data: Tensor, made: Tensor) -> Tensor:
        """softplus(−f(u)) + softplus(f(G(z))), from scores `(batch,)`."""
        return F.softplus(-data) + F.softplus(made)

    def generator_loss(self, made: Tensor) -> Tensor:
        """softplus(−f(G(z)))."""
        return F.softplus(-made)

    def penalty(self, u: Tensor, made: Tensor, generator: torch.Generator) -> Tensor:
        """r1/2 |∇f(u)|² of each example, `(batch,)`."""
        if self.r1 == 0:
            return u.new_zeros(len(u))
        return 0.5 * self.r1 * self._gradient(u).square().flatten(1).sum(1)

    def _gradient(self, u: Tensor) -> Tensor:
        """∇f at u, itself differentiable in the critic's weights; no item's depends on another's."""
        with torch.enable_grad():
            at = u.detach().requires_grad_(True)
            total = self._critic()(at.to(self._dtype)).sum()
            (gradient,) = torch.autograd.grad(total, at, create_graph=True)
        return gradient

    def _critic(self) -> nn.Module:
        if self.critic is None:
            raise ValueError(
                "This prior was stored without its critic and cannot be trained or judged by it; save it with critic=True."
            )
        return self.critic

    @torch.no_grad()
    def validation(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Mode collapse, memorisation and the critic's honesty, on held-out examples.

        Args:
            batch: {"x": held-out examples, "train": training examples (optional; the last training batch otherwise)}.

        Returns:
            "diversity", "precision_distance", "recall_distance" and "memorisation" as in
            `invgen.priors._adversarial.sample_figures`; "critic_gap" E f(u) − E f(G(z)) on held-out examples (for a
            `WGAN` the estimate of the Wasserstein distance) and "critic_gap_train" on training ones: a gap between the
            two is an overfitted critic; "critic_overfit" is that gap in standard deviations of f over held-out
            examples; "critic_gradient" the mean of |∇f| between data and draws (1 for a `WGAN`).

        Warns:
            UserWarning: draws are less than half as diverse as the data (mode collapse).
        """
        x = batch["x"]
        train = batch.get("train", self._trained_on)
        u = self.transform.inverse(x)
        known = None if train is None else self.transform.inverse(train.to(x))
        made = self.transform.inverse(self.sample(len(x), dtype=x.dtype).to(x))
        figures = sample_figures(made, u, known)
        if self.critic is not None:
            data, fake = self._scores(u), self._scores(made)
            figures["critic_gap"] = float(data.mean() - fake.mean())
            if known is not None:
                figures["critic_gap_train"] = float(self._scores(known).mean() - fake.mean())
                excess = figures["critic_gap_train"] - figures["critic_gap"]
                figures["critic_overfit"] = excess / max(float(data.std()), 1e-30)
            few = torch.rand(min(len(x), 64), generator=torch.Generator().manual_seed(0)).to(u)
            between = torch.lerp(made[: len(few)], u[: len(few)], few.reshape(-1, *(1,) * (u.ndim - 1)))
            figures["critic_gradient"] = float(self._gradient(between).flatten(1).norm(dim=1).mean())
        if figures.get("diversity", 1.0) < 0.5:
            warnings.warn(
                f"Mode collapse: draws are {figures['diversity']:.2f} times as far from each other as the data are; train longer or from another seed, take more critic_steps, a larger r1, or a WGAN.",
                stacklevel=3,
            )
        return figures

    def _scores(self, u: Tensor) -> Tensor:
        critic = self._critic()
        return torch.cat([critic(u[i : i + 64].to(self._dtype))[:, 0].to(u) for i in range(0, len(u), 64)])

    # --- disk ------------------------------------------------------------------------------------------------------

    @classmethod
    def examples(cls) -> list[Self]:
        """Small ones with random weights: stationary on 16 × 16 fields in physical units, and on vectors."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            field = cls.stationary(
                (1, 16, 16),
                latent_channels=2,
                widths=(8, 6),
                critic_widths=(6, 8),
                grid=Grid((16, 16), (10.0, 10.0)),
                transform=Affine(2500.0, 300.0),
            )
            vector = cls(networks.MLP(2, 3, width=16), networks.MLP(3, 1, width=16), (3,), latent_shape=(2,))
        return [p.eval().requires_grad_(False) for p in (field, vector)]

    def save(
        self, path: str | Path, *, half: bool = False, critic: bool = False, card: dict[str, Any] | None = None
    ) -> Path:
        """Write weights and settings as safetensors.

        Args:
            half: store float16 weights (half the size, 1e-3 relative).
            critic: store the critic too, to train on or to judge draws by it.
            card: what is known about the training.
        """
        parts = {"generator": self.generator} | ({"critic": self._critic()} if critic else {})
        settings = {"shape": list(self.shape), "latent_shape": list(self.latent_shape), **self._options()}
        return write_prior(path, self, parts, settings, half=half, card=card)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint; nothing in it is executed, and only invgen's networks are built."""
        stored = read_prior(path, cls.__name__)
        try:
            options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.settings.items()}
            prior = cls(
                stored.networks["generator"],
                stored.networks.get("critic"),
                options.pop("shape"),
                transform=stored.transform,
                grid=stored.grid,
                **options,
            )
        except (KeyError, TypeError) as error:
            raise damaged(path, error) from error
        prior.seen = stored.card
        return prior.eval().requires_grad_(False)

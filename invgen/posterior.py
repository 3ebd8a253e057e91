"""What a solver returns: samples with weights, costs and settings, and what can be asked of them."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invgen.checkpoints import atomic
from invgen.grid import Grid

if TYPE_CHECKING:
    import xarray

    from invgen.problem import InverseProblem

__all__ = ["Posterior", "versions"]


@functools.cache
def _versions() -> dict[str, str]:
    out = {}
    for name in ("invgen", "torch", "numpy", "scipy", "pylops"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def versions() -> dict[str, str]:
    """Versions of invgen and of what its numbers depend on."""
    return dict(_versions())


@dataclass(eq=False)
class Posterior:
    """Samples of p(x | d), or a point estimate, with everything needed to read and repeat them.

    Attributes:
        samples: `(obs, chain, draw, *shape)` in physical units x.
        kind: "exact", "approximate" or "point": what the solver claims.
        weights: `(obs, chain, draw)`, normalised for each observation, or None for equal weights.
        log_evidence: `(obs,)` or None.
        latent: `(obs, chain, draw, *latent_shape)` or None.
        theta: nuisance parameters, name -> `(obs, chain, draw)`.
        stats: figures of each sample, name -> `(obs, chain, draw)`; `first_bad_step` is −1 for a good one.
        counts: items pushed through the network, the operators and their adjoints.
        settings: solver and hyper-parameters. seed, seconds, versions: as they say.
        grid: of the model, when known.
        problem: what was solved (kept in memory, not saved).
    """

    samples: Tensor
    kind: str
    weights: Tensor | None = None
    log_evidence: Tensor | None = None
    latent: Tensor | None = None
    theta: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    seconds: float = float("nan")
    versions: dict[str, str] = field(default_factory=dict)
    grid: Grid | None = None
    problem: InverseProblem | None = None

    @classmethod
    def from_items(
        cls, results: Mapping[str, Tensor], *, n_obs: int, num_samples: int, first_bad_step: Tensor, **more: Any
    ) -> Posterior:
        """Fold flat item results `(n_obs · num_samples, …)` into observations, chains and draws.

        `log_evidence` `(items,)` becomes one number an observation.
        `x` may be `(items, *shape)`, one draw an item (independent draws: one chain), or, under the name `chain`,
        `(items, draws, *shape)`: then items are chains.
        """
        left = dict(results)
        if "log_evidence" in left:  # one number an observation, which every item of it repeats
            each = left.pop("log_evidence")[: n_obs * num_samples].reshape(n_obs, num_samples)
            more.setdefault("log_evidence", each[:, 0])
        bad = first_bad_step[: n_obs * num_samples].reshape(n_obs, 1, num_samples)

        def fold(v: Tensor) -> Tensor:
            return v[: n_obs * num_samples].reshape(n_obs, 1, num_samples, *v.shape[1:])

        if "chain" in left:
            chains = left.pop("chain")
            samples = chains[: n_obs * num_samples].reshape(n_obs, num_samples, *chains.shape[1:])
            left.pop("x", None)
            bad = bad.reshape(n_obs, num_samples, 1).expand(samples.shape[:3])
            stats = {k: v.reshape(n_obs, num_samples, *v.shape[1:]) for k, v in left.items() if k.startswith("stat_")}
            stats = {
                k.removeprefix("stat_"): (v if v.ndim >= 3 else v[..., None].expand(samples.shape[:3]))
                for k, v in stats.items()
            }
            latent = left.pop("latent_chain", None)
            latent = latent.reshape(n_obs, num_samples, *latent.shape[1:]) if latent is not None else None
            theta = {
                k.removeprefix("theta_"): v.reshape(samples.shape[:3])
                for k, v in left.items()
                if k.startswith("theta_")
            }
        else:
            samples = fold(left.pop("x"))
            latent = fold(left.pop("latent")) if "latent" in left else None
            stats = {k.removeprefix("stat_"): fold(v) for k, v in left.items() if k.startswith("stat_")}
            theta = {k.removeprefix("theta_"): fold(v) for k, v in left.items() if k.startswith("theta_")}
        stats["first_bad_step"] = bad
        weights = None
        if bool((bad >= 0).any()):
            good = (bad < 0).to(samples.dtype)
            weights = good / good.sum((1, 2), keepdim=True).clamp_min(1)
            warnings.warn(
                f"{int((bad >= 0).sum())} of {bad.numel()} samples became NaN or infinite and carry no weight; see stats['first_bad_step'].",
                stacklevel=3,
            )
        return cls(samples, weights=weights, latent=latent, stats=stats, theta=theta, **more)

    # --- figures -------------------------------------------------------------------------------------------------------

    @property
    def n_obs(self) -> int:
        """Observations."""
        return self.samples.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one model."""
        return tuple(self.samples.shape[3:])

    def flat(self) -> tuple[Tensor, Tensor]:
        """Samples `(obs, n, *shape)` and weights `(obs, n)` that sum to one, samples without weight set to zero."""
        s = self.samples.flatten(1, 2)
        n = s.shape[1]
        real = s.real if s.is_complex() else s
        w = real.new_full(s.shape[:2], 1 / n) if self.weights is None else self.weights.flatten(1, 2).to(real)
        s = torch.where((w > 0).reshape(*w.shape, *(1,) * (s.ndim - 2)), s, torch.zeros((), dtype=s.dtype))
        return s, w

    def mean(self) -> Tensor:
        """Posterior mean of x, `(obs, *shape)`; NaN for an observation whose samples all diverged."""
        s, w = self.flat()
        total = (s * w.reshape(*w.shape, *(1,) * (s.ndim - 2))).sum(1)
        return torch.where(
            (w.sum(1) > 0).reshape(-1, *(1,) * (s.ndim - 2)), total, torch.full((), float("nan"), dtype=s.dtype)
        )

    def std(self) -> Tensor:
        """Posterior standard deviation, `(obs, *shape)`, with the correction n/(n − 1) (effective n for weights).

        Complex samples: root of E|x − mean|². NaN where fewer than two samples carry weight.

        Raises:
            TypeError: for a point estimate, which has no spread.
        """
        s, w = self._spread("std")
        wide = w.reshape(*w.shape, *(1,) * (s.ndim - 2))
        effective = 1 / w.square().sum(1)
        variance = ((s - self.mean()[:, None]).abs().square() * wide).sum(1)
        factor = torch.where(effective > 1 + 1e-6, effective / (effective - 1), float("nan"))
        return (variance * factor.reshape(-1, *(1,) * (s.ndim - 2))).sqrt()

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantile(s) of each coordinate: `(obs, *shape)` for a number, `(q, obs, *shape)` for several.

        Linear interpolation between order statistics, at S_k₋₁/(1 − w_k) for the k-th sample with weight w_k and
        cumulative weight S_k: NumPy's default for equal weights; samples without weight do not enter.
        """
        s, w = self._spread("quantile")
        if s.is_complex():
            raise TypeError(
                "quantile() of complex samples has no order; take the quantiles of samples.real, .imag or .abs()."
            )
        levels = torch.as_tensor(q, dtype=s.dtype).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"Quantile levels lie in [0, 1], got {levels.tolist()}.")
        if self.weights is None:
            out = torch.stack([_quantile(s, float(level)) for level in levels])
        else:
            out = torch.stack([_weighted_quantiles(s[o], w[o], levels) for o in range(len(s))], dim=1)
        return out[0] if torch.as_tensor(q).ndim == 0 else out

    def _spread(self, what: str) -> tuple[Tensor, Tensor]:
        if self.kind == "point":
            raise TypeError(f"{what}() of a point estimate says nothing about uncertainty; use a solver that samples.")
        if self.samples.shape[1] * self.samples.shape[2] < 2:
            raise ValueError(f"{what}() needs at least two samples; ask the solver for more.")
        return self.flat()

    def predict(self, problem: InverseProblem | None = None, chunk: int = 16) -> list[Tensor]:
        """g(x) of every sample: one `(obs, chain, draw, *data_shape)` a term."""
        problem = problem or self.problem
        if problem is None:
            raise ValueError(
                "This posterior was loaded from a file and does not know its problem; pass predict(problem)."
            )
        flat, theta = self.samples.flatten(0, 2), {k: v.flatten() for k, v in self.theta.items()}
        parts = [
            problem.predict(flat[i : i + chunk], **{k: v[i : i + chunk] for k, v in theta.items()})
            for i in range(0, flat.shape[0], chunk)
        ]
        return [
            torch.cat([p[t] for p in parts]).reshape(*self.samples.shape[:3], *problem.terms[t].operator.data_shape)
            for t in range(len(problem.terms))
        ]

    # --- files and other tools -----------------------------------------------------------------------------------------

    def to_xarray(self) -> xarray.Dataset:
        """Dataset with dimensions obs, chain, draw, channel and the grid's axes (or dim_0, …), coordinates in grid units."""
        import xarray as xr

        lead = ("obs", "chain", "draw")
        if self.grid is not None and len(self.grid.field_shape) == len(self.shape):
            axes: tuple[str, ...] = ("channel", *self.grid.axes)
            coords: dict[str, Any] = {"channel": list(self.grid.channels)}
            coords |= {
                a: (a, self.grid.coordinates(a), {"units": u})
                for a, u in zip(self.grid.axes, self.grid.units, strict=True)
            }
        else:
            axes, coords = tuple(f"dim_{i}" for i in range(len(self.shape))), {}
        # "model", because x is the name of an axis on most grids
        variables: dict[str, Any] = {"model": ((*lead, *axes), self.samples.numpy())}
        if self.weights is not None:
            variables["weights"] = (lead, self.weights.numpy())
        if self.log_evidence is not None:
            variables["log_evidence"] = (("obs",), self.log_evidence.numpy())
        if self.latent is not None:
            variables["latent"] = ((*lead, *(f"latent_{i}" for i in range(self.latent.ndim - 3))), self.latent.numpy())
        variables |= {f"theta_{k}": (lead, v.numpy()) for k, v in self.theta.items()}
        variables |= {
            f"stat_{k}": ((*lead, *(f"{k}_{i}" for i in range(v.ndim - 3))), v.numpy()) for k, v in self.stats.items()
        }
        attributes = {
            "invgen": json.dumps(
                {
                    "kind": self.kind,
                    "counts": self.counts,
                    "settings": self.settings,
                    "seed": self.seed,
                    "seconds": self.seconds,
                    "versions": self.versions,
                    "grid": self.grid.to_dict() if self.grid else None,
                }
            )
        }
        return xr.Dataset(variables, coords, attributes)

    def to_arviz(self, observation: int = 0) -> Any:
        """ArviZ InferenceData of one observation (chain, draw, …)."""
        import arviz as az

        data = self.to_xarray().isel(obs=observation)
        groups: dict[str, Any] = {"posterior": data[[v for v in data.data_vars if not str(v).startswith("stat_")]]}
        stats = [v for v in data.data_vars if str(v).startswith("stat_")]
        if stats:
            groups["sample_stats"] = data[stats]
        return az.InferenceData(**groups)

    def save(self, path: str | Path) -> Path:
        """Write NetCDF (HDF5 underneath); `Posterior.load` reads it back, as do xarray, ArviZ and h5py."""
        path = Path(path)
        try:
            with atomic(path) as partial:
                self.to_xarray().to_netcdf(partial, engine="h5netcdf", invalid_netcdf=bool(self.samples.is_complex()))
        except OSError as error:
            raise OSError(
                f"Cannot write the posterior to {path}: {error.strerror or error}; choose a folder that can be written to."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Posterior:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: not a posterior of invgen.
        """
        import xarray as xr

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no posterior at {path}; check the path.")
        try:
            with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as stored:
                data = stored.load()
            meta = json.loads(data.attrs["invgen"])
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is not a posterior saved by invgen ({error}); give a file written by Posterior.save."
            ) from error

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(data[name].values)

        names = [str(v) for v in data.data_vars]
        return cls(
            tensor("model"),
            kind=meta["kind"],
            weights=tensor("weights") if "weights" in names else None,
            log_evidence=tensor("log_evidence") if "log_evidence" in names else None,
            latent=tensor("latent") if "latent" in names else None,
            theta={n.removeprefix("theta_"): tensor(n) for n in names if n.startswith("theta_")},
            stats={n.removeprefix("stat_"): tensor(n) for n in names if n.startswith("stat_")},
            counts=meta["counts"],
            settings=meta["settings"],
            seed=meta["seed"],
            seconds=meta["seconds"],
            versions=meta["versions"],
            grid=Grid.from_dict(meta["grid"]) if meta["grid"] else None,
        )

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write a self-contained HTML page; see `invgen.report.write_report`."""
        from invgen.report import write_report

        return write_report(self, path, **options)

    def __repr__(self) -> str:
        obs, chain, draw = self.samples.shape[:3]
        name = self.settings.get("solver", "posterior")
        return f"Posterior({name}, {self.kind}: obs={obs}, chain={chain}, draw={draw}, shape={self.shape}, {self.seconds:.1f} s)"


def _quantile(s: Tensor, level: float) -> Tensor:
    """Linear interpolation between order statistics along axis 1 (torch.quantile refuses large inputs)."""
    ordered = s.sort(1).values
    position = level * (s.shape[1] - 1)
    low = int(position)
    high = min(low + 1, s.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], position - low)


def _weighted_quantiles(s: Tensor, w: Tensor, levels: Tensor) -> Tensor:
    """`(q, *shape)` of samples `(n, *shape)` with weights `(n,)`."""
    kept = s[w > 0]
    if len(kept) == 0:
        return s.new_full((len(levels), *s.shape[1:]), float("nan"))
    values, order = kept.flatten(1).T.sort(-1)  # (coordinates, kept)
    mass = (w[w > 0].double() / w.double().sum())[order]
    position = ((mass.cumsum(-1) - mass) / (1 - mass).clamp_min(1e-300)).clamp(0, 1)
    position[:, -1] = 1.0
    wanted = levels.double().expand(len(values), -1).contiguous()
    high = torch.searchsorted(position.contiguous(), wanted).clamp(max=len(kept) - 1)
    low = (high - 1).clamp_min(0)
    below, above = position.gather(1, low), position.gather(1, high)
    share = torch.where(above > below, (wanted - below) / (above - below), torch.ones_like(wanted)).clamp(0, 1)
    return torch.lerp(values.gather(1, low), values.gather(1, high), share.to(values.dtype)).T.reshape(
        len(levels), *s.shape[1:]
    )

r"""What a fit leaves: standardisation, the linear part, and an ensemble of networks, as one module.

An ensemble of K members is their mixture, q = (1/K) Σ_k q_k: a draw picks a member first (Lakshminarayanan, Pritzel &
Blundell 2017, arXiv:1612.01474; of posteriors: Hermans et al. 2022, arXiv:2110.06581). Log ratios are averaged.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from invgen.solvers._neural_affine import Affine
from invgen.solvers._neural_embeddings import Embedding, Given
from invgen.solvers._neural_members import Member

SETS = ("deepsets", "transformer")  # embeddings that do not see the order of members
POSTERIORS = ("npe", "fmpe", "npse")  # methods whose network is a law of the unknowns


class Condition(NamedTuple):
    """Standardised data `(n, given)` and, for each member, their embedding `(n, features)`."""

    data: Tensor
    embedded: tuple[Tensor, ...]

    def rows(self, index: Tensor) -> Condition:
        """Some of them, in any order and number."""
        return Condition(self.data[index], tuple(e[index] for e in self.embedded))


class Network(nn.Module):
    """Law of the unknowns v given data d, of the data given the unknowns, or their ratio.

    Args:
        settings: plain values that decide the architecture (method, hidden, layers, depth, bins, sde, steps, contrasts,
            members, embedding, width). dim: numbers in v. data_dim: numbers in d, flat.
        layout: shape of each term. kept: positions of measured numbers, or None.
        embedding: a module of the user's, where settings["embedding"] is "module".
    """

    v_mean: Tensor
    v_sd: Tensor
    d_mean: Tensor
    d_sd: Tensor

    def __init__(
        self,
        settings: Mapping[str, Any],
        dim: int,
        data_dim: int,
        layout: Sequence[tuple[int, ...]],
        kept: Tensor | None,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.dim, self.data_dim = dict(settings), dim, data_dim
        self.method = str(settings["method"])
        self.sizes = [math.prod(s) for s in layout]
        self.sets = [tuple(s) for s in layout] if settings["embedding"] in SETS and kept is None else []
        for name, size in (("v", dim), ("d", data_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_sd", torch.ones(size))
        of_data = self.method == "nle"
        self.affine = Affine(data_dim, dim) if of_data else Affine(dim, data_dim)
        members = []
        for _ in range(int(settings["members"])):
            part = None if of_data else self._embedding(layout, kept, embedding)
            members.append(Member(settings, data_dim if of_data else dim, dim if of_data else data_dim, part))
        self.members = nn.ModuleList(members)
        self._copies: dict[tuple[torch.dtype, str], Network] = {}
        self._digest = ""

    def _embedding(
        self, layout: Sequence[tuple[int, ...]], kept: Tensor | None, module: nn.Module | None
    ) -> Embedding | Given | None:
        kind = self.settings["embedding"]
        if kind == "module":
            if module is None:
                raise ValueError("This estimator was trained with an embedding module; give it again as embedding=.")
            return Given(layout, kept, copy.deepcopy(module))
        made = Embedding(layout, kept, kind, int(self.settings["width"]))
        return None if made.plain else made

    @torch.no_grad()
    def standardise(self, v: Tensor, d: Tensor, linear: bool) -> None:
        """Means, standard deviations and the linear part, from simulations `(n, dim)` and `(n, data_dim)`."""
        for name, rows in (("v", v), ("d", d)):
            mean, sd = rows.double().mean(0), rows.double().std(0)
            if name == "d" and self.sets:
                mean, sd = self._of_members(mean, sd)
            scale = mean.abs().clamp_min(1e-30)
            getattr(self, f"{name}_mean").copy_(mean)
            # what never varies carries no information, and stays at its mean
            getattr(self, f"{name}_sd").copy_(torch.where(sd > 1e-7 * scale, sd, torch.ones_like(sd)))
        if self.method != "nre":
            y, g = self._roles(self.standard_v(v), self.standard_d(d))
            self.affine.fit(y, g, regress=linear and not self.sets)  # a coefficient a place would bring the order back

    def _of_members(self, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
        """One mean and sd for all members of a set: one a place would give their order a meaning."""
        centres, spreads = [], []
        for m, s, shape in zip(mean.split(self.sizes), sd.split(self.sizes), self.sets, strict=True):
            m, s = m.reshape(shape[0], -1), s.reshape(shape[0], -1)
            centre = m.mean(0)
            spread = (s.square() + (m - centre).square()).mean(0).sqrt()
            centres.append(centre.expand_as(m).flatten())
            spreads.append(spread.expand_as(s).flatten())
        return torch.cat(centres), torch.cat(spreads)

    def standard_v(self, v: Tensor) -> Tensor:
        return (v - self.v_mean) / self.v_sd

    def standard_d(self, d: Tensor) -> Tensor:
        return (d - self.d_mean) / self.d_sd

    def _roles(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return (d, v) if self.method == "nle" else (v, d)

    def pairs(self, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Target w and condition g of a member, of unknowns and data as they are."""
        y, g = self._roles(self.standard_v(v), self.standard_d(d))
        return (y, g) if self.method == "nre" else (self.affine(y, g), g)

    # --- the trained network -------------------------------------------------------------------------------------------

    def condition(self, d: Tensor) -> Condition:
        """Data `(n, data_dim)`, standardised, embedded where the network is conditioned on them."""
        g = self.standard_d(d)
        if self.method == "nle":
            return Condition(g, ())
        with torch.no_grad():
            return Condition(g, tuple(m.embed(g) for m in self._each()))

    def _each(self) -> list[Member]:
        return [m for m in self.members if isinstance(m, Member)]

    def log_prob(self, v: Tensor, given: Condition) -> Tensor:
        """log q(v | d) `(n,)`, for estimators of the posterior."""
        w = self.affine(self.standard_v(v), given.data)
        each = torch.stack([m.log_prob(w, e) for m, e in zip(self._each(), given.embedded, strict=True)])
        return each.logsumexp(0) - math.log(len(each)) - self.affine.log_det - self.v_sd.log().sum()

    def log_likelihood(self, v: Tensor, given: Condition) -> Tensor:
        """log p(d | v), or log p(d | v) − log p(d), `(n,)`, up to a number that depends on d; differentiable in v."""
        g = self.standard_v(v)
        if self.method == "nre":
            each = [m.log_ratio(g, e) for m, e in zip(self._each(), given.embedded, strict=True)]
            return torch.stack(each).mean(0)
        w = self.affine(given.data, g)
        each = [m.log_prob(w, g) for m in self._each()]
        return torch.stack(each).logsumexp(0) - math.log(len(each)) - self.affine.log_det - self.d_sd.log().sum()

    @torch.no_grad()
    def draw(self, noise: Tensor, pick: Tensor, given: Condition) -> Tensor:
        """v of noise `(n, dim)`, by the members `pick` `(n,)`."""
        w = torch.empty_like(noise)
        for k, member in enumerate(self._each()):
            mine = (pick == k).nonzero()[:, 0]
            if len(mine):
                w[mine] = member.draw(noise[mine], given.embedded[k][mine])
        return self.affine.inverse(w, given.data) * self.v_sd + self.v_mean

    def at(self, dtype: torch.dtype, device: torch.device) -> Network:
        """The same network in another precision or place, copied once."""
        if self.v_mean.dtype == dtype and self.v_mean.device == device:
            return self
        key = (dtype, str(device))
        if key not in self._copies:
            held, self._copies = self._copies, {}
            try:
                made = copy.deepcopy(self).to(device=device, dtype=dtype)
            finally:
                self._copies = held
            self._copies[key] = made
        return self._copies[key]

    @property
    def digest(self) -> str:
        """Sixteen letters that stand for the weights."""
        if not self._digest:
            sha = hashlib.sha256()
            for name, value in self.state_dict().items():
                plain = value.detach().cpu().contiguous()
                sha.update(name.encode())
                sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
            self._digest = sha.hexdigest()[:16]
        return self._digest

    def __repr__(self) -> str:
        return f"Network({self.method}, {len(self.members)} members, {self.dim} unknowns, {self.data_dim} data, {self.digest})"

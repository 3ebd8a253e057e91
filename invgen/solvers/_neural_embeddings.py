"""Networks that turn standardised data into a short vector for an estimator.

Data arrive as one flat vector (`_neural_features`); each term is given back its shape, zeros where nothing was measured
(the mean of the simulations), and goes through a network of its own:

- identity for short vectors;
- convolutions for traces `(n,)`, `(channels, n)` and images `(h, w)`, `(channels, h, w)`;
- DeepSets (Zaheer et al. 2017, arXiv:1703.06114) or a set transformer (Lee et al. 2019, arXiv:1810.00825, with mean
  pooling in place of attention pooling) for sets `(members, features)`: the result does not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("auto", "identity", "mlp", "cnn", "deepsets", "transformer")
_SHORT = 64  # numbers of a term up to which "auto" leaves it as it is
_CHANNELS = 16  # rows of a two-axis term up to which they are channels of traces
_FEWEST = 4  # samples along an axis below which convolutions stop


class Convolutions(nn.Module):
    """Strided convolutions over traces or images `(n, channels, *spatial)`, then a linear map to `width` numbers."""

    def __init__(self, channels: int, spatial: tuple[int, ...], width: int) -> None:
        super().__init__()
        conv: Any = nn.Conv1d if len(spatial) == 1 else nn.Conv2d
        layers: list[nn.Module] = []
        now, size, planes = channels, list(spatial), 16
        while max(size) > _FEWEST:
            # an axis that is short already keeps its length
            strides = tuple(2 if s > _FEWEST else 1 for s in size)
            stride = strides[0] if len(strides) == 1 else strides
            layers += [conv(now, planes, 5, stride=stride, padding=2), nn.GroupNorm(4, planes), nn.SiLU()]
            size = [(s - 1) // k + 1 for s, k in zip(size, strides, strict=True)]
            now, planes = planes, min(2 * planes, 64)
        layers += [nn.Flatten(), nn.Linear(now * math.prod(size), 4 * width), nn.SiLU(), nn.Linear(4 * width, width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, d: Tensor) -> Tensor:
        return self.layers(d)


class DeepSets(nn.Module):
    """ρ(mean_i φ(d_i)) of sets `(n, members, features)`."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.each = nn.Sequential(nn.Linear(features, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU())
        self.every = nn.Sequential(nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, width))

    def forward(self, d: Tensor) -> Tensor:
        return self.every(self.each(d).mean(1))


class SetTransformer(nn.Module):
    """Two self-attention blocks over sets `(n, members, features)`, averaged over members."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        inner = 4 * math.ceil(width / 2)
        self.enter = nn.Linear(features, inner)
        # no dropout: the held-out loss is that of the network that is used
        block = nn.TransformerEncoderLayer(inner, 4, 2 * inner, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.leave = nn.Linear(inner, width)

    def forward(self, d: Tensor) -> Tensor:
        return self.leave(self.blocks(self.enter(d)).mean(1))


def _kind(shape: tuple[int, ...], kind: str) -> str:
    if kind != "auto":
        return kind
    if math.prod(shape) <= _SHORT:
        return "identity"
    return "cnn" if len(shape) <= 3 else "mlp"


def _part(shape: tuple[int, ...], kind: str, width: int) -> tuple[nn.Module, tuple[int, ...], int]:
    """A network, the shape it wants, and how many numbers it returns."""
    count = math.prod(shape)
    found = _kind(shape, kind)
    if found == "identity":
        return nn.Identity(), (count,), count
    if found == "mlp":
        hidden = 4 * width
        layers = nn.Sequential(nn.Linear(count, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        return nn.Sequential(*layers, nn.Linear(hidden, width)), (count,), width
    if found in ("deepsets", "transformer"):
        features = count // shape[0]
        made: nn.Module = DeepSets(features, width) if found == "deepsets" else SetTransformer(features, width)
        return made, (shape[0], features), width
    if len(shape) > 3:
        raise ValueError(f"The embedding 'cnn' takes traces and images, not data of the shape {shape}; give a module.")
    single = len(shape) == 1 or (len(shape) == 2 and shape[0] > _CHANNELS)
    wanted = (1, *shape) if single else shape
    return Convolutions(wanted[0], wanted[1:], width), wanted, width


class Embedding(nn.Module):
    """All terms of a data vector, each through its own network, side by side.

    Args:
        layout: shape of each term. kept: positions of the measured numbers among all, or None for all.
        kind: one of `KINDS`, for every term. width: numbers a network returns.
    """

    kept: Tensor | None

    def __init__(self, layout: Sequence[tuple[int, ...]], kept: Tensor | None, kind: str, width: int) -> None:
        super().__init__()
        self.plain = all(_kind(tuple(s), kind) == "identity" for s in layout)
        self.register_buffer("kept", kept, persistent=False)
        self.sizes = [math.prod(s) for s in layout]
        made = [_part(tuple(s), kind, width) for s in layout]
        self.parts = nn.ModuleList([m for m, _, _ in made])
        self.wanted = [w for _, w, _ in made]
        measured = sum(self.sizes) if kept is None else len(kept)
        self.features = measured if self.plain else sum(n for _, _, n in made)

    def forward(self, c: Tensor) -> Tensor:
        """`(n, measured)` to `(n, features)`."""
        if self.plain:
            return c
        if self.kept is not None:
            c = c.new_zeros(len(c), sum(self.sizes)).index_copy(1, self.kept, c)
        outs = [
            part(piece.reshape(-1, *wanted)).flatten(1)
            for part, piece, wanted in zip(self.parts, c.split(self.sizes, dim=1), self.wanted, strict=True)
        ]
        return torch.cat(outs, dim=1)


class Given(nn.Module):
    """A module of the user's behind the same interface: data `(n, *shape)` of one term, or a list of all terms."""

    kept: Tensor | None
    plain = False

    def __init__(self, layout: Sequence[tuple[int, ...]], kept: Tensor | None, module: nn.Module) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)
        self.layout, self.sizes, self.module = list(layout), [math.prod(s) for s in layout], module
        measured = sum(self.sizes) if kept is None else len(kept)
        with torch.no_grad():
            try:
                shown = self(torch.zeros(2, measured))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(
                    f"The embedding cannot take data of the shapes {self.layout} (batch first): {' '.join(str(error).split())[:150]}"
                ) from error
        if shown.ndim != 2 or len(shown) != 2:
            raise ValueError(
                f"The embedding must return (batch, features), it returns {tuple(shown.shape)} for a batch of 2."
            )
        self.features = shown.shape[1]

    def forward(self, c: Tensor) -> Tensor:
        if self.kept is not None:
            c = c.new_zeros(len(c), sum(self.sizes)).index_copy(1, self.kept, c)
        terms = [p.reshape(-1, *s) for p, s in zip(c.split(self.sizes, dim=1), self.layout, strict=True)]
        return self.module(terms[0] if len(terms) == 1 else terms)

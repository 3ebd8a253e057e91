"""Convolutional encoder, decoder and critic between fields of one size and vectors.

The decoder is also the DCGAN-like generator (Radford, Metz and Chintala 2016, arXiv:1511.06434: a vector is projected
to a coarse map and convolved upwards). What differs from that paper: no batch normalisation anywhere (an item must not
depend on the others), upsampling by a 1×1 convolution and a pixel shuffle, whose kernels do not overlap unevenly, and
residual convolutions between.

All fold the finest level by `patch` (pixel unshuffle): on a CPU the full-resolution level would cost more than all
others together.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvCritic", "ConvDecoder", "ConvEncoder"]

Output = Literal["linear", "tanh", "sigmoid"]
OUTPUTS = ("linear", "tanh", "sigmoid")


def bounded(x: Tensor, output: str) -> Tensor:
    """The last nonlinearity of a generator."""
    return x if output == "linear" else torch.tanh(x) if output == "tanh" else torch.sigmoid(x)


def check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"The output of a generator is one of {', '.join(OUTPUTS)}, got {output!r}.")


def coarsest(shape: tuple[int, int], widths: tuple[int, ...], patch: int, what: str) -> tuple[int, int]:
    """Size of the coarsest map; raises a ValueError where the field cannot be halved as often as there are levels."""
    if not widths or min(*widths, patch) < 1 or len(shape) != 2:
        raise ValueError(
            f"{what} needs a 2-D shape and widths and patch of at least 1, got shape={tuple(shape)}, widths={tuple(widths)} and patch={patch}."
        )
    multiple = patch * 2 ** (len(widths) - 1)
    if shape[0] % multiple or shape[1] % multiple or min(shape) < multiple:
        raise ValueError(
            f"{what} with patch={patch} and {len(widths)} widths needs sizes that are multiples of {multiple}, got {tuple(shape)}; give fewer widths or crop or pad the fields."
        )
    return shape[0] // multiple, shape[1] // multiple


def channels_last(module: nn.Module) -> None:
    """The layout on which the convolutions of a CPU are faster."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def start_smooth(layer: nn.Conv2d, factor: int) -> None:
    """Let the sub-pixels of a pixel shuffle start equal (Aitken et al. 2017, arXiv:1707.02937), not as a checkerboard."""
    weight = layer.weight.reshape(-1, factor**2, *layer.weight.shape[1:])
    weight.copy_(weight[:, :1].expand_as(weight).clone())
    if layer.bias is not None:
        bias = layer.bias.reshape(-1, factor**2)
        bias.copy_(bias[:, :1].expand_as(bias).clone())


class Residual(nn.Module):
    """x + conv(SiLU(group norm(x))), 3×3, zero padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, channels), channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


class ConvEncoder(nn.Module):
    """`(batch, channels, height, width)` -> `(batch, outputs)`: strided 4×4 convolutions, group norm, SiLU, one linear layer.

    Args:
        channels: of the field. shape: (height, width), multiples of `patch` 2^(len(widths) − 1).
        outputs: of the last layer: 2 × latent for the encoder of a VAE (means, log-variances).
        widths: channels of each level, finest first.
        patch: fold factor of the first layer.

    Cost: 12 million multiply-adds for a 64×64 image with the default widths.
    """

    def __init__(
        self,
        channels: int,
        shape: tuple[int, int],
        outputs: int,
        *,
        widths: tuple[int, ...] = (32, 48, 64, 96),
        patch: int = 2,
    ) -> None:
        super().__init__()
        h, w = coarsest(shape, widths, patch, type(self).__name__)
        self.settings: dict[str, Any] = {
            "channels": channels,
            "shape": list(shape),
            "outputs": outputs,
            "widths": list(widths),
            "patch": patch,
        }
        self.patch, self.outputs = patch, outputs
        self.enter = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, c), c) for c in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Linear(widths[-1] * h * w, outputs)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        for i, norm in enumerate(self.norms):
            h = F.silu(norm(h))
            if i < len(self.down):
                h = self.down[i](h)
        return self.leave(h.flatten(1))


class ConvDecoder(nn.Module):
    """`(batch, latent)` -> `(batch, channels, height, width)`: decoder of a VAE and DCGAN-like generator.

    A linear layer to the coarsest map; on each level a residual convolution with group norm, then a 1×1 convolution
    and a pixel shuffle to the next.

    Args:
        latent: dimension of z.
        channels: of the field; times the number of classes for a categorical likelihood.
        shape: (height, width), multiples of `patch` 2^(len(widths) − 1).
        widths: channels of each level, finest first.
        patch: fold factor of the last layer.
        output: "linear", or "tanh"/"sigmoid" where the field is known to be bounded by (−1, 1) or (0, 1).
        spatial: the latent is a map of the coarsest size, entered by a 3×3 convolution: each of its numbers shapes the
            field around its own place (the small latents of Laloy et al. 2018, doi:10.1002/2017WR022148).

    Raises:
        ValueError: sizes that cannot be halved as often, a spatial latent that does not fill whole maps.

    Cost: 20 million multiply-adds for a 64×64 image with the default widths.
    """

    def __init__(
        self,
        latent: int,
        channels: int,
        shape: tuple[int, int],
        *,
        widths: tuple[int, ...] = (32, 48, 64, 96),
        patch: int = 2,
        output: Output = "linear",
        spatial: bool = False,
    ) -> None:
        super().__init__()
        self.coarse = coarsest(shape, widths, patch, type(self).__name__)
        check_output(output)
        self.maps, left = divmod(latent, math.prod(self.coarse))
        if spatial and left:
            raise ValueError(
                f"A spatial latent holds whole maps of {self.coarse[0]} × {self.coarse[1]} numbers, got {latent}; give a multiple of {math.prod(self.coarse)}."
            )
        self.settings: dict[str, Any] = {
            "latent": latent,
            "channels": channels,
            "shape": list(shape),
            "widths": list(widths),
            "patch": patch,
            "output": output,
            **({"spatial": True} if spatial else {}),
        }
        self.patch, self.output, self.top, self.spatial = patch, output, widths[-1], spatial
        self.enter: nn.Module = (
            nn.Conv2d(self.maps, widths[-1], 3, padding=1)
            if spatial
            else nn.Linear(latent, widths[-1] * math.prod(self.coarse))
        )
        upwards = tuple(reversed(widths))
        self.blocks = nn.ModuleList(Residual(c) for c in upwards)
        self.enlarge = nn.ModuleList(nn.Conv2d(a, 4 * b, 1) for a, b in itertools.pairwise(upwards))
        self.norm = nn.GroupNorm(math.gcd(8, widths[0]), widths[0])
        self.leave = nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)
        for layer in self.enlarge:
            start_smooth(cast(nn.Conv2d, layer), 2)
        start_smooth(self.leave, patch)
        channels_last(self)

    def forward(self, z: Tensor) -> Tensor:
        z = z.reshape(-1, self.maps, *self.coarse) if self.spatial else z
        h = self.enter(z).reshape(-1, self.top, *self.coarse).contiguous(memory_format=torch.channels_last)
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i < len(self.enlarge):
                h = F.pixel_shuffle(self.enlarge[i](h), 2)
        return bounded(F.pixel_shuffle(self.leave(F.silu(self.norm(h))), self.patch), self.output)


class ConvCritic(nn.Module):
    """`(batch, channels, height, width)` -> `(batch, 1)`: strided convolutions and leaky rectifiers, no normalisation.

    A normalisation over the batch would make the gradient penalty of one example depend on the others (Gulrajani et
    al. 2017, section 4).

    Args:
        channels: of the field. shape: (height, width), multiples of `patch` 2^(len(widths) − 1).
        widths: channels of each level, finest first.
        patch: fold factor of the first layer.

    Cost: 10 million multiply-adds for a 64×64 image with the default widths.
    """

    def __init__(
        self, channels: int, shape: tuple[int, int], *, widths: tuple[int, ...] = (24, 48, 64, 96), patch: int = 2
    ) -> None:
        super().__init__()
        h, w = coarsest(shape, widths, patch, type(self).__name__)
        self.settings: dict[str, Any] = {
            "channels": channels,
            "shape": list(shape),
            "widths": list(widths),
            "patch": patch,
        }
        self.patch = patch
        self.enter = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Linear(widths[-1] * h * w, 1)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        for layer in self.down:
            h = layer(F.leaky_relu(h, 0.2))
        return self.leave(F.leaky_relu(h, 0.2).flatten(1))

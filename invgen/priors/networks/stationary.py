"""A generator without borders: the latent is a field, and every pixel is the same function of the latent around it.

Spatial generators after Jetchev, Bergmann and Vollgraf 2016 (arXiv:1611.08207) and Laloy et al. 2018
(doi:10.1002/2017WR022148): only convolutions between a coarse latent field and the image, so that a bigger latent gives
a bigger image and editing a part of the latent changes only the image around it. What differs here: every convolution
is *valid* (nothing is padded, so that there is no border whose law differs from the interior's) and normalisation is
over the channels of one place, never over space.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invgen.priors.networks.convolutional import Output, bounded, channels_last, check_output, start_smooth
from invgen.priors.networks.unet import PixelNorm

__all__ = ["StationaryCritic", "StationaryGenerator"]


class StationaryGenerator(nn.Module):
    """`(batch, latent_channels, h, w)` -> `(batch, channels, H, W)`, every pixel a function of the latent around it.

    A valid 3×3 convolution of the latent, then, for each width, a norm over channels, SiLU, a valid 3×3 convolution
    and a pixel shuffle that doubles the size. A latent axis of h entries becomes

        n = h − 2,   then len(widths) times   n ← 2 (n − 2),

    and pixel p of the image of a latent whose first k entries are dropped is pixel p + k · factor of the image of the
    whole latent, where factor = 2^len(widths). With white latents the field is stationary under shifts by `factor`
    pixels (cyclostationary within: a deterministic upsampling cannot be more).

    Args:
        channels: of the field.
        latent_channels: of the latent field.
        widths: channels of each level, coarsest first.
        output: "linear", or "tanh"/"sigmoid" for fields within (−1, 1) or (0, 1).

    Cost: 32 million multiply-adds for a 64×64 image with the default widths.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (96, 64, 48, 24),
        output: Output = "linear",
    ) -> None:
        super().__init__()
        if not widths or min(*widths, channels, latent_channels) < 1:
            raise ValueError(
                f"A stationary generator needs at least one width, and widths, channels and latent_channels of at least 1, got widths={tuple(widths)}, channels={channels} and latent_channels={latent_channels}."
            )
        check_output(output)
        self.settings: dict[str, Any] = {
            "channels": channels,
            "latent_channels": latent_channels,
            "widths": list(widths),
            "output": output,
        }
        self.latent_channels, self.output, self.factor = latent_channels, output, 2 ** len(widths)
        self.enter = nn.Conv2d(latent_channels, widths[0], 3)
        self.norms = nn.ModuleList(PixelNorm(c) for c in widths)
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 3) for a, b in zip(widths, (*widths[1:], channels), strict=True))
        for layer in self.up:
            start_smooth(cast(nn.Conv2d, layer), 2)
        channels_last(self)

    def image_size(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the image of a latent field of this spatial size."""
        sizes = []
        for n in latent:
            n -= 2
            for _ in self.up:
                n = 2 * (n - 2)
            sizes.append(n)
        return tuple(sizes)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(latent_channels, h, w)` of the smallest latent whose image covers `shape`."""
        sizes = []
        for n in shape:
            for _ in self.up:
                n = -(-n // 2) + 2
            sizes.append(n + 2)
        return (self.latent_channels, *sizes)

    def footprint(self, entry: int) -> tuple[int, int]:
        """First and last pixel, along one axis, that an entry of the latent can change (before cutting to the image)."""
        low, high = entry - 2, entry
        for _ in self.up:
            low, high = 2 * (low - 2), 2 * high + 1
        return low, high

    def forward(self, z: Tensor) -> Tensor:
        h = self.enter(z.contiguous(memory_format=torch.channels_last))
        for norm, layer in zip(self.norms, self.up, strict=True):
            h = F.pixel_shuffle(layer(F.silu(norm(h))), 2)
        return bounded(h, self.output)


class StationaryCritic(nn.Module):
    """The mean of a local score over the image, `(batch, channels, H, W)` -> `(batch, 1)`, for images of any size.

    Strided convolutions and leaky rectifiers without normalisation, as in `ConvCritic`; the last map is scored by a
    3×3 convolution and averaged over space, so that no place of the image counts differently.

    Args:
        channels: of the field.
        widths: channels of each level, finest first; the local score sees 80 pixels with four of them.
        patch: fold factor of the first layer; sizes are multiples of `patch` 2^(len(widths) − 1).

    Cost: 10 million multiply-adds for a 64×64 image with the default widths.
    """

    def __init__(self, channels: int = 1, *, widths: tuple[int, ...] = (24, 48, 64, 96), patch: int = 2) -> None:
        super().__init__()
        if not widths or min(*widths, channels, patch) < 1:
            raise ValueError(
                f"A stationary critic needs at least one width, and widths, channels and patch of at least 1, got widths={tuple(widths)}, channels={channels} and patch={patch}."
            )
        self.settings: dict[str, Any] = {"channels": channels, "widths": list(widths), "patch": patch}
        self.patch, self.multiple = patch, patch * 2 ** (len(widths) - 1)
        self.enter = nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[-1], 1, 3, padding=1)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(
                f"This critic halves its input to 1/{self.multiple}, the field has the size {tuple(x.shape[-2:])}; give multiples of {self.multiple}, or fewer widths."
            )
        h = self.enter(F.pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        for layer in self.down:
            h = layer(F.leaky_relu(h, 0.2))
        return self.leave(F.leaky_relu(h, 0.2)).mean((2, 3))

"""Architectures only: torch modules without any knowledge of priors, noise schedules or physics."""

from invgen.priors.networks.mlp import MLPDenoiser
from invgen.priors.networks.unet import UNet

__all__ = ["MLPDenoiser", "UNet"]

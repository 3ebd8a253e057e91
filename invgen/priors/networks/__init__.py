"""Architectures only: torch modules without any knowledge of priors, noise schedules or physics."""

from invgen.priors.networks.convolutional import ConvCritic, ConvDecoder, ConvEncoder
from invgen.priors.networks.dense import MLP, LinearEncoder
from invgen.priors.networks.mlp import MLPDenoiser
from invgen.priors.networks.stationary import StationaryCritic, StationaryGenerator
from invgen.priors.networks.unet import UNet

__all__ = [
    "MLP",
    "ConvCritic",
    "ConvDecoder",
    "ConvEncoder",
    "LinearEncoder",
    "MLPDenoiser",
    "StationaryCritic",
    "StationaryGenerator",
    "UNet",
]

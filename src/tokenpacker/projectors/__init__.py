"""Projectors: vision features in, packed tokens for a language model out.

A new projector is one file with a config, a module and the `register` decorator, and one import below. Another package
names its module class in the entry point group `tokenpacker.projectors` instead.
"""

from tokenpacker.projectors.average_pool import AveragePool, AveragePoolConfig
from tokenpacker.projectors.base import (
    Projector,
    ProjectorConfig,
    available,
    build,
    config_from_dict,
    load,
    register,
    save,
)
from tokenpacker.projectors.c_abstractor import CAbstractor, CAbstractorConfig
from tokenpacker.projectors.dense_connector import DenseConnector, DenseConnectorConfig
from tokenpacker.projectors.ldp_v2 import LdpV2, LdpV2Config
from tokenpacker.projectors.mlp import Mlp, MlpConfig
from tokenpacker.projectors.pixel_shuffle import PixelShuffle, PixelShuffleConfig
from tokenpacker.projectors.resampler import Resampler, ResamplerConfig
from tokenpacker.projectors.token_packer import (
    RECOMMENDED_TOKEN_PACKER,
    TokenPacker,
    TokenPackerProjectorConfig,
)

__all__ = [
    "RECOMMENDED_TOKEN_PACKER",
    "AveragePool",
    "AveragePoolConfig",
    "CAbstractor",
    "CAbstractorConfig",
    "DenseConnector",
    "DenseConnectorConfig",
    "LdpV2",
    "LdpV2Config",
    "Mlp",
    "MlpConfig",
    "PixelShuffle",
    "PixelShuffleConfig",
    "Projector",
    "ProjectorConfig",
    "Resampler",
    "ResamplerConfig",
    "TokenPacker",
    "TokenPackerProjectorConfig",
    "available",
    "build",
    "config_from_dict",
    "load",
    "register",
    "save",
]

"""Projectors: vision features in, packed tokens for a language model out.

Adding one is one file: a config, a module, the `register` decorator, and a line below (or, in another
package, an entry point in the group `tokenpacker.projectors` that names the module class).
"""

from tokenpacker.projectors.base import Projector, ProjectorConfig, available, build, config_from_dict, register
from tokenpacker.projectors.files import load, save
from tokenpacker.projectors.mlp import Mlp, MlpConfig
from tokenpacker.projectors.token_packer import TokenPacker, TokenPackerProjectorConfig

__all__ = [
    "Mlp",
    "MlpConfig",
    "Projector",
    "ProjectorConfig",
    "TokenPacker",
    "TokenPackerProjectorConfig",
    "available",
    "build",
    "config_from_dict",
    "load",
    "register",
    "save",
]

"""TokenPacker: an efficient visual projector for multimodal language models.

Importing the package loads nothing, so that the command line prints its help at once. The first use of a public name
loads torch, and only torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenpacker.features import VisionFeatures
    from tokenpacker.projectors import (
        Mlp,
        MlpConfig,
        Projector,
        ProjectorConfig,
        TokenPacker,
        TokenPackerProjectorConfig,
    )
    from tokenpacker.regions import RegionConfig, RegionEncoder
    from tokenpacker.sequence import ImageLayout, max_tiles_for_budget, plan_layout, scatter_image_tokens
    from tokenpacker.tiling import TileGrid, choose_tile_grid, make_tiles

__version__ = "0.1.0"

__all__ = [
    "ImageLayout",
    "Mlp",
    "MlpConfig",
    "Projector",
    "ProjectorConfig",
    "RegionConfig",
    "RegionEncoder",
    "TileGrid",
    "TokenPacker",
    "TokenPackerProjectorConfig",
    "VisionFeatures",
    "choose_tile_grid",
    "make_tiles",
    "max_tiles_for_budget",
    "plan_layout",
    "scatter_image_tokens",
]

# module -> the public names that it defines
_PUBLIC = {
    "features": {"VisionFeatures"},
    "projectors": {"Mlp", "MlpConfig", "Projector", "ProjectorConfig", "TokenPacker", "TokenPackerProjectorConfig"},
    "regions": {"RegionConfig", "RegionEncoder"},
    "sequence": {"ImageLayout", "max_tiles_for_budget", "plan_layout", "scatter_image_tokens"},
    "tiling": {"TileGrid", "choose_tile_grid", "make_tiles"},
}


def __getattr__(name: str) -> Any:
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

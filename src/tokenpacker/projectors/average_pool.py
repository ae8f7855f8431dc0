"""Average pooling: a packed token is the MLP of its window's mean. The simplest way to fewer tokens.

The pooling baseline of TokenPacker (arXiv 2407.02392), in the order of DeCo (arXiv 2405.20985): pool, then project.

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, T = ceil(h/s)*ceil(w/s), C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register
from tokenpacker.projectors.layers import ScaledConfig, mean_of_windows, two_linears


@dataclass(frozen=True, kw_only=True)
class AveragePoolConfig(ScaledConfig):
    """Config of `AveragePool`, which reads the query level alone."""

    name: ClassVar[str] = "average-pool"


@register(AveragePoolConfig)
class AveragePool(Projector):
    """`mean of s x s patches, Linear(C->D), GELU, Linear(D->D)`."""

    config: AveragePoolConfig

    def __init__(self, config: AveragePoolConfig):
        super().__init__()
        self.config = config
        self.mlp = two_linears(config.vision_dim, config.language_dim)
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths and a scale factor beyond the grid."""
        self.check_features(features)
        scale = self.config.resolve_scale(features.patch_grid, scale_factor)
        return self.mlp(mean_of_windows(features.query, features.patch_grid, scale))  # (N, L, C) -> (N, T, D)

"""Dense Connector: means of groups of levels beside the query level, an MLP, and fewer tokens by interpolation.

Source: "Dense Connector for MLLMs" (arXiv 2405.13800), dense channel integration (equations 3 and 4) and the efficient
variant (section 3.3), which interpolates after the MLP and without parameters.

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, T = ceil(h/s)*ceil(w/s), M levels, G groups,
C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register, require_positive
from tokenpacker.projectors.layers import ScaledConfig, to_image, to_tokens


@dataclass(frozen=True, kw_only=True)
class DenseConnectorConfig(ScaledConfig):
    """Config of `DenseConnector`.

    Args:
        num_levels: M. The paper averages CLIP-L's embedding and layers 1 to 23 in groups of twelve; `vision_levels` 1
            to 23 come closest.
        num_groups: G, the number of groups of adjacent levels, of which each is averaged. The paper's best is two.
    """

    name: ClassVar[str] = "dense-connector"

    num_levels: int = 4
    num_groups: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("num_groups", self.num_groups)
        if self.num_groups > self.num_levels:
            raise ValueError(
                f"num_groups={self.num_groups} exceeds num_levels={self.num_levels}; give more levels, or fewer groups"
            )


@register(DenseConnectorConfig)
class DenseConnector(Projector):
    """`[mean of each group of levels, query], Linear((G+1)C->D), GELU, Linear(D->D), bilinear interpolation`.

    If G does not divide M, the first groups have one level more. Interpolation by 1/s samples the centre of a window:
    the central patch for an odd s, the mean of the central four for an even s. If s does not divide a side of the grid,
    the samples lie evenly on that side. The second linear layer follows the interpolation: this gives the same tokens,
    because the weights of the interpolation sum to one, and that layer runs on s*s times fewer of them.
    """

    config: DenseConnectorConfig

    def __init__(self, config: DenseConnectorConfig):
        super().__init__()
        self.config = config
        self.linear_in = nn.Linear(config.vision_dim * (config.num_groups + 1), config.language_dim)
        self.linear_out = nn.Linear(config.language_dim, config.language_dim)
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths and a scale factor beyond the grid."""
        self.check_features(features)
        token_grid = self.config.token_grid(features.patch_grid, scale_factor)
        levels = features.levels.unflatten(-1, (self.config.num_levels, -1))  # (N, L, M, C)
        groups = [group.mean(dim=2) for group in levels.tensor_split(self.config.num_groups, dim=2)]  # G of (N, L, C)
        hidden = F.gelu(self.linear_in(torch.cat([*groups, features.query], dim=-1)))  # (N, L, (G+1)C) -> (N, L, D)
        image = to_image(hidden, features.patch_grid)  # (N, D, h, w)
        return self.linear_out(to_tokens(F.interpolate(image, token_grid, mode="bilinear")))  # (N, T, D)

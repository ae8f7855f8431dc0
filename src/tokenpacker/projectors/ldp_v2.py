"""LDPv2, the light downsample projector of MobileVLM V2: project, pool, and add positions by a small convolution.

Source: "MobileVLM V2" (arXiv 2402.03766): two pointwise convolutions with GELU between them (linears on each patch),
average pooling, and a depthwise 3 x 3 convolution beside a skip connection (the position generator of 2102.10882).

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, (rows, cols) = (ceil(h/s), ceil(w/s)), T = rows*cols,
C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register
from tokenpacker.projectors.layers import ScaledConfig, mean_of_windows, to_image, to_tokens


@dataclass(frozen=True, kw_only=True)
class LdpV2Config(ScaledConfig):
    """Config of `LdpV2`, which reads the query level alone."""

    name: ClassVar[str] = "ldp-v2"


@register(LdpV2Config)
class LdpV2(Projector):
    """`Linear(C->D), GELU, Linear(D->D), mean of s x s, x + depthwise 3x3(x)`; a token depends on its neighbours, too.

    The convolution pads the grid with zeros. The mean is taken before the second linear layer: this gives the same
    tokens, and that layer runs on s*s times fewer of them.
    """

    config: LdpV2Config

    def __init__(self, config: LdpV2Config):
        super().__init__()
        self.config = config
        dim = config.language_dim
        self.linear_in = nn.Linear(config.vision_dim, dim)
        self.linear_out = nn.Linear(dim, dim)
        self.position_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises linear layers as every projector does, and the convolution as torch does."""
        super().init_weights()
        self.position_conv.reset_parameters()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths and a scale factor beyond the grid."""
        self.check_features(features)
        grid = features.patch_grid
        scale = self.config.resolve_scale(grid, scale_factor)
        hidden = F.gelu(self.linear_in(features.query))  # (N, L, C) -> (N, L, D)
        tokens = self.linear_out(mean_of_windows(hidden, grid, scale))  # (N, T, D)
        image = to_image(tokens, self.config.token_grid(grid, scale))  # (N, D, rows, cols)
        return tokens + to_tokens(self.position_conv(image))  # (N, T, D)

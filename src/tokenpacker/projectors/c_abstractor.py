"""C-Abstractor of Honeybee: residual convolution blocks, adaptive average pooling, as many blocks again, an MLP.

Source: "Honeybee: Locality-enhanced Projector for Multimodal LLM" (arXiv 2312.06742). Its released model has three and
three blocks of width 1024, learned positions, and an MLP with SiLU. A block is RegNet's (arXiv 2003.13678), with
LayerNorm for batch normalisation and SiLU for ReLU: pointwise, depthwise 3 x 3, squeeze and excitation, pointwise.

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, (rows, cols) = (ceil(h/s), ceil(w/s)), T = rows*cols,
C vision width, H width of the blocks, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register, require_positive
from tokenpacker.projectors.layers import ScaledConfig, require_grid, to_tokens, two_linears

LAYER_NORM_EPS = 1e-6  # the released model's
SQUEEZE = 4  # RegNet's squeeze-and-excitation keeps a quarter of the channels


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ScaledConfig):
    """Config of `CAbstractor`, which reads the query level alone.

    Args:
        hidden_dim: H; None means `vision_dim`, which is the released 1024 with CLIP-L.
        depth: number of blocks before the pooling, and also after it.
        position_grid: (rows, cols) of learned positions, interpolated for other patch grids. CLIP-L/336 has 24 x 24.
    """

    name: ClassVar[str] = "c-abstractor"

    hidden_dim: int | None = None
    depth: int = 3
    position_grid: tuple[int, int] = (24, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("hidden_dim", self.block_dim)
        require_positive("depth", self.depth)
        object.__setattr__(self, "position_grid", require_grid("position_grid", self.position_grid))

    @property
    def block_dim(self) -> int:
        """H, the width of the blocks."""
        return self.vision_dim if self.hidden_dim is None else self.hidden_dim


class ResidualBlock(nn.Module):
    """RegNet's bottleneck on (N, h, w, C), with LayerNorm and SiLU. Its excitation averages over the whole tile."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        squeezed = max(1, round(in_dim / SQUEEZE))
        self.pointwise_in = _pointwise(in_dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.depthwise_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.excitation = nn.Sequential(nn.Linear(dim, squeezed), nn.SiLU(), nn.Linear(squeezed, dim), nn.Sigmoid())
        self.pointwise_out = _pointwise(dim, dim)
        self.shortcut = nn.Identity() if in_dim == dim else _pointwise(in_dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        """(N, h, w, C) -> (N, h, w, H)."""
        hidden = F.silu(self.pointwise_in(image))  # (N, h, w, H)
        hidden = self.depthwise(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        hidden = F.silu(self.depthwise_norm(hidden))
        hidden = hidden * self.excitation(hidden.mean(dim=(1, 2), keepdim=True))  # gate (N, 1, 1, H)
        return F.silu(self.pointwise_out(hidden) + self.shortcut(image))


@register(CAbstractorConfig)
class CAbstractor(Projector):
    """`depth blocks, adaptive average pooling, depth blocks, Linear(H->D), SiLU, Linear(D->D)`.

    If s does not divide the grid, adaptive pooling lets the windows overlap.
    """

    config: CAbstractorConfig

    def __init__(self, config: CAbstractorConfig):
        super().__init__()
        self.config = config
        dim, depth = config.block_dim, config.depth
        self.positions = nn.Parameter(torch.empty(1, config.vision_dim, *config.position_grid))
        self.blocks_before = nn.Sequential(
            *(ResidualBlock(dim if index else config.vision_dim, dim) for index in range(depth))
        )
        self.blocks_after = nn.Sequential(*(ResidualBlock(dim, dim) for _ in range(depth)))
        self.mlp = two_linears(dim, config.language_dim, nn.SiLU)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises linear layers as every projector does, positions with 0.02, and convolutions as torch does."""
        super().init_weights()
        nn.init.trunc_normal_(self.positions, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths and a scale factor beyond the grid."""
        self.check_features(features)
        grid = features.patch_grid
        token_grid = self.config.token_grid(grid, scale_factor)
        positions = F.interpolate(self.positions.float(), grid, mode="bilinear")  # (1, C, h, w)
        tokens = features.query + to_tokens(positions).to(features.query.dtype)  # (N, L, C)
        image = self.blocks_before(tokens.unflatten(1, grid))  # (N, h, w, H)
        pooled = F.adaptive_avg_pool2d(image.permute(0, 3, 1, 2), token_grid)  # (N, H, rows, cols)
        image = self.blocks_after(to_tokens(pooled).unflatten(1, token_grid))  # (N, rows, cols, H)
        return self.mlp(image.flatten(1, 2))  # (N, T, D)


def _pointwise(in_dim: int, out_dim: int) -> nn.Sequential:
    """A 1 x 1 convolution, as a linear layer on the last axis, and its normalisation."""
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias=False), nn.LayerNorm(out_dim, eps=LAYER_NORM_EPS))

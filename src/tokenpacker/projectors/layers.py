"""Parts of several projectors: a config with a scale factor, an MLP, pooling, and tokens as an image.

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, T packed tokens, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.projectors.base import ProjectorConfig, require_positive


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(ProjectorConfig):
    """Config of a projector whose weights work at every scale factor; `scale_factor` is the default.

    Args:
        scale_factor: s, the patches per side behind one packed token.
    """

    scale_factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("scale_factor", self.scale_factor)

    def resolve_scale(self, patch_grid: tuple[int, int], scale_factor: int | None) -> int:
        """Returns the given scale factor, or the config's own for None. Raises ValueError if it exceeds the grid."""
        scale = self.scale_factor if scale_factor is None else scale_factor
        require_positive("scale_factor", scale)
        height, width = patch_grid
        if scale > min(height, width):
            raise ValueError(
                f"scale_factor={scale} exceeds patch_grid={height}x{width}; use at most {min(height, width)}"
            )
        return scale

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """Returns (ceil(h/s), ceil(w/s)). Raises ValueError if s is below 1 or exceeds a side of the grid."""
        return ceil_grid(patch_grid, self.resolve_scale(patch_grid, scale_factor))


def ceil_grid(patch_grid: tuple[int, int], scale_factor: int) -> tuple[int, int]:
    """Returns (ceil(h/s), ceil(w/s)), the grid of windows of s x s patches; windows at the edge may hold fewer."""
    return -(-patch_grid[0] // scale_factor), -(-patch_grid[1] // scale_factor)


def require_grid(name: str, value: Sequence[Any]) -> tuple[int, int]:
    """Returns a pair or a JSON list as (rows, cols). Raises ValueError unless it is two integers of at least 1."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be two integers, (rows, cols)")
    for side in value:
        require_positive(f"a side of {name}", side)
    return value[0], value[1]


def two_linears(in_dim: int, out_dim: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Returns `Linear(in->out), activation, Linear(out->out)`, the MLP of most projectors."""
    return nn.Sequential(nn.Linear(in_dim, out_dim), activation(), nn.Linear(out_dim, out_dim))


def to_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, L, C) -> (N, C, h, w), a view."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(image: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, L, C), contiguous, as some kernels of linear layers need."""
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def mean_of_windows(tokens: Tensor, patch_grid: tuple[int, int], scale_factor: int) -> Tensor:
    """(N, L, C) -> (N, T, C), the mean of the patches in each window."""
    return to_tokens(F.avg_pool2d(to_image(tokens, patch_grid), scale_factor, ceil_mode=True))

"""TokenPacker: a coarse query absorbs its own window of multi-level features by attention.

Source: "TokenPacker: Efficient Visual Projector for Multimodal LLM" (arXiv 2407.02392).

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, (rows, cols) = (ceil(h/s), ceil(w/s)) token grid,
T = rows*cols packed tokens, W = s*s patches per window, M levels, C vision width, D language width, H heads,
q queries per side of a window, Q = q*q queries per window (one in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register, require_positive
from tokenpacker.projectors.layers import ScaledConfig, ceil_grid, to_image, two_linears

if TYPE_CHECKING:
    from tokenpacker.projectors.folded import FoldedTokenPacker

LAYER_NORM_EPS = 1e-6  # released weights need this; torch's default is 1e-5
RECOMMENDED_TOKEN_PACKER = {"name": "token-packer", "queries_per_side": 2, "linear_skips": True}  # docs/probe.md


@dataclass(frozen=True, kw_only=True)
class TokenPackerProjectorConfig(ScaledConfig):
    """Config of `TokenPacker`.

    Args:
        num_levels: M. The paper uses four: 12, 16, 22 and 23 of CLIP-L/336.
        num_heads: heads of the window attention. The released weights have 8 heads of width 128.
        scale_factor: s, the default patches per side behind one packed token; the weights work with any.
        queries_per_side: q. A window has q x q queries, each of which sees its own part of the window; what they
            absorb is joined on the channel before the output MLP. The paper has one query.
        dense_query: a query also reads all levels, and what it absorbs is added to it. In the paper it reads its own
            level alone, and only weighs the patches.
        linear_skips: the value MLP and the output MLP have a linear skip connection beside them, so that patches reach
            the language model in a straight line from the first step on. The paper has none.
    """

    name: ClassVar[str] = "token-packer"

    num_levels: int = 4
    num_heads: int = 8
    queries_per_side: int = 1
    dense_query: bool = False
    linear_skips: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("num_heads", self.num_heads)
        require_positive("queries_per_side", self.queries_per_side)
        for name in ("dense_query", "linear_skips"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.vision_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide vision_dim={self.vision_dim}; choose a divisor"
            )

    @property
    def beyond_the_paper(self) -> str:
        """The settings that released weights do not have, such as `queries_per_side=2`; empty without any."""
        given = {name: getattr(self, name) for name in ("queries_per_side", "dense_query", "linear_skips")}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value != getattr(type(self), name))


class WindowAttention(nn.Module):
    """Multi-head attention of the queries of a window over that window's keys and values.

    Released weights need this: the query is scaled before its product with the keys, as `nn.MultiheadAttention` does.
    Fused attention rounds elsewhere, and after the output MLP that shows in the fifth decimal.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def extra_repr(self) -> str:
        """The settings, as they print."""
        return f"num_heads={self.num_heads}"

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (N, T, Q, C) from queries (N, T, Q, C), and keys and values (W, N, T, C).

        `mask` (T, Q, W) is True where a query sees a patch; None if all see all.
        """
        weights = self.weights(queries, keys, mask)
        values = self._split_heads(self.value_proj(values))  # (N*T*H, W, C/H)
        attended = (weights.flatten(0, 2) @ values).view(*weights.shape[:4], values.shape[-1])  # (N, T, H, Q, C/H)
        return self.output_proj(attended.transpose(2, 3).flatten(3))

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (N, T, H, Q, W), the share of each patch of a window in each head of a query."""
        query = self.query_proj(queries).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)  # (N, T, H, Q, C/H)
        query = query * query.shape[-1] ** -0.5
        key = self._split_heads(self.key_proj(keys))  # (N*T*H, W, C/H)
        scores = query.flatten(0, 2) @ key.transpose(1, 2)  # (N*T*H, Q, W)
        scores = scores.view(*query.shape[:4], len(keys))  # (N, T, H, Q, W)
        return (scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))).softmax(dim=-1)

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """(W, N, T, C) -> (N*T*H, W, C/H), a view: all axes after the window's are one batch."""
        return tokens.unflatten(-1, (self.num_heads, -1)).flatten(1, 3).transpose(0, 1)


@register(TokenPackerProjectorConfig)
class TokenPacker(Projector):
    """The projector of the paper, for any encoder, language model, patch grid and scale factor.

    If s does not divide the patch grid, the grid is extended to the right and below. Windows at the edge then hold
    fewer patches: the attention masks the missing ones, and the coarse query repeats the last row or column in their
    place. If s divides the grid, the result is that of the released code.

    `fold` gives a module that computes the same tokens in fewer multiplications, for inference.
    """

    config: TokenPackerProjectorConfig

    def __init__(self, config: TokenPackerProjectorConfig):
        super().__init__()
        self.config = config
        dim, levels_dim = config.vision_dim, config.vision_dim * config.num_levels
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_mlp = two_linears(levels_dim, dim)
        self.value_mlp = two_linears(levels_dim, dim)
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.key_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.value_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attention = WindowAttention(dim, config.num_heads)
        if config.dense_query:
            self.dense_proj = nn.Linear(levels_dim, dim, bias=False)
        absorbed_dim = dim * config.queries_per_side**2
        self.output_mlp = two_linears(absorbed_dim, config.language_dim)
        if config.linear_skips:
            self.value_skip = nn.Linear(levels_dim, dim, bias=False)
            self.output_skip = nn.Linear(absorbed_dim, config.language_dim, bias=False)
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns packed tokens (N, T, D) in row-major order; `scale_factor=None` takes the config's.

        Raises:
            ValueError: if the features' widths are not the config's, or if the scale factor exceeds the grid.
        """
        self.check_features(features)
        scale = self.config.resolve_scale(features.patch_grid, scale_factor)
        queries, keys, mask = self._queries_and_keys(features, scale)
        values = self.value_mlp(features.levels)
        if self.config.linear_skips:
            values = values + self.value_skip(features.levels)
        values = windows(self.value_norm(values), features.patch_grid, scale)  # (W, N, T, C)
        absorbed = self.attention(queries, keys, values, mask)  # (N, T, Q, C)
        if self.config.dense_query:
            absorbed = absorbed + queries
        absorbed = absorbed.flatten(2)  # (N, T, Q*C)
        packed = self.output_mlp(absorbed)  # (N, T, D)
        return packed + self.output_skip(absorbed) if self.config.linear_skips else packed

    def attention_weights(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, H, W), the share that each head of each packed token takes from each patch of its window.

        The patches of a window are in row-major order; places beyond the grid have the share 0. With several queries
        per window there are Q*H heads, those of one query beside each other.

        Raises:
            ValueError: under the conditions of `forward`.
        """
        self.check_features(features)
        scale = self.config.resolve_scale(features.patch_grid, scale_factor)
        queries, keys, mask = self._queries_and_keys(features, scale)
        return self.attention.weights(queries, keys, mask).transpose(2, 3).flatten(2, 3)

    def fold(self) -> FoldedTokenPacker:
        """Returns a copy for inference that computes the same tokens in fewer multiplications; see `folded.py`.

        The copy does not follow later changes of these weights. It takes this module's place in a model:

            model.model.multi_modal_projector = model.model.multi_modal_projector.fold()

        Raises:
            ValueError: for a subclass, for settings beyond the paper's, and if a part of the module was replaced,
                hooked, quantized or offloaded.
        """
        from tokenpacker.projectors.folded import fold  # that module builds on this one

        return fold(self)

    def _queries_and_keys(self, features: VisionFeatures, scale: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns queries (N, T, Q, C), keys (W, N, T, C) and which patches of its window each query sees."""
        grid = features.patch_grid
        keys = windows(self.key_norm(self.key_mlp(features.levels)), grid, scale)
        mask = query_mask(grid, scale, self.config.queries_per_side, keys.device)
        return self._queries(features, scale), keys, mask

    def _queries(self, features: VisionFeatures, scale: int) -> Tensor:
        """Returns queries (N, T, Q, C)."""
        grid, side = features.patch_grid, self.config.queries_per_side
        queries = self.query_proj(coarse_query(features.query, grid, scale, side))  # (N, T*Q, C)
        if self.config.dense_query:
            queries = queries + self.dense_proj(coarse_query(features.levels, grid, scale, side))
        return self.query_norm(queries).unflatten(1, (-1, side * side))


def coarse_query(tokens: Tensor, patch_grid: tuple[int, int], scale: int, side: int = 1) -> Tensor:
    """(N, L, C) -> (N, T*Q, C), bilinear interpolation by q/s (half-pixel centres, no antialias) in float32.

    Samples lie on the centres of the q x q parts of a window, q being `side`. With one part, an odd s reads the central
    patch, and an even s the mean of the central four.
    """
    rows, cols = ceil_grid(patch_grid, scale)
    below, right = extension(patch_grid, scale)
    image = to_image(tokens, patch_grid).float()  # (N, C, h, w)
    if below or right:
        image = F.pad(image, (0, right, 0, below), mode="replicate")
    image = F.interpolate(image, (rows * side, cols * side), mode="bilinear")  # (N, C, rows*q, cols*q)
    image = image.unflatten(3, (cols, side)).unflatten(2, (rows, side))  # (N, C, rows, q, cols, q)
    return image.permute(0, 2, 4, 3, 5, 1).flatten(1, 4).to(tokens.dtype)


def split_windows(tokens: Tensor, patch_grid: tuple[int, int], scale: int) -> Tensor:
    """(N, L, C) -> (N, rows, s, cols, s, C), zeros where the grid is extended."""
    below, right = extension(patch_grid, scale)
    image = tokens.unflatten(1, patch_grid)  # (N, h, w, C)
    if below or right:
        image = F.pad(image, (0, 0, 0, right, 0, below))
    return image.unflatten(2, (-1, scale)).unflatten(1, (-1, scale))


def windows(tokens: Tensor, patch_grid: tuple[int, int], scale: int) -> Tensor:
    """(N, L, C) -> (W, N, T, C), zeros where the grid is extended."""
    split = split_windows(tokens, patch_grid, scale).permute(2, 4, 0, 1, 3, 5)  # (s, s, N, rows, cols, C)
    return split.flatten(3, 4).flatten(0, 1).contiguous()  # with s = 1 it would be a view


def window_mask(patch_grid: tuple[int, int], scale: int, device: torch.device) -> Tensor | None:
    """(T, W), True where a window's place holds a patch; None if every place does."""
    if not any(extension(patch_grid, scale)):
        return None
    exists = torch.ones(1, patch_grid[0] * patch_grid[1], 1, dtype=torch.bool, device=device)
    return windows(exists, patch_grid, scale)[:, 0, :, 0].T


def query_mask(patch_grid: tuple[int, int], scale: int, side: int, device: torch.device) -> Tensor | None:
    """(T or 1, Q, W), True where a query of a window sees a patch; None if every query sees every patch.

    A query sees the patches that its part of the window touches. If all of them lie beyond the grid, it sees the whole
    window.
    """
    exists = window_mask(patch_grid, scale, device)
    exists = None if exists is None else exists[:, None]  # (T, 1, W)
    if side == 1:
        return exists
    patch, part = torch.arange(scale, device=device), torch.arange(side, device=device)[:, None]
    touches = (patch * side < (part + 1) * scale) & ((patch + 1) * side > part * scale)  # (q, s)
    part_of_window = (touches[:, None, :, None] & touches[None, :, None]).flatten(2).flatten(0, 1)[None]  # (1, Q, W)
    if exists is None:
        return part_of_window
    seen = exists & part_of_window
    return seen | (exists & ~seen.any(dim=-1, keepdim=True))


def extension(patch_grid: tuple[int, int], scale: int) -> tuple[int, int]:
    """How many rows below and columns to the right make s divide the grid."""
    rows, cols = ceil_grid(patch_grid, scale)
    return rows * scale - patch_grid[0], cols * scale - patch_grid[1]

"""User-marked regions: from masks to weights of patches, and from vision features to one token per region.

A region's token is the mean of the vision features under its mask. Each level has its own linear layer; the results are
summed and projected to the language model's width. The mean over an image is a weighted sum over the patches of its
tiles, so the tiles need no re-assembly; the thumbnail has weight 0. Source: the original's region branch, which pools
as Osprey does (arXiv 2312.10032).

Shapes: R regions of all images in order, N tiles in order of use, P tiles of an image at most, (h, w) patch grid,
L = h*w, M levels, C vision width, D language width. With `tile_index`, N tiles refer to U different ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import init_linears, require_features, require_positive
from tokenpacker.tiling import TileGrid

RegionRule = Literal["coverage", "centre"]
"""The weight of a patch. `coverage`: the share of its area under the mask, which keeps small and thin regions.
`centre`: 1 if any of its centre pixels is set, else 0; the released weights were trained with it."""


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Widths of a `RegionEncoder`. Raises ValueError for a width below 1.

    Args:
        vision_dim: C, width of one level.
        language_dim: D.
        num_levels: M.
    """

    vision_dim: int
    language_dim: int
    num_levels: int = 4

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            require_positive(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a JSON-ready dict."""
        return asdict(self)


class RegionEncoder(nn.Module):
    """Computes one token per region."""

    def __init__(self, config: RegionConfig):
        super().__init__()
        self.config = config
        self.level_projs = nn.ModuleList(
            nn.Linear(config.vision_dim, config.vision_dim) for _ in range(config.num_levels)
        )
        self.output_proj = nn.Linear(config.vision_dim, config.language_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises every linear layer as projectors do."""
        init_linears(self, self.config.vision_dim)

    def forward(
        self, features: VisionFeatures, cells: Tensor, first_tile: Tensor, tile_index: Tensor | None = None
    ) -> Tensor:
        """Returns region tokens (R, D). The token of a region without any weight depends on the biases alone.

        Args:
            features: of the N tiles, or of the U different ones with `tile_index`.
            cells: (R, P, L) weights of the patches of the region's image, tile by tile; zeros after its last tile.
            first_tile: (R,), the first tile of the region's image among the N.
            tile_index: (N,), the tile of `features` behind each of the N.

        Raises:
            ValueError: if shapes do not fit, or if a region's image begins after the last tile.
        """
        self._check(features, cells, first_tile)
        pooled = _pool(features.levels, cells, first_tile, tile_index)  # (R, M*C)
        levels = pooled.to(self.output_proj.weight.dtype).unflatten(1, (self.config.num_levels, -1))
        levels = levels.transpose(0, 1).contiguous()  # (M, R, C)
        projected = [project(level) for project, level in zip(self.level_projs, levels, strict=True)]
        return self.output_proj(torch.stack(projected).sum(dim=0))  # (R, C) -> (R, D)

    def _check(self, features: VisionFeatures, cells: Tensor, first_tile: Tensor) -> None:
        require_features("the region encoder", features, self.config)
        num_patches = features.levels.shape[1]
        if cells.dim() != 3 or cells.shape[2] != num_patches or tuple(first_tile.shape) != tuple(cells.shape[:1]):
            raise ValueError(
                f"region cells are {tuple(cells.shape)} and first tiles {tuple(first_tile.shape)}; expected (regions,"
                f" tiles, {num_patches}) and (regions,), as the processor makes them"
            )


def _pool(levels: Tensor, cells: Tensor, first_tile: Tensor, tile_index: Tensor | None) -> Tensor:
    """Returns weighted means (R, M*C) of levels (U, L, M*C), summed in float32 at least.

    It works image by image, only on tiles with weight, so that it never copies more than one image's features.
    """
    num_tiles = levels.shape[0] if tile_index is None else tile_index.shape[0]
    dtype = torch.promote_types(levels.dtype, torch.float32)
    cells, first_tile = cells.to(levels.device, dtype), first_tile.to(levels.device)
    total = cells.sum(dim=(1, 2), keepdim=True)
    weights = cells / torch.where(total > 0, total, 1)  # (R, P, L)
    if torch.compiler.is_compiling():
        return _pool_in_a_graph(
            levels if tile_index is None else levels[tile_index.to(levels.device)], weights, first_tile
        )
    pooled = levels.new_zeros(cells.shape[0], levels.shape[2], dtype=dtype)
    for first in first_tile.unique().tolist():
        regions = (first_tile == first).nonzero()[:, 0]
        own = weights[regions]  # (r, P, L)
        used = own.any(dim=2).any(dim=0).nonzero()[:, 0]  # (p,)
        tiles = first + used
        if first < 0 or first >= num_tiles or (used.numel() and int(tiles[-1]) >= num_tiles):
            raise ValueError(
                f"a region's image begins at tile {first} and has weights up to tile {first + cells.shape[1] - 1}, but"
                f" there are {num_tiles} tiles; pass region_first_tile as the processor made it for exactly these"
            )
        shown = levels[tiles if tile_index is None else tile_index.to(levels.device)[tiles]]  # (p, L, M*C)
        with torch.autocast(levels.device.type, enabled=False):  # thousands of patches: bfloat16 has three digits
            mean = own[:, used].flatten(1) @ shown.flatten(0, 1).to(dtype)  # (r, p*L) @ (p*L, M*C)
        pooled = pooled.index_copy(0, regions, mean)
    return pooled


def _pool_in_a_graph(levels: Tensor, weights: Tensor, first_tile: Tensor) -> Tensor:
    """`_pool` for a graph, which cannot depend on values: every region reads the tiles of all images."""
    num_regions, num_places, num_patches = weights.shape
    tiles = first_tile[:, None] + torch.arange(num_places, device=first_tile.device)  # (R, P)
    tiles = tiles.clamp(0, levels.shape[0] - 1)[..., None].expand(-1, -1, num_patches)  # places after the last weigh 0
    spread = weights.new_zeros(num_regions, levels.shape[0], num_patches).scatter_add(1, tiles, weights)  # (R, N, L)
    with torch.autocast(levels.device.type, enabled=False):
        return spread.flatten(1) @ levels.flatten(0, 1).to(weights.dtype)  # (R, N*L) @ (N*L, M*C)


def cells_under(masks: Tensor, patch_size: tuple[int, int], rule: RegionRule = "coverage") -> Tensor:
    """Returns the weights (R, rows, cols) of patches under masks (R, H, W) on the canvas of the tiles.

    Released weights need rule "centre": the original resizes a mask bilinearly to the patch grid and takes values above
    0. With half-pixel centres and no filter, this reads the middle two rows and columns (one of an odd size).

    Raises:
        ValueError: for an unknown rule, or if the canvas is not a whole number of patches.
    """
    check_rule(rule)
    size, (height, width) = tuple(masks.shape[1:]), patch_size
    if masks.dim() != 3 or size[0] % height or size[1] % width:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}; expected (regions, height, width) of a canvas that patches of"
            f" {height}x{width} pixels cover"
        )
    if rule == "coverage":
        starts = [torch.arange(0, length, patch) for length, patch in zip(size, patch_size, strict=True)]
        rows, cols = (torch.stack([s, s + p], dim=1) for s, p in zip(starts, patch_size, strict=True))
        return covered_share(masks, rows, cols)
    blocks = masks.bool().unflatten(2, (-1, width)).unflatten(1, (-1, height))  # (R, rows, height, cols, width)
    middle_row, middle_col = (slice((length - 1) // 2, length // 2 + 1) for length in patch_size)
    return blocks[:, :, middle_row, :, middle_col].any(dim=4).any(dim=2).float()


def covered_share(masks: Tensor, row_spans: Tensor, col_spans: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
    """Returns (R, rows, cols), the share of each cell's area under the masks (R, H, W); cells may have any size.

    It computes in float64 and rounds once, so that masks of a part of the image give the same shares.

    Args:
        row_spans: (rows, 2), begin and end of the cells in image pixels; they may lie outside of the masks.
        col_spans: (cols, 2) likewise.
        origin: (row, column) of the masks' first pixel in the image.
    """
    ends = origin[0] + masks.shape[1], origin[1] + masks.shape[2]
    over_rows = _overlap(row_spans, origin[0], ends[0]).to(masks.device)  # (rows, H)
    over_cols = _overlap(col_spans, origin[1], ends[1]).to(masks.device)  # (cols, W)
    rows, cols = over_rows.any(dim=1), over_cols.any(dim=1)  # cells that the masks reach, often few
    shares = masks.new_zeros(masks.shape[0], len(rows), len(cols), dtype=torch.float32)
    reached = over_rows[rows] @ masks.bool().double() @ over_cols[cols].T
    shares[:, rows.nonzero(), cols.nonzero()[:, 0]] = reached.float()
    return shares


def covered_share_of_box(box: tuple[int, int, int, int], row_spans: Tensor, col_spans: Tensor) -> Tensor:
    """Returns (rows, cols), the `covered_share` under a box (top, left, bottom, right)."""
    top, left, bottom, right = box
    return (_share_within(row_spans, top, bottom) * _share_within(col_spans, left, right).T).float()


def _overlap(spans: Tensor, start: int, stop: int) -> Tensor:
    """(cells, pixels) in float64, the share of a cell's length in each of the pixels start..stop."""
    pixels = torch.arange(start, stop, dtype=torch.float64)
    return _share_within(spans, pixels, pixels + 1)


def _share_within(spans: Tensor, start: Tensor | int, stop: Tensor | int) -> Tensor:
    """(cells, K) in float64, the share of a cell's length in each of K intervals (K = 1 for numbers)."""
    low, high = spans.double()[:, None].unbind(dim=2)  # (cells, 1) each
    shared = torch.clamp(high, max=stop) - torch.clamp(low, min=start)
    return shared.clamp_min(0) / (high - low)


def tiles_of_cells(cells: Tensor, grid: TileGrid) -> Tensor:
    """Cuts weights on a canvas (R, rows*h, cols*w) into those of its n tiles (R, n, L); 0 for the thumbnail."""
    tiles = cells.unflatten(2, (grid.cols, -1)).unflatten(1, (grid.rows, -1))  # (R, rows, h, cols, w)
    tiles = tiles.transpose(2, 3).flatten(3).flatten(1, 2)  # (R, rows*cols, L)
    return nn.functional.pad(tiles, (0, 0, 0, int(grid.has_thumbnail)))


def scatter_region_tokens(embeddings: Tensor, input_ids: Tensor, region_tokens: Tensor, region_token_id: int) -> Tensor:
    """Returns the embeddings (B, S, D) with region tokens (R, D) in the places of `region_token_id`, in order.

    Raises:
        ValueError: if the number of placeholders in `input_ids` (B, S) is not that of the regions.
    """
    is_region = input_ids == region_token_id  # (B, S)
    if not torch.compiler.is_compiling():  # as `sequence.scatter_image_tokens`
        num_places = int(is_region.sum())
        if num_places != region_tokens.shape[0]:
            raise ValueError(
                f"the prompts hold {num_places} region tokens but there are {region_tokens.shape[0]} regions; pass the"
                " regions of exactly these prompts, and write <mask> once for each"
            )
    return embeddings.masked_scatter(is_region[..., None], region_tokens.to(embeddings.dtype))


def check_rule(rule: str) -> RegionRule:
    """Returns the rule. Raises ValueError if it is unknown."""
    if rule not in get_args(RegionRule):
        raise ValueError(f"region_rule={rule!r} is unknown; use 'coverage' or 'centre'")
    return rule  # type: ignore[return-value]

"""Which scale factor each tile gets. The processor counts tokens with it, and passes it on to the model.

A scale factor is given as one number for all images, or as a list with one entry per image: a number, None for the
projector's own, "auto" for what the router makes of its pixels, or a list with one number per tile, row by row, the
thumbnail's last. For one image of several tiles the list of its numbers may stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tokenpacker.projectors import ProjectorConfig
from tokenpacker.sequence import ImageLayout, TokenGrid


def plain(scale_factor: Any) -> Any:
    """Arrays, tensors and tuples as lists, and their numbers as Python's."""
    if hasattr(scale_factor, "tolist"):
        return scale_factor.tolist()
    return [plain(entry) for entry in scale_factor] if isinstance(scale_factor, (list, tuple)) else scale_factor


def per_image(scale_factor: Any, num_images: int) -> list[Any]:
    """One entry per image. Raises ValueError for a list of another length."""
    scale_factor = plain(scale_factor)
    if not isinstance(scale_factor, list):
        return [scale_factor] * num_images
    if num_images == 1 and len(scale_factor) > 1 and all(isinstance(factor, int) for factor in scale_factor):
        return [scale_factor]
    if len(scale_factor) != num_images:
        raise ValueError(
            f"scale_factor has {len(scale_factor)} entries for {num_images} images; give one number for all, or a list"
            " with one entry per image: a number, or a list with one number per tile"
        )
    return scale_factor


def token_grids(config: ProjectorConfig, patch_grid: TokenGrid, entry: Any) -> TokenGrid | list[TokenGrid]:
    """(rows, cols) of packed tokens of all tiles, or of each. Raises ValueError if a scale factor does not fit."""
    if isinstance(entry, (list, tuple)):
        return [config.token_grid(patch_grid, factor) for factor in entry]
    return config.token_grid(patch_grid, entry)


def per_tile(
    config: ProjectorConfig, patch_grid: TokenGrid, entries: Sequence[Any], layouts: Sequence[ImageLayout]
) -> list[int] | None:
    """The scale factor of each tile of all images, in order; None for a projector whose tokens have none."""
    own = own_scale_factor(config, patch_grid)
    factors: list[Any] = []
    for entry, layout in zip(entries, layouts, strict=True):
        one_for_all = [own if entry is None else entry] * layout.tile_grid.num_tiles
        factors += entry if isinstance(entry, list) else one_for_all
    return None if None in factors else factors


def own_scale_factor(config: ProjectorConfig, patch_grid: TokenGrid) -> int | None:
    """The scale factor in the projector's config, or the one that gives its number of tokens; None if there is none."""
    own: int | None = getattr(config, "scale_factor", None)
    if own is not None:
        return own
    token_grid = config.token_grid(patch_grid)
    implied = -(-patch_grid[0] // token_grid[0])
    with suppress(ValueError):
        return implied if config.token_grid(patch_grid, implied) == token_grid else None
    return None

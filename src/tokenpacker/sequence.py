"""An image as the language model reads it: the order of its tokens, their exact count, and what each one shows.

A sliced image is its tiles row by row, a tile separator between the tiles of a row, a row separator after each row,
then the thumbnail and one more row separator: n tiles of T packed tokens cost exactly n(T+1) tokens.
If tiles have different scale factors, each costs its own T + 1.
An image in one piece (modes `square` and `pad`) costs its T packed tokens.

Shapes: B samples, S sequence length, N tiles, T packed tokens per tile, D language width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenpacker.projectors.base import require_positive
from tokenpacker.tiling import Box, GridList, TileGrid, TileView, choose_tile_grid

TokenGrid = tuple[int, int]
Token = TypeVar("Token", int, str)
IGNORED = -100  # label of a place that the loss ignores, as in transformers and torch


@dataclass(frozen=True)
class TokenSource:
    """What one image token shows: a place in a tile, and a box (top, left, bottom, right) of the original image.

    `box` is in image pixels, clipped to the image; None if the token shows only padding.
    """

    tile: int
    row: int
    col: int
    is_thumbnail: bool
    box: Box | None


@dataclass(frozen=True, init=False)
class ImageLayout:
    """The token sequence of one image.

    Args:
        tile_grid: grid of tiles.
        token_grids: (rows, cols) of packed tokens, one for all tiles or one per tile, the thumbnail's last. Stored as
            one per tile.
        separators: whether separators follow tiles and rows (sliced images) or not (images in one piece).

    Raises:
        ValueError: for several tiles without separators, and if the number of token grids is not that of the tiles.
    """

    tile_grid: TileGrid
    token_grids: tuple[TokenGrid, ...]
    separators: bool

    def __init__(self, tile_grid: TileGrid, token_grids: TokenGrid | Sequence[TokenGrid], separators: bool = True):
        if not separators and tile_grid.has_thumbnail:
            raise ValueError(f"{tile_grid} has several tiles; these need separators")
        object.__setattr__(self, "tile_grid", tile_grid)
        object.__setattr__(self, "token_grids", _one_per_tile(token_grids, tile_grid))
        object.__setattr__(self, "separators", separators)

    @property
    def tile_tokens(self) -> list[int]:
        """T of each tile, separators not counted."""
        return [rows * cols for rows, cols in self.token_grids]

    @property
    def token_grid(self) -> TokenGrid:
        """(rows, cols) of packed tokens in every tile. Raises ValueError if tiles differ: see `token_grids`."""
        if len(set(self.token_grids)) > 1:
            raise ValueError(
                "the tiles of this image have different scale factors; read token_grids, or tile_tokens, of each tile"
            )
        return self.token_grids[0]

    @property
    def tokens_per_tile(self) -> int:
        """T of every tile, separators not counted. Raises ValueError if tiles differ: see `tile_tokens`."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def num_tokens(self) -> int:
        """The exact number of image tokens, separators included."""
        return sum(self.tile_tokens) + self.separators * self.tile_grid.num_tiles

    def token_ids(self, image_token: Token, tile_separator: Token, row_separator: Token) -> list[Token]:
        """Returns the image's tokens, as ids or texts; packed tokens take the places of `image_token` later."""
        tokens: list[Token] = []
        last_slice = self.tile_grid.rows * self.tile_grid.cols
        for number, count in enumerate(self.tile_tokens, start=1):
            tokens += [image_token] * count
            if self.separators:
                ends_row = number % self.tile_grid.cols == 0 or number > last_slice
                tokens.append(row_separator if ends_row else tile_separator)
        return tokens

    def place(self, index: int) -> tuple[int, int] | None:
        """Returns (tile, place among its packed tokens) of the image token at `index`; None for a separator.

        Raises:
            IndexError: if the image has no such token.
        """
        if not 0 <= index < self.num_tokens:
            raise IndexError(f"token {index} does not exist; the image has {self.num_tokens} tokens")
        ends = list(accumulate(count + self.separators for count in self.tile_tokens))  # a separator closes every tile
        tile = bisect_right(ends, index)
        place = index - ends[tile] + self.tile_tokens[tile] + self.separators
        return None if place == self.tile_tokens[tile] else (tile, place)

    def source(
        self,
        index: int,
        views: list[TileView],
        window_sizes: tuple[float, float] | Sequence[tuple[float, float]],
        tile_size: tuple[int, int],
        image_size: tuple[int, int],
    ) -> TokenSource | None:
        """Returns what the image token at `index` shows; None for a separator. The inverse of `token_ids`.

        Args:
            views: one per tile, as `tiling.slice_views` gives them.
            window_sizes: (height, width) in tile pixels of one packed token's window, scale factor times patch size;
                one for all tiles or one per tile.
            tile_size: (height, width) of a tile, where windows at the edge are cut off.
            image_size: (height, width) of the original image.

        Raises:
            IndexError: if the image has no such token.
        """
        found = self.place(index)
        if found is None:
            return None
        tile, place = found
        height, width = _one_per_tile(window_sizes, self.tile_grid)[tile]
        row, col = divmod(place, self.token_grids[tile][1])
        top, left = row * height, col * width
        bottom, right = min(top + height, tile_size[0]), min(left + width, tile_size[1])
        box = views[tile].to_image((top, left, bottom, right), image_size)
        return TokenSource(tile, row, col, tile == self.tile_grid.rows * self.tile_grid.cols, box)


def _one_per_tile(sizes: Any, tile_grid: TileGrid) -> tuple[Any, ...]:
    """Returns one pair of numbers per tile, from one for all tiles or one per tile."""
    if not isinstance(sizes[0], Sequence):
        return (tuple(sizes),) * tile_grid.num_tiles
    if len(sizes) != tile_grid.num_tiles:
        thumbnail = " and a thumbnail" if tile_grid.has_thumbnail else ""
        raise ValueError(
            f"{len(sizes)} scale factors were given for the {tile_grid.num_tiles} tiles of an image, a grid of"
            f" {tile_grid.rows}x{tile_grid.cols}{thumbnail}; give one for all, or one for each tile, the thumbnail's"
            " last"
        )
    return tuple(tuple(size) for size in sizes)


def max_tiles_for_budget(max_image_tokens: int, tokens_per_tile: int) -> int:
    """Returns the largest limit of rows*cols at which every grid's exact count n(T+1) fits `max_image_tokens`.

    A grid of more than one tile has a thumbnail, too: tokens for three tiles allow a 1x2 grid.

    Raises:
        ValueError: if not even one tile fits.
    """
    affordable = max_image_tokens // (tokens_per_tile + 1)
    if affordable < 1:
        raise ValueError(
            f"max_image_tokens={max_image_tokens} is too small: one tile costs {tokens_per_tile + 1} tokens;"
            " raise the budget or the scale factor"
        )
    return max(1, affordable - 1)


def plan_layout(
    image_size: tuple[int, int],
    tile_size: tuple[int, int],
    token_grids: TokenGrid | Sequence[TokenGrid],
    *,
    sliced: bool = True,
    max_tiles: int = 9,
    max_image_tokens: int | None = None,
    grid_list: GridList = "all",
) -> ImageLayout:
    """Plans the token sequence of an image of (height, width). Every caller in the package plans here.

    Args:
        token_grids: (rows, cols) of packed tokens, as a projector's config counts them: one for all tiles, or one per
            tile if tiles have different scale factors.
        sliced: cut into tiles (`slice`); False for images in one piece (`square`, `pad`).
        max_tiles: limit of rows*cols.
        max_image_tokens: budget. It leaves out grids whose exact count exceeds it. With different token grids,
            `max_tiles` alone limits the grid, and the result is checked against the budget.
        grid_list: see `tiling.tile_grids`.

    Raises:
        ValueError: if the budget is exceeded or too small for one tile, if a size or limit is no integer of at least 1,
            if the list is unknown, or if there are more or fewer token grids than tiles.
    """
    require_positive("max_tiles", max_tiles)
    if max_image_tokens is not None:
        require_positive("max_image_tokens", max_image_tokens)
    if not sliced:
        layout = ImageLayout(TileGrid(1, 1), token_grids, separators=False)
        if max_image_tokens is not None and max_image_tokens < layout.num_tokens:
            raise ValueError(
                f"max_image_tokens={max_image_tokens} is too small: an image in one piece costs {layout.num_tokens}"
                " tokens; raise the budget or the scale factor"
            )
        return layout
    different: set[Any] = set(token_grids) if isinstance(token_grids[0], Sequence) else {token_grids}
    if max_image_tokens is not None and len(different) == 1:
        rows, cols = different.pop()
        max_tiles = min(max_tiles, max_tiles_for_budget(max_image_tokens, rows * cols))
    layout = ImageLayout(choose_tile_grid(image_size, tile_size, max_tiles, grid_list), token_grids)
    if max_image_tokens is not None and max_image_tokens < layout.num_tokens:
        raise ValueError(
            f"max_image_tokens={max_image_tokens} is too small: the image costs {layout.num_tokens} tokens at the given"
            " scale factors; raise the budget or a tile's scale factor"
        )
    return layout


def scatter_image_tokens(embeddings: Tensor, input_ids: Tensor, packed_tokens: Tensor, image_token_id: int) -> Tensor:
    """Returns the embeddings (B, S, D) with packed tokens in the places of `image_token_id`, in order.

    Args:
        input_ids: (B, S).
        packed_tokens: (N, T, D), or (K, D) of tiles with different numbers of tokens.

    Raises:
        ValueError: if the number of placeholders in `input_ids` is not that of the packed tokens.
    """
    is_image = input_ids == image_token_id  # (B, S)
    num_packed = packed_tokens.shape[:-1].numel()
    if not torch.compiler.is_compiling():  # counting breaks a compiled graph
        num_places = int(is_image.sum())
        if num_places != num_packed:
            raise ValueError(
                f"the prompts hold {num_places} image tokens but the images give {num_packed} packed tokens;"
                " pass the images of exactly these prompts, with the scale_factors that the processor gave with them"
            )
    return embeddings.masked_scatter(is_image[..., None], packed_tokens.to(embeddings.dtype))

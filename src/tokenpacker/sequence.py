"""An image as the language model sees it: the order of its tokens, their exact count, and what each one shows.

A sliced image is its tiles row by row, a tile separator between the tiles of a row, a row separator after each row,
then the thumbnail and one more row separator: n tiles of T packed tokens cost exactly n(T+1) tokens.
An image in one piece (modes `square` and `pad`) is its T packed tokens and nothing else.

Shapes: B samples, S sequence length, N tiles, T packed tokens per tile, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpacker.tiling import GridList, TileGrid, TileView, choose_tile_grid

IGNORED = -100  # label of a place where nothing is learned, as transformers and torch have it


@dataclass(frozen=True)
class TokenSource:
    """What one image token shows: a place in a tile, and the box (top, left, bottom, right) of the original image.

    `box` is in image pixels, clipped to the image, and None where the token shows nothing but padding.
    """

    tile: int
    row: int
    col: int
    is_thumbnail: bool
    box: tuple[float, ...] | None


@dataclass(frozen=True)
class ImageLayout:
    """The token sequence of one image.

    Args:
        tile_grid: grid of tiles.
        token_grid: (rows, cols) of packed tokens in each tile.
        separators: whether separators follow tiles and rows (sliced images) or not (images in one piece).
    """

    tile_grid: TileGrid
    token_grid: tuple[int, int]
    separators: bool = True

    def __post_init__(self) -> None:
        if not self.separators and self.tile_grid.has_thumbnail:
            raise ValueError(f"{self.tile_grid} has several tiles; these need separators")

    @property
    def tokens_per_tile(self) -> int:
        """T, separators not counted."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def num_tokens(self) -> int:
        """The exact number of image tokens, separators included."""
        return self.tile_grid.num_tiles * (self.tokens_per_tile + self.separators)

    def token_ids(self, image_token_id: int, tile_separator_id: int, row_separator_id: int) -> list[int]:
        """Token ids of the image; `image_token_id` stands where packed tokens are scattered later."""
        tile = [image_token_id] * self.tokens_per_tile
        if not self.separators:
            return tile
        ids: list[int] = []
        for _ in range(self.tile_grid.rows):
            row = [*tile, tile_separator_id] * self.tile_grid.cols
            ids += [*row[:-1], row_separator_id]
        return [*ids, *tile, row_separator_id] if self.tile_grid.has_thumbnail else ids

    def source(
        self, index: int, views: list[TileView], window_size: tuple[float, float], image_size: tuple[int, int]
    ) -> TokenSource | None:
        """What the image token at `index` shows; None for a separator. The inverse of `token_ids`.

        Args:
            views: one per tile, as `tiling.slice_views` gives them.
            window_size: (height, width) in tile pixels of one packed token's window: scale factor times patch size.
            image_size: (height, width) of the original image.

        Raises:
            IndexError: when the image has no such token.
        """
        if not 0 <= index < self.num_tokens:
            raise IndexError(f"token {index} does not exist; the image has {self.num_tokens} tokens")
        tile, place = divmod(index, self.tokens_per_tile + self.separators)  # a separator closes every tile
        if place == self.tokens_per_tile:
            return None
        row, col = divmod(place, self.token_grid[1])
        top, left = row * window_size[0], col * window_size[1]
        box = views[tile].to_image((top, left, top + window_size[0], left + window_size[1]), image_size)
        return TokenSource(tile, row, col, tile == self.tile_grid.rows * self.tile_grid.cols, box)


def max_tiles_for_budget(max_image_tokens: int, tokens_per_tile: int) -> int:
    """The largest limit of rows*cols at which every grid's exact count n(T+1) fits `max_image_tokens`.

    A grid of more than one tile pays for its thumbnail too, so three tiles' worth of tokens buy a 1x2 grid.

    Raises:
        ValueError: when not even one tile fits.
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
    token_grid: tuple[int, int],
    *,
    sliced: bool = True,
    max_tiles: int = 9,
    max_image_tokens: int | None = None,
    grid_list: GridList = "all",
) -> ImageLayout:
    """The token sequence that an image of (height, width) gets; the one place where this is decided.

    Args:
        token_grid: (rows, cols) of packed tokens per tile, as a projector's config counts them.
        sliced: cut into tiles (`slice`); False for images in one piece (`square`, `pad`).
        max_tiles: limit of rows*cols.
        max_image_tokens: budget; grids whose exact count exceeds it are left out of the choice.
        grid_list: see `tiling.tile_grids`.

    Raises:
        ValueError: when the budget does not even pay for one tile, a size or limit is below 1, or the list is unknown.
    """
    tokens_per_tile = token_grid[0] * token_grid[1]
    if not sliced:
        if max_image_tokens is not None and max_image_tokens < tokens_per_tile:
            raise ValueError(
                f"max_image_tokens={max_image_tokens} is too small: an image in one piece costs {tokens_per_tile}"
                " tokens; raise the budget or the scale factor"
            )
        return ImageLayout(TileGrid(1, 1), token_grid, separators=False)
    if max_image_tokens is not None:
        max_tiles = min(max_tiles, max_tiles_for_budget(max_image_tokens, tokens_per_tile))
    return ImageLayout(choose_tile_grid(image_size, tile_size, max_tiles, grid_list), token_grid)


def scatter_image_tokens(embeddings: Tensor, input_ids: Tensor, packed_tokens: Tensor, image_token_id: int) -> Tensor:
    """(B, S, D) embeddings with the packed tokens in place of every `image_token_id`, in order.

    Args:
        input_ids: (B, S).
        packed_tokens: (N, T, D), or (K, D) of tiles with different numbers of tokens.

    Raises:
        ValueError: when `input_ids` holds another number of placeholders than there are packed tokens.
    """
    is_image = input_ids == image_token_id  # (B, S)
    num_packed = packed_tokens.shape[:-1].numel()
    if not torch.compiler.is_compiling():  # counting waits for the device and would break a compiled graph
        num_places = int(is_image.sum())
        if num_places != num_packed:
            raise ValueError(
                f"the prompts hold {num_places} image tokens but the images give {num_packed} packed tokens;"
                " pass the images of exactly these prompts, with the scale_factors that the processor gave with them"
            )
    return embeddings.masked_scatter(is_image[..., None], packed_tokens.to(embeddings.dtype))

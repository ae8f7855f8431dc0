"""Drawings are tested for what they show where, not for their looks."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tokenpacker.sequence import ImageLayout
from tokenpacker.tiling import TileGrid, choose_tile_grid, slice_views
from tokenpacker.visualize import PANEL, PackedImage, draw_attention, draw_page, draw_tiles, draw_tokens

TILE, PATCHES = (32, 32), (8, 8)


def packed(image: Image.Image, scale_factor: int = 2) -> PackedImage:
    size = (image.height, image.width)
    grid = choose_tile_grid(size, TILE)
    token_grid = (-(-PATCHES[0] // scale_factor), -(-PATCHES[1] // scale_factor))
    factors = (scale_factor,) * grid.num_tiles
    return PackedImage(image, ImageLayout(grid, token_grid), slice_views(size, grid, TILE), TILE, PATCHES, factors)


def even(side: int, heads: int = 2) -> np.ndarray:
    return np.full((heads, side, side), 1 / side**2)


def test_the_plan_of_a_processor_is_what_the_model_gets(tiny_processor, image_of):
    plan = PackedImage.plan(tiny_processor, image_of(60, 90), scale_factor=4)
    inputs = tiny_processor(images=image_of(60, 90), text="<image>", scale_factor=4, return_tensors="pt")
    assert len(plan.views) == len(inputs["pixel_values"])
    assert plan.window_size(0) == (16, 16)
    assert plan.num_full_tokens == len(plan.views) * 65


def test_windows_tile_their_tile_and_stop_at_its_edge(image_of):
    image = packed(image_of(60, 90), scale_factor=3)  # 8 patches: windows of 3, 3 and 2
    top, left, bottom, right = image.tile_box(0)
    assert image.window_box(0, 0, 0)[:2] == (top, left)
    assert image.window_box(0, 2, 2)[2:] == pytest.approx((bottom, right))


def test_each_token_has_the_mean_colour_of_its_pixels_in_its_place():
    halves = Image.new("RGB", (32, 32), "red")
    halves.paste("blue", (16, 0, 32, 32))
    panel = draw_tokens(packed(halves))
    assert panel.getpixel((PANEL // 8, PANEL // 8)) == (255, 0, 0)
    assert panel.getpixel((PANEL * 7 // 8, PANEL // 8)) == (0, 0, 255)


def test_tiles_are_drawn_over_the_picture():
    panel = draw_tiles(packed(Image.new("RGB", (96, 64), "green")))
    assert panel.getpixel((PANEL // 2 - 20, PANEL // 4 + 20)) == (0, 128, 0)


def test_attention_washes_the_patch_that_gets_it():
    weights = np.zeros((2, 2, 2))
    weights[:, 0, 1] = 1
    panel = draw_attention(packed(Image.new("RGB", (32, 32), "white")), 5, weights)
    quiet, loud = (panel.getpixel((x, PANEL // 4 + 10)) for x in (PANEL // 4 + 10, PANEL // 2 + 10))
    assert quiet == (255, 255, 255)
    assert loud[2] < 100  # the wash is orange: little blue is left


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (64, 64), (300, 200)])
@pytest.mark.parametrize("scale_factor", [1, 3, 8])
def test_every_shape_gets_a_page(image_of, size, scale_factor):
    image = packed(image_of(*size), scale_factor)
    page = draw_page(image, "picture.png", 0, even(scale_factor, heads=16))
    assert page.width > 3 * PANEL
    assert draw_page(image, "picture.png").width < 3 * PANEL


def white_beside_blue() -> Image.Image:
    """Two tiles side by side, each of one colour."""
    image = Image.new("RGB", (64, 32), "white")
    image.paste("blue", (32, 0, 64, 32))
    return image


def test_a_window_at_the_edge_of_a_tile_does_not_reach_into_the_next_tile():
    image = packed(white_beside_blue(), scale_factor=5)  # 8 patches: windows of 5 and 3
    assert image.layout.tile_grid == TileGrid(1, 2)
    token = 1  # in the upper right corner of the white tile
    assert image.window_patches(image.source(token)) == (5, 3)
    assert image.source(token).box == (0, 20, 20, 32)
    weights = np.zeros((2, 5, 3))
    weights[:, 0, 0] = 1
    panel = draw_attention(image, token, weights)
    row, cell = PANEL // 4 + 10, PANEL / 2 / 5
    colours = [panel.getpixel((round(PANEL / 4 + cell * (col + 0.2)), row)) for col in range(5)]
    assert colours[0][2] < 100  # the wash
    assert colours[1] == colours[2] == (255, 255, 255)
    assert colours[3] == colours[4] == (140, 140, 255)  # the next tile, pale: no part of the window
    frame = draw_tokens(image)
    assert frame.getpixel((PANEL * 6 // 16, 20)) == (255, 255, 255)


def test_weights_of_patches_that_do_not_exist_are_refused():
    image = packed(white_beside_blue(), scale_factor=5)
    with pytest.raises(ValueError, match="weights are of 5x5 patches, but the window of token 1 has 5x3"):
        draw_attention(image, 1, even(5))


def test_a_separator_has_nothing_to_show(image_of):
    with pytest.raises(ValueError, match="token 16 is a separator"):
        draw_attention(packed(image_of(32, 32)), 16, even(2))

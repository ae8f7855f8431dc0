import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpacker.tiling import TileGrid, TileView, choose_tile_grid, fit_within, make_tiles, slice_views, tile_grids

sides = st.integers(min_value=1, max_value=5000)


@pytest.mark.parametrize("limit", [9, 16, 25])
def test_the_released_list_chooses_what_the_original_chose(golden, limit):
    rows = json.loads((golden / "hd" / "grid_choice.json").read_text())[str(limit)]["rows"]
    for height, width, *expected in rows:
        chosen = choose_tile_grid((height, width), (336, 336), limit, grid_list="released")
        assert [chosen.rows, chosen.cols] == expected, (height, width)


def test_the_released_list_chooses_what_the_original_chose_for_lines_of_pixels(golden):
    """Where the original went on to fail on a thumbnail of no height, its message tells the canvas it had chosen."""
    extreme = json.loads((golden / "hd" / "images.json").read_text())["extreme"]
    for case in extreme:
        told = case["slice"]
        canvas = re.search(r"input \(H: (\d+), W: (\d+)\)", told.get("error", ""))
        expected = [int(side) // 336 for side in canvas.groups()] if canvas else [told["h_block"], told["w_block"]]
        chosen = choose_tile_grid((case["h"], case["w"]), (336, 336), 9, grid_list="released")
        assert [chosen.rows, chosen.cols] == expected, case


def released_score(height, width, grid):
    """The score as the original computes it: float32, step by step."""
    canvas = np.float32([grid.rows * 336, grid.cols * 336])
    height, width, area = np.float32(height), np.float32(width), canvas.prod()
    ratio = min(canvas[0] / height, canvas[1] / width)
    large = np.float32(1.4) * np.float32([height, width])
    shared = np.minimum(canvas, large).prod()
    return np.round(height * ratio) * np.round(width * ratio) / area + np.float32(0.1) * shared / (
        area + large.prod() - shared
    )


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from([9, 16, 25]))
def test_any_size_gets_the_grid_of_the_originals_arithmetic(height, width, limit):
    grids = tile_grids(limit, "released")
    scores = [released_score(height, width, grid) for grid in grids]
    chosen = choose_tile_grid((height, width), (336, 336), limit, "released")
    # below 1e-6 the original's own float32 decides by rounding
    assert max(scores) - scores[grids.index(chosen)] < 1e-6


def test_a_side_too_thin_for_a_canvas_fills_nothing_of_it():
    """1 x 7000 in 1 x 9 tiles would be 0.4 pixels high; twelve columns of two rows make it 0.6, which rounds to 1."""
    assert choose_tile_grid((1, 7000), (336, 336), 25, "released") == TileGrid(2, 12)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.integers(1, 30))
def test_a_chosen_grid_stays_within_the_limit(height, width, limit):
    grid = choose_tile_grid((height, width), (336, 336), limit)
    assert grid.rows * grid.cols <= limit
    assert grid.num_tiles == grid.rows * grid.cols + (grid.rows * grid.cols > 1)


@settings(max_examples=300, deadline=None)
@given(sides, sides, sides, sides)
def test_a_fitted_image_touches_the_canvas_and_stays_within(height, width, canvas_height, canvas_width):
    fitted = fit_within((height, width), (canvas_height, canvas_width))
    assert fitted[0] == canvas_height or fitted[1] == canvas_width
    assert 1 <= fitted[0] <= canvas_height
    assert 1 <= fitted[1] <= canvas_width


def test_all_grids_within_the_limit_are_tried():
    assert len(tile_grids(9)) == len({(r, c) for r in range(1, 10) for c in range(1, 10) if r * c <= 9})


def test_the_released_lists_have_no_line_longer_than_nine():
    assert tile_grids(9, "released") == tile_grids(9)
    assert [len(tile_grids(limit, "released")) for limit in (16, 25)] == [36, 55]
    left_out = set(tile_grids(25)) - set(tile_grids(25, "released"))
    assert left_out == {TileGrid(*grid) for n in range(10, 26) for grid in ((1, n), (n, 1))}


def test_a_panorama_shows_the_difference_between_the_lists():
    assert choose_tile_grid((336, 4032), (336, 336), 16) == TileGrid(1, 12)
    assert choose_tile_grid((336, 4032), (336, 336), 16, "released") == TileGrid(1, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_tile_grid((0, 5), (336, 336)), "image size 0x5 has a side below 1"),
        (lambda: choose_tile_grid((5, 5), (336, 336), 0), "max_tiles=0 must be at least 1"),
        (lambda: TileGrid(0, 1), "tile grid 0x1"),
        (lambda: tile_grids(9, "paper"), "grid_list='paper' is unknown; use 'all' or 'released'"),
    ],
)
def test_sizes_below_one_and_unknown_lists_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tiles_put_together_are_the_image_where_it_fits_exactly():
    image = torch.rand(3, 16, 24)
    tiles = make_tiles(image, TileGrid(2, 3), (8, 8))
    assert tiles.shape == (7, 3, 8, 8)
    rows = [torch.cat(list(tiles[start : start + 3]), dim=2) for start in (0, 3)]
    assert torch.equal(torch.cat(rows, dim=1), image)


def test_one_tile_brings_no_thumbnail():
    assert make_tiles(torch.rand(3, 8, 8), TileGrid(1, 1), (8, 8)).shape == (1, 3, 8, 8)


def test_padding_lies_to_the_right_and_below_and_is_zero():
    tiles = make_tiles(torch.ones(3, 8, 12), TileGrid(1, 2), (8, 8))
    assert (tiles[0] == 1).all()
    assert (tiles[1, :, :, :4] == 1).all()
    assert (tiles[1, :, :, 4:] == 0).all()
    assert (tiles[2, :, 5:] == 0).all()  # thumbnail: 8 x 12 fits as 5 x 8


def test_the_thumbnail_of_the_image_is_not_squeezed_by_the_padding():
    image = torch.ones(3, 8, 12)
    sound = make_tiles(image, TileGrid(1, 2), (8, 8))[-1]
    released = make_tiles(image, TileGrid(1, 2), (8, 8), thumbnail_source="canvas", antialias=False)[-1]
    assert (sound[0, 0] == 1).all()
    assert (released[0, 0, 6:] < 1).all()  # a quarter of the padded canvas is padding


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2)])
def test_extreme_shapes_still_give_tiles(size):
    grid = choose_tile_grid(size, (8, 8))
    tiles = make_tiles(torch.rand(3, *size), grid, (8, 8))
    assert tiles.shape == (grid.num_tiles, 3, 8, 8)
    assert tiles.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 200), st.integers(8, 200), st.integers(0, 10**6))
def test_views_tell_where_a_tiles_pixels_come_from(height, width, seed):
    """An image whose channels are its own coordinates: what a tile holds is where it comes from."""
    size, tile = (height, width), (16, 16)
    y = (torch.arange(height) + 0.5)[:, None].expand(size)
    x = (torch.arange(width) + 0.5)[None, :].expand(size)
    grid = choose_tile_grid(size, tile)
    tiles = make_tiles(torch.stack([y, x, torch.ones(size)]), grid, tile, antialias=False)
    views = slice_views(size, grid, tile)
    assert len(views) == len(tiles)
    generator = torch.Generator().manual_seed(seed)
    for pixels, view in zip(tiles, views, strict=True):
        row, col = torch.randint(0, 16, (2,), generator=generator).tolist()
        if pixels[2, row, col] != 1:  # padding
            continue
        expected_y = (row + 0.5) * view.scale[0] + view.offset[0]
        expected_x = (col + 0.5) * view.scale[1] + view.offset[1]
        # interpolation clamps at the border: half a source pixel, or half a tile pixel when shrinking
        assert abs(pixels[0, row, col] - expected_y) <= max(0.5, view.scale[0] / 2) + 1e-3
        assert abs(pixels[1, row, col] - expected_x) <= max(0.5, view.scale[1] / 2) + 1e-3


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3024), st.integers(0, 300))
def test_a_masks_nearest_pixels_are_those_of_torch_and_padding_is_marked(length, fitted, padding):
    view = TileView((length / fitted, 1.0), (0.0, 0.0))
    pixels = torch.arange(length, dtype=torch.float32)[None, None]  # float64 is resized by other places than 8 bits are
    expected = torch.nn.functional.interpolate(pixels, size=fitted, mode="nearest")[0, 0].long()
    nearest = view.nearest(0, fitted + padding, length)
    assert torch.equal(nearest[:fitted], expected)
    assert (nearest[fitted:] == -1).all()


def test_spans_of_cells_lie_where_the_tiles_pixels_come_from():
    view = TileView((0.5, 2.0), (10.0, -4.0))
    assert view.spans(0, torch.tensor([0, 14]), 14).tolist() == [[10.0, 17.0], [17.0, 24.0]]
    assert view.spans(1, torch.tensor([0, 14]), 14).tolist() == [[-4.0, 24.0], [24.0, 52.0]]

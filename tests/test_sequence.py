import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpacker import ImageLayout, TileGrid, max_tiles_for_budget, plan_layout, scatter_image_tokens
from tokenpacker.tiling import slice_views

IMAGE, COMMA, NEWLINE = 7, 8, 9


def test_the_order_is_tiles_row_by_row_then_the_thumbnail():
    ids = ImageLayout(TileGrid(2, 2), (1, 2)).token_ids(IMAGE, COMMA, NEWLINE)
    row = [7, 7, 8, 7, 7, 9]
    assert ids == [*row, *row, 7, 7, 9]


def test_a_single_tile_is_closed_by_the_row_separator():
    assert ImageLayout(TileGrid(1, 1), (1, 2)).token_ids(IMAGE, COMMA, NEWLINE) == [7, 7, 9]


def test_an_image_in_one_piece_has_no_separators():
    layout = plan_layout((480, 640), (336, 336), (12, 12), sliced=False)
    assert layout.token_ids(IMAGE, COMMA, NEWLINE) == [7] * 144
    assert layout.num_tokens == 144


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 25), st.sampled_from([(12, 12), (8, 8), (6, 6)]))
def test_the_count_is_the_length_and_equals_n_times_t_plus_one(height, width, max_tiles, token_grid):
    layout = plan_layout((height, width), (336, 336), token_grid, max_tiles=max_tiles)
    ids = layout.token_ids(IMAGE, COMMA, NEWLINE)
    assert layout.num_tokens == len(ids) == layout.tile_grid.num_tiles * (layout.tokens_per_tile + 1)
    assert ids.count(IMAGE) == layout.tile_grid.num_tiles * layout.tokens_per_tile
    assert ids.count(NEWLINE) == layout.tile_grid.rows + layout.tile_grid.has_thumbnail


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(37, 1500))
def test_a_budget_is_never_exceeded_and_buys_no_less_than_a_larger_limit_would(height, width, budget):
    layout = plan_layout((height, width), (336, 336), (6, 6), max_image_tokens=budget)
    assert layout.num_tokens <= budget
    unlimited = plan_layout((height, width), (336, 336), (6, 6))
    if unlimited.num_tokens <= budget:
        assert layout == unlimited


def test_a_budget_too_small_for_one_tile_says_so():
    with pytest.raises(ValueError, match="max_image_tokens=100 is too small: one tile costs 145 tokens"):
        plan_layout((480, 640), (336, 336), (12, 12), max_image_tokens=100)
    with pytest.raises(ValueError, match="an image in one piece costs 144 tokens"):
        plan_layout((480, 640), (336, 336), (12, 12), sliced=False, max_image_tokens=100)


def test_a_budget_leaves_grids_out_of_the_released_list_too():
    size, tile = (336, 5040), (336, 336)
    assert plan_layout(size, tile, (12, 12), max_tiles=16).tile_grid == TileGrid(1, 15)
    assert plan_layout(size, tile, (12, 12), max_tiles=16, grid_list="released").tile_grid == TileGrid(1, 9)
    bound = plan_layout(size, tile, (12, 12), max_tiles=16, max_image_tokens=5 * 145, grid_list="released")
    assert bound.tile_grid == TileGrid(1, 4)
    assert bound.num_tokens == 5 * 145


@pytest.mark.parametrize(("budget", "tiles"), [(145, 1), (289, 1), (290, 1), (434, 1), (435, 2), (1450, 9)])
def test_two_tiles_cost_three_because_of_the_thumbnail(budget, tiles):
    assert max_tiles_for_budget(budget, 144) == tiles


def test_every_token_names_the_pixels_it_shows():
    size, tile = (672, 1008), (336, 336)
    layout = plan_layout(size, tile, (12, 12))
    assert layout.tile_grid == TileGrid(2, 3)
    views = slice_views(size, layout.tile_grid, tile)

    def source(index):
        return layout.source(index, views, (28, 28), tile, size)

    assert source(0).box == (0, 0, 28, 28)
    assert source(144) is None  # the comma
    assert source(145).box == (0, 336, 28, 364)
    assert source(3 * 145).box == (336, 0, 364, 28)
    thumbnail = source(6 * 145)
    assert thumbnail.is_thumbnail
    assert thumbnail.box == pytest.approx((0, 0, 84, 84))
    with pytest.raises(IndexError, match="token 1015 does not exist; the image has 1015 tokens"):
        source(1015)


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 2000), st.integers(20, 2000), st.sampled_from([2, 5, 7]))
def test_the_tiles_tokens_together_show_every_pixel_once(height, width, scale_factor):
    side = -(-24 // scale_factor)
    layout = plan_layout((height, width), (336, 336), (side, side))
    views = slice_views((height, width), layout.tile_grid, (336, 336))
    window = (14 * scale_factor, 14 * scale_factor)
    sources = [layout.source(i, views, window, (336, 336), (height, width)) for i in range(layout.num_tokens)]
    boxes = [source.box for source in sources if source and source.box and not source.is_thumbnail]
    area = sum((bottom - top) * (right - left) for top, left, bottom, right in boxes)
    assert area == pytest.approx(height * width)


@st.composite
def mixed_layouts(draw):
    """A layout whose tiles have different scale factors of 8x8 patches, and these factors."""
    grid = TileGrid(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    factors = draw(st.lists(st.integers(1, 8), min_size=grid.num_tiles, max_size=grid.num_tiles))
    separators = grid.has_thumbnail or draw(st.booleans())
    return ImageLayout(grid, [(-(-8 // factor),) * 2 for factor in factors], separators), factors


@settings(max_examples=200, deadline=None)
@given(mixed_layouts())
def test_tiles_of_different_scale_factors_are_counted_placed_and_found_again(case):
    layout, factors = case
    grid, size, tile = layout.tile_grid, (96, 80), (32, 32)
    views = slice_views(size, grid, tile)
    expected, ids = [], []  # slowly: tile by tile, token by token
    for number, factor in enumerate(factors):
        side = 4 * factor  # a patch has 4x4 pixels
        for row in range(0, 8, factor):
            for col in range(0, 8, factor):
                box = (row * 4, col * 4, min(row * 4 + side, 32), min(col * 4 + side, 32))
                box = views[number].to_image(box, size)
                expected.append((number, row // factor, col // factor, box))
                ids.append(IMAGE)
        if layout.separators:
            expected.append(None)
            in_row = number < grid.rows * grid.cols and (number + 1) % grid.cols
            ids.append(COMMA if in_row else NEWLINE)
    assert layout.token_ids(IMAGE, COMMA, NEWLINE) == ids
    assert layout.num_tokens == len(ids)
    assert sum(layout.tile_tokens) == ids.count(IMAGE)
    windows = [(4 * factor, 4 * factor) for factor in factors]
    found = [layout.source(index, views, windows, tile, size) for index in range(layout.num_tokens)]
    assert [source and (source.tile, source.row, source.col, source.box) for source in found] == expected


def test_a_layout_of_equal_tiles_has_one_token_grid_and_another_says_where_to_look():
    assert ImageLayout(TileGrid(1, 2), [(2, 3)] * 3) == ImageLayout(TileGrid(1, 2), (2, 3))
    assert ImageLayout(TileGrid(1, 2), [(2, 3)] * 3).tokens_per_tile == 6
    mixed = ImageLayout(TileGrid(1, 2), [(2, 3), (1, 1), (2, 3)])
    assert mixed.tile_tokens == [6, 1, 6]
    for name in ("token_grid", "tokens_per_tile"):
        with pytest.raises(ValueError, match="different scale factors; read token_grids, or tile_tokens, of each tile"):
            getattr(mixed, name)


def test_token_grids_of_tiles_must_be_as_many_as_the_tiles_and_fit_the_budget():
    grids = [(12, 12), (6, 6), (4, 4)]
    layout = plan_layout((336, 672), (336, 336), grids, max_image_tokens=200)
    assert (layout.tile_grid, layout.num_tokens) == (TileGrid(1, 2), 145 + 37 + 17)
    with pytest.raises(ValueError, match="max_image_tokens=198 is too small: the image costs 199 tokens"):
        plan_layout((336, 672), (336, 336), grids, max_image_tokens=198)
    with pytest.raises(ValueError, match="2 scale factors were given for the 3 tiles of an image, a grid of 1x2 and"):
        plan_layout((336, 672), (336, 336), grids[:2])


@pytest.mark.parametrize("value", [0, -1, 2.5, float("nan"), "9", True])
@pytest.mark.parametrize("name", ["max_tiles", "max_image_tokens"])
def test_limits_that_are_no_number_of_anything_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an integer of at least 1"):
        plan_layout((336, 336), (336, 336), (6, 6), **{name: value})


def test_packed_tokens_go_to_their_places_in_order():
    ids = torch.tensor([[1, 7, 7, 8], [7, 2, 7, 9]])
    embeddings = torch.zeros(2, 4, 3)
    packed = torch.arange(1, 5).reshape(2, 2, 1).expand(2, 2, 3).float()
    placed = scatter_image_tokens(embeddings, ids, packed, IMAGE)
    assert placed[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 4, 0]]


def test_a_mismatch_names_both_counts():
    with pytest.raises(ValueError, match="3 image tokens but the images give 4 packed tokens"):
        scatter_image_tokens(torch.zeros(1, 4, 3), torch.tensor([[7, 7, 7, 1]]), torch.zeros(1, 4, 3), IMAGE)


def test_a_loss_on_an_image_token_reaches_only_its_own_packed_token():
    packed = torch.randn(2, 2, 3, requires_grad=True)
    placed = scatter_image_tokens(torch.zeros(1, 6, 3), torch.tensor([[1, 7, 7, 8, 7, 7]]), packed, IMAGE)
    placed[0, 4].sum().backward()
    assert packed.grad.abs().sum(-1).tolist() == [[0, 0], [3, 0]]

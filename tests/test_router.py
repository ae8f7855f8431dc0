"""Each tile's scale factor by its pixels, before any model runs."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenpacker.router import Router, own_router, tile_details
from tokenpacker.tiling import TileGrid, make_tiles, slice_views

COSTS = {2: 37, 4: 10, 12: 2}
ROUTER = Router(scale_factors=(2, 4, 12), detail=(0.2, 0.1), thumbnail_detail=(0.4, 0.0))


def details_of(image: torch.Tensor, grid: TileGrid, side: int = 8) -> list[float]:
    size = (image.shape[1], image.shape[2])
    return tile_details(make_tiles(image, grid, (side, side)), slice_views(size, grid, (side, side)), size)


def test_less_detail_means_a_larger_scale_factor_and_thumbnails_have_their_own_thresholds():
    assert ROUTER.choose([0.3, 0.2, 0.15, 0.05, 0.05], COSTS) == [2, 2, 4, 12, 4]
    assert ROUTER.choose([0.05], COSTS) == [12]  # one tile alone is no thumbnail
    assert ROUTER.choose([0.3, 0.0], COSTS) == [2, 12]  # a thumbnail of nothing


def test_detail_is_the_mean_difference_of_neighbours():
    image = torch.zeros(3, 8, 8)
    image[:, :, 1::2] = 1  # columns differ by 1, rows are alike
    assert details_of(image, TileGrid(1, 1)) == [0.5]
    assert details_of(image.transpose(1, 2) * 3, TileGrid(1, 1)) == [1.5]


def test_blank_and_padded_tiles_have_no_detail_whatever_their_colour():
    assert details_of(torch.full((3, 8, 8), 2.5), TileGrid(2, 2)) == [0.0] * 5  # flat, and not the colour of padding
    tall = torch.rand(3, 16, 8)
    shown, padding = details_of(tall, TileGrid(1, 3))[0], details_of(tall, TileGrid(1, 3))[1:3]
    assert shown > 0
    assert padding == [0.0, 0.0]


def test_the_border_of_the_padding_is_no_detail():
    assert details_of(torch.full((3, 8, 4), 9.0), TileGrid(1, 1)) == [0.0]


def test_the_detail_is_the_same_with_any_number_of_threads_of_torch_and_of_callers():
    images = [torch.randn(3, 200, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def all_details(_=None):
        return [details_of(image, TileGrid(2, 3), side=96) for image in images]

    before = torch.get_num_threads()
    try:
        alone = [(torch.set_num_threads(count), all_details())[1] for count in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(all_details, range(8))) == [alone[0]] * 8
    assert alone == [alone[0]] * 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 200))
def test_a_budget_holds_and_coarsens_no_more_than_it_must(details, room):
    free = ROUTER.choose(details, COSTS)
    budget = 2 * len(details) + room
    chosen = ROUTER.choose(details, COSTS, budget)
    spent = sum(COSTS[factor] for factor in chosen)
    assert spent <= budget
    assert chosen == ROUTER.choose(details, COSTS, budget)
    assert all(own >= wanted for own, wanted in zip(chosen, free, strict=True))
    if sum(COSTS[factor] for factor in free) <= budget:
        assert chosen == free
    else:  # the last step was needed: it saved 27 tokens at most
        assert spent > budget - 27


def test_under_a_budget_the_tile_with_least_detail_loses_its_tokens_first():
    assert ROUTER.choose([0.9, 0.3, 0.5, 0.1], COSTS, 100) == [2, 4, 2, 4]


def test_reasons_name_the_detail_and_the_threshold_or_the_budget():
    details = [0.3, 0.15, 0.05, 0.9]
    assert ROUTER.reasons(details, [2, 4, 12, 4]) == (
        "detail 0.3000 >= 0.2000",
        "detail 0.1500 < 0.2000",
        "detail 0.0500 < 0.1000",
        "detail 0.9000, and the budget",
    )


def test_a_dict_gives_the_router_back():
    assert Router.from_dict(ROUTER.to_dict()) == ROUTER


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "router={} must have exactly the keys scale_factors, detail, thumbnail_detail"),
        ([1], "router=[1] must have exactly the keys"),
        (ROUTER.to_dict() | {"detail": 3}, "must hold lists of numbers"),
        (ROUTER.to_dict() | {"detail": [0.1]}, "router.detail=[0.1] must have a threshold of at least 0 for each"),
        (ROUTER.to_dict() | {"detail": [0.1, 0.2]}, "none above the one before"),
        (ROUTER.to_dict() | {"detail": [0.1, float("nan")]}, "must have a threshold of at least 0"),
        (ROUTER.to_dict() | {"scale_factors": [4, 2, 12]}, "must be two or more that rise"),
        (ROUTER.to_dict() | {"scale_factors": [0, 2, 12]}, "router.scale_factors=0 must be an integer of at least 1"),
        (None, "this one has no router in its processor_config.json; give a number, or fit them as docs/auto.md shows"),
    ],
)
def test_a_router_that_cannot_be_is_refused(content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        own_router(content)

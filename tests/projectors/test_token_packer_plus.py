"""Every option of TokenPackerPlus against what it is said to do, and none of them against TokenPacker."""

import pytest
import torch
from benchmarks.token_packer_plus import TokenPackerPlus, TokenPackerPlusConfig
from torch.nn import functional as F

from tokenpacker import VisionFeatures
from tokenpacker.projectors import build

WIDTHS = {"vision_dim": 16, "language_dim": 24, "num_levels": 3, "num_heads": 4}
OPTIONS = [
    {"dense_query": True},
    {"window_position": True},
    {"window_margin": 1},
    {"global_token": True},
    {"query_level": 0},
    {"dense_query": True, "window_position": True, "window_margin": 2, "global_token": True, "query_level": 1},
]


def features(grid=(6, 6), num_tiles=2):
    length = grid[0] * grid[1]
    return VisionFeatures(torch.randn(num_tiles, length, 16), torch.randn(num_tiles, length, 48), grid)


def plus(**options):
    projector = TokenPackerPlus(TokenPackerPlusConfig(**WIDTHS, **options))
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return projector


def without_options(projector):
    """TokenPacker with the weights that both have."""
    original = build({"name": "token-packer", **WIDTHS})
    original.load_state_dict({name: projector.state_dict()[name] for name in original.state_dict()})
    return original


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_without_options_it_is_token_packer_bit_by_bit(scale):
    projector, inputs = plus(), features((5, 7))
    assert torch.equal(projector(inputs, scale), without_options(projector)(inputs, scale))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_changes_the_result_and_its_weights_learn(options):
    projector, inputs = plus(**options), features()
    packed = projector(inputs)
    assert packed.shape == (2, 9, 24)
    assert (packed - without_options(projector)(inputs)).abs().max() > 1e-3
    packed.square().mean().backward()
    assert [name for name, weight in projector.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_the_weights_of_a_token_sum_to_one_over_what_there_is(options, grid):
    weights = plus(**options).attention_weights(features(grid))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


def patches_that_matter(projector, inputs, token):
    """First and last row and column of the patches whose levels change one packed token."""
    levels = inputs.levels.clone().requires_grad_()
    projector(VisionFeatures(inputs.query, levels, inputs.patch_grid))[0, token].square().sum().backward()
    there = levels.grad[0].any(-1).unflatten(0, inputs.patch_grid).nonzero()
    return there.min(0).values.tolist(), there.max(0).values.tolist()


@pytest.mark.parametrize(("margin", "first", "last"), [(0, [2, 2], [3, 3]), (1, [1, 1], [4, 4]), (2, [0, 0], [5, 5])])
def test_a_window_reaches_as_far_as_its_margin(margin, first, last):
    inputs = features((8, 8), num_tiles=1)
    assert patches_that_matter(plus(window_margin=margin), inputs, token=5) == (first, last)


def test_a_margin_ends_where_the_image_ends():
    inputs = features((8, 8), num_tiles=1)
    assert patches_that_matter(plus(window_margin=1), inputs, token=0) == ([0, 0], [2, 2])


def test_wide_windows_hold_the_patches_around_them():
    projector, inputs = plus(window_margin=1), features((4, 4), num_tiles=1)
    windows = projector._wide_windows(inputs.levels, (4, 4), 2)  # (16, 1, 4, 48)
    image = F.pad(inputs.levels.unflatten(1, (4, 4)), (0, 0, 1, 1, 1, 1))  # (1, 6, 6, 48)
    assert torch.equal(windows[:, 0, 3], image[0, 2:6, 2:6].flatten(0, 1))


def test_the_global_token_is_of_the_whole_tile():
    inputs = features((8, 8), num_tiles=1)
    assert patches_that_matter(plus(global_token=True), inputs, token=5) == ([0, 0], [7, 7])


def test_a_position_tells_equal_patches_apart():
    alike = VisionFeatures(torch.randn(1, 1, 16).expand(1, 36, 16), torch.randn(1, 1, 48).expand(1, 36, 48), (6, 6))
    assert plus().attention_weights(alike).std(-1).max() < 1e-6
    assert plus(window_position=True).attention_weights(alike).std(-1).min() > 1e-3


def test_the_query_is_read_from_the_level_that_is_named():
    projector, inputs = plus(query_level=1), features()
    read = VisionFeatures(torch.zeros_like(inputs.query), inputs.levels, inputs.patch_grid)
    named = VisionFeatures(inputs.levels.chunk(3, dim=-1)[1], inputs.levels, inputs.patch_grid)
    assert torch.equal(projector(read), without_options(projector)(named))


@pytest.mark.parametrize("options", [{"window_margin": -1}, {"window_margin": 0.5}, {"query_level": 3}])
def test_settings_that_mean_nothing_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        plus(**options)

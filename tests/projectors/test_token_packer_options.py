"""Several queries per window, the dense query and linear skips, against what they are said to compute."""

import pytest
import torch
from torch.nn import functional as F

from tokenpacker import TokenPacker, TokenPackerProjectorConfig, VisionFeatures
from tokenpacker.projectors import RECOMMENDED_TOKEN_PACKER, build, config_from_dict
from tokenpacker.projectors.token_packer import coarse_query, query_mask

WIDTHS = {"vision_dim": 16, "language_dim": 24, "num_levels": 3, "num_heads": 4}


def features(grid, num_tiles=2):
    length = grid[0] * grid[1]
    return VisionFeatures(torch.randn(num_tiles, length, 16), torch.randn(num_tiles, length, 48), grid)


def packer(**options):
    projector = TokenPacker(TokenPackerProjectorConfig(**WIDTHS, **options))
    for parameter in projector.parameters():  # biases too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return projector.requires_grad_(False)


def plain(projector):
    """The paper's TokenPacker with the weights of `projector` that it knows, without its output MLP."""
    paper = packer()
    own = {name: weight for name, weight in projector.state_dict().items() if not name.startswith("output_mlp")}
    paper.load_state_dict({name: own.get(name, weight) for name, weight in paper.state_dict().items()})
    paper.output_mlp = torch.nn.Identity()
    return paper


@pytest.mark.parametrize(("grid", "scale", "side"), [((8, 12), 4, 2), ((6, 6), 6, 3), ((4, 6), 2, 2)])
def test_queries_that_divide_a_window_are_the_windows_of_a_smaller_scale_joined(grid, scale, side):
    projector, inputs = packer(queries_per_side=side), features(grid)
    parts = plain(projector)(inputs, scale // side).unflatten(1, (grid[0] * side // scale, -1))  # (N, h', w', C)
    joined = F.pixel_unshuffle(parts.permute(0, 3, 1, 2), side)  # (N, C*q*q, rows, cols), the channel before the part
    joined = joined.unflatten(1, (16, -1)).transpose(1, 2).flatten(1, 2).flatten(2).transpose(1, 2)  # (N, T, q*q*C)
    torch.testing.assert_close(projector(inputs, scale), projector.output_mlp(joined), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_a_dense_query_reads_all_levels_and_what_it_absorbs_is_added_to_it(grid):
    projector, inputs = packer(dense_query=True), features(grid)
    read = projector.query_proj(coarse_query(inputs.query, grid, 2))
    read = projector.query_norm(read + projector.dense_proj(coarse_query(inputs.levels, grid, 2)))
    absorbing = plain(projector)
    absorbing.query_norm.register_forward_hook(lambda *_: read)  # the paper's absorption, with that query
    expected = projector.output_mlp(absorbing(inputs) + read)
    torch.testing.assert_close(projector(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_values_and_output_have_a_straight_line_beside_their_mlp(grid):
    projector, inputs = packer(linear_skips=True), features(grid)
    values = projector.value_mlp(inputs.levels) + projector.value_skip(inputs.levels)
    absorbing = plain(projector)
    absorbing.value_mlp.register_forward_hook(lambda *_: values)
    absorbed = absorbing(inputs)
    expected = projector.output_mlp(absorbed) + projector.output_skip(absorbed)
    torch.testing.assert_close(projector(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (9, 4)])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_every_query_shares_itself_out_over_patches_of_its_own_part(side, grid, scale):
    projector = packer(queries_per_side=side, dense_query=True, linear_skips=True)
    num_tokens = projector.config.num_tokens(grid, scale)
    assert projector(features(grid), scale).shape == (2, num_tokens, 24)
    weights = projector.attention_weights(features(grid), scale)
    assert weights.shape == (2, num_tokens, side * side * 4, scale * scale)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    cols = -(-grid[1] // scale)
    for token in range(num_tokens):
        for query in range(side * side):
            seen = patches_of_a_part(grid, scale, side, divmod(token, cols), divmod(query, side))
            own = weights[:, token, query * 4 : (query + 1) * 4]
            assert (own[..., seen] > 0).all()
            torch.testing.assert_close(own[..., seen].sum(-1), torch.ones(2, 4))


def patches_of_a_part(grid, scale, side, window, part):
    """The places of a window that a query sees; the whole window if its part lies beyond the grid."""
    places = [divmod(place, scale) for place in range(scale * scale)]
    there = [all(window[axis] * scale + place[axis] < grid[axis] for axis in (0, 1)) for place in places]
    own = [
        all(
            place[axis] / scale < (part[axis] + 1) / side and (place[axis] + 1) / scale > part[axis] / side
            for axis in (0, 1)
        )
        for place in places
    ]
    seen = [place for place in range(scale * scale) if there[place] and own[place]]
    return seen or [place for place in range(scale * scale) if there[place]]


def test_one_query_needs_no_mask_where_the_grid_is_whole():
    assert query_mask((6, 6), 2, 1, torch.device("cpu")) is None
    assert query_mask((6, 6), 2, 2, torch.device("cpu")).shape == (1, 4, 4)


def test_the_recommended_settings_make_a_projector_of_every_scale_factor():
    projector = build({**RECOMMENDED_TOKEN_PACKER, **WIDTHS})
    assert projector(features((12, 12), num_tiles=0)).shape == (0, 36, 24)
    assert [projector(features((12, 12)), scale).shape[1] for scale in (1, 2, 3, 5, 12)] == [144, 36, 16, 9, 1]
    assert projector.config.beyond_the_paper == "queries_per_side=2, linear_skips=True"


def test_a_config_from_before_the_options_is_the_papers():
    config = config_from_dict({"name": "token-packer", **WIDTHS, "scale_factor": 2})
    assert (config.queries_per_side, config.dense_query, config.beyond_the_paper) == (1, False, "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"queries_per_side": 2}, "queries_per_side=2"),
        ({"dense_query": True}, "dense_query=True"),
        ({"linear_skips": True}, "linear_skips=True"),
    ],
)
def test_fold_refuses_an_option_by_name(options, named):
    with pytest.raises(ValueError, match=f"fold knows the paper's TokenPacker, not {named}; use the projector"):
        packer(**options).fold()


@pytest.mark.parametrize(
    "options", [{"queries_per_side": 0}, {"queries_per_side": 1.5}, {"dense_query": 1}, {"linear_skips": 1}]
)
def test_settings_that_mean_nothing_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        packer(**options)

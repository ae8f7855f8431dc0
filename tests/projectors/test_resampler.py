"""The resampler against stock attention and sine positions written out, and against the published size."""

import math

import pytest
import torch

from tokenpacker import VisionFeatures
from tokenpacker.projectors import Resampler, ResamplerConfig
from tokenpacker.projectors.resampler import sine_positions


def random_resampler(**kwargs):
    defaults = {"vision_dim": 8, "language_dim": 16, "query_grid": (2, 3), "num_heads": 4}
    resampler = Resampler(ResamplerConfig(**(defaults | kwargs)))
    for parameter in resampler.parameters():  # biases and norms too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.5)
    return resampler


def stock_attention(resampler):
    """`nn.MultiheadAttention` with the resampler's weights; it holds the projections of its inputs in one tensor."""
    dim = resampler.config.language_dim
    attention = torch.nn.MultiheadAttention(dim, resampler.config.attention_heads, batch_first=True)
    inputs = [resampler.query_proj, resampler.key_proj, resampler.value_proj]
    attention.in_proj_weight.data = torch.cat([layer.weight for layer in inputs])
    attention.in_proj_bias.data = torch.cat([layer.bias for layer in inputs])
    attention.out_proj.load_state_dict(resampler.attention_proj.state_dict())
    return attention


def slow_position(row, col, dim):
    angles = [[place / 10_000 ** (i / (dim // 4)) for i in range(dim // 4)] for place in (col, row)]
    return torch.tensor([wave(angle) for half in angles for wave in (math.sin, math.cos) for angle in half])


def test_positions_are_sines_of_places_on_the_query_grid():
    queries = torch.stack([slow_position(row, col, 16) for row in range(2) for col in range(3)])
    torch.testing.assert_close(sine_positions((2, 3), (2, 3), torch.empty(16)), queries)
    # four by six patches over two by three queries: the first patch's centre lies a quarter before the first query's
    patches = torch.stack([slow_position(row / 2 - 0.25, col / 2 - 0.25, 16) for row in range(4) for col in range(6)])
    torch.testing.assert_close(sine_positions((4, 6), (2, 3), torch.empty(16)), patches)


def test_each_query_attends_to_all_patches_by_what_they_hold_and_where_they_lie():
    resampler, query = random_resampler(), torch.randn(2, 24, 8)
    patches = resampler.patch_norm(resampler.patch_proj(query))
    queries = resampler.query_norm(resampler.queries) + sine_positions((2, 3), (2, 3), patches)
    keys = patches + sine_positions((4, 6), (2, 3), patches)
    attended, _ = stock_attention(resampler)(queries.expand(2, -1, -1), keys, patches)
    expected = resampler.output_proj(resampler.output_norm(attended))
    torch.testing.assert_close(resampler(VisionFeatures(query, query, (4, 6))), expected, atol=1e-5, rtol=1e-4)


def test_patches_that_change_places_change_the_tokens():
    resampler, query = random_resampler(), torch.randn(1, 24, 8)
    moved = query.flip(1)
    before, after = (resampler(VisionFeatures(tokens, tokens, (4, 6))) for tokens in (query, moved))
    assert (before - after).abs().max() > 1e-2


def test_it_is_as_large_as_published():
    with torch.device("meta"):
        resampler = Resampler(ResamplerConfig(vision_dim=1664, language_dim=4096, query_grid=(16, 16)))
    assert resampler.config.attention_heads == 32
    size = sum(p.numel() for p in resampler.parameters()) - resampler.output_proj.weight.numel()
    assert round(size / 1e9, 2) == 0.08  # the adapter of Qwen-VL's table 1, which leaves the last linear to the tower


@pytest.mark.parametrize("grid", [(24, 24), (12, 12), (5, 7)])
def test_it_gives_as_many_tokens_as_it_has_queries_from_any_patch_grid(grid):
    config = ResamplerConfig(vision_dim=8, language_dim=16, query_grid=(4, 6))
    assert config.num_tokens(grid) == 24


def test_a_scale_factor_must_ask_for_the_queries_that_there_are():
    config = ResamplerConfig(vision_dim=8, language_dim=16)
    assert config.token_grid((24, 24), 2) == (12, 12)
    message = r"scale_factor=3 asks for 8x8 tokens .* has 12x12 learned queries; .* query_grid=\(8, 8\)"
    with pytest.raises(ValueError, match=message):
        config.token_grid((24, 24), 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide language_dim=16; choose a divisor"),
        ({"language_dim": 18, "num_heads": 2}, "language_dim=18 is not a multiple of 4"),
        ({"query_grid": (3,)}, r"query_grid=\(3,\) must be two integers"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ResamplerConfig(**({"vision_dim": 8, "language_dim": 16} | kwargs))

import pytest
import torch
from torch.nn import functional as F

from tokenpacker import VisionFeatures
from tokenpacker.projectors import PixelShuffle, PixelShuffleConfig


@pytest.mark.parametrize(("grid", "scale"), [((4, 6), 2), ((6, 9), 3), ((4, 4), 4)])
def test_a_packed_token_holds_the_patches_of_its_window_side_by_side(grid, scale):
    projector = PixelShuffle(PixelShuffleConfig(vision_dim=8, language_dim=12, scale_factor=scale))
    query = torch.randn(2, grid[0] * grid[1], 8)
    image = query.view(2, *grid, 8)
    windows = [
        torch.cat([image[:, y, x] for y in range(row, row + scale) for x in range(col, col + scale)], dim=-1)
        for row in range(0, grid[0], scale)
        for col in range(0, grid[1], scale)
    ]
    normalised = F.layer_norm(torch.stack(windows, dim=1), (8 * scale**2,))
    torch.testing.assert_close(projector(VisionFeatures(query, query, grid)), projector.mlp(normalised))


def test_its_weights_serve_one_scale_factor_only():
    config = PixelShuffleConfig(vision_dim=8, language_dim=12)
    assert config.num_tokens((24, 24), 2) == 144
    with pytest.raises(ValueError, match="scale_factor=3 but the weights of this pixel-shuffle are made for 2"):
        config.num_tokens((24, 24), 3)


def test_a_grid_that_the_scale_factor_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="scale_factor=2 does not divide patch_grid=27x27"):
        PixelShuffleConfig(vision_dim=8, language_dim=12).num_tokens((27, 27))

import pytest
import torch

from tokenpacker import VisionFeatures
from tokenpacker.projectors import AveragePool, AveragePoolConfig


@pytest.mark.parametrize(("grid", "scale"), [((6, 6), 2), ((6, 9), 3), ((5, 7), 2), ((4, 6), 4)])
def test_a_packed_token_is_the_mlp_of_the_mean_of_the_patches_in_its_window(grid, scale):
    projector = AveragePool(AveragePoolConfig(vision_dim=8, language_dim=12, scale_factor=scale))
    query = torch.randn(2, grid[0] * grid[1], 8)
    image = query.view(2, *grid, 8)
    means = [
        image[:, row : row + scale, col : col + scale].mean(dim=(1, 2))
        for row in range(0, grid[0], scale)
        for col in range(0, grid[1], scale)
    ]
    expected = projector.mlp(torch.stack(means, dim=1))
    torch.testing.assert_close(projector(VisionFeatures(query, query, grid)), expected)

import pytest
import torch
from torch.nn import functional as F

from tokenpacker import VisionFeatures
from tokenpacker.projectors import DenseConnector, DenseConnectorConfig


@pytest.mark.parametrize(("num_levels", "groups"), [(4, [(0, 1), (2, 3)]), (5, [(0, 1, 2), (3, 4)]), (2, [(0,), (1,)])])
def test_means_of_groups_of_levels_stand_beside_the_query_level(num_levels, groups):
    projector = DenseConnector(DenseConnectorConfig(vision_dim=8, language_dim=12, num_levels=num_levels))
    query, levels = torch.randn(2, 24, 8), torch.randn(num_levels, 2, 24, 8)
    means = [sum(levels[level] for level in group) / len(group) for group in groups]
    embedded = projector.linear_out(F.gelu(projector.linear_in(torch.cat([*means, query], dim=-1))))
    features = VisionFeatures(query, torch.cat(list(levels), dim=-1), (4, 6))
    torch.testing.assert_close(projector(features, scale_factor=1), embedded)
    halved = F.avg_pool2d(embedded.transpose(1, 2).reshape(2, 12, 4, 6), 2)  # what interpolation by 1/2 comes to
    torch.testing.assert_close(projector(features), halved.flatten(2).transpose(1, 2))


def test_by_a_third_it_keeps_the_central_patch_of_each_window():
    projector = DenseConnector(DenseConnectorConfig(vision_dim=8, language_dim=12, num_levels=2))
    features = VisionFeatures(torch.randn(1, 36, 8), torch.randn(1, 36, 16), (6, 6))
    every_patch = projector(features, scale_factor=1).view(1, 6, 6, 12)
    torch.testing.assert_close(projector(features, scale_factor=3), every_patch[:, 1::3, 1::3].flatten(1, 2))


def test_more_groups_than_levels_are_refused():
    with pytest.raises(ValueError, match="num_groups=3 exceeds num_levels=2; give more levels, or fewer groups"):
        DenseConnectorConfig(vision_dim=8, language_dim=12, num_levels=2, num_groups=3)

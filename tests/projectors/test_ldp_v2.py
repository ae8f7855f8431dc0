import torch
from torch.nn import functional as F

from tokenpacker import VisionFeatures
from tokenpacker.projectors import LdpV2, LdpV2Config


def test_a_packed_token_is_a_mean_plus_a_weighted_sum_of_the_means_around_it():
    projector = LdpV2(LdpV2Config(vision_dim=8, language_dim=12))
    query = torch.randn(2, 6 * 8, 8)
    embedded = projector.linear_out(F.gelu(projector.linear_in(query))).view(2, 6, 8, 12)
    means = {
        (row, col): embedded[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean(dim=(1, 2))
        for row in range(3)
        for col in range(4)
    }
    kernel, bias = projector.position_conv.weight[:, 0], projector.position_conv.bias  # (12, 3, 3), (12,)
    expected = []
    for (row, col), mean in means.items():
        neighbours = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (row + dy, col + dx) in means]
        around = sum(kernel[:, dy + 1, dx + 1] * means[row + dy, col + dx] for dy, dx in neighbours)
        expected.append(mean + around + bias)
    torch.testing.assert_close(projector(VisionFeatures(query, query, (6, 8))), torch.stack(expected, dim=1))


def test_beyond_the_two_linears_it_has_ten_weights_per_channel():
    projector = LdpV2(LdpV2Config(vision_dim=8, language_dim=12))
    linears = (8 * 12 + 12) + (12 * 12 + 12)
    assert sum(p.numel() for p in projector.parameters()) == linears + 10 * 12

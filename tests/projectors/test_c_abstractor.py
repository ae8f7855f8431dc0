"""C-Abstractor against its blocks written as convolutions on images, as the paper draws them."""

import pytest
import torch
from torch.nn import functional as F

from tokenpacker import VisionFeatures
from tokenpacker.projectors import CAbstractor, CAbstractorConfig


def random_abstractor(**kwargs):
    defaults = {"vision_dim": 16, "language_dim": 12, "depth": 2, "position_grid": (6, 8)}
    projector = CAbstractor(CAbstractorConfig(**(defaults | kwargs)))
    for parameter in projector.parameters():  # norms too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return projector


def norm(image, layer):
    """LayerNorm over the channels of (N, C, h, w)."""
    mean, var = image.mean(1, keepdim=True), image.var(1, keepdim=True, correction=0)
    return (image - mean) / (var + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def pointwise(image, pair):
    linear, layer = pair
    return norm(F.conv2d(image, linear.weight[:, :, None, None]), layer)


def slow_block(block, image):
    hidden = F.silu(pointwise(image, block.pointwise_in))
    hidden = F.conv2d(hidden, block.depthwise.weight, padding=1, groups=hidden.shape[1])
    hidden = F.silu(norm(hidden, block.depthwise_norm))
    squeeze, _, excite, _ = block.excitation
    gate = torch.sigmoid(excite(F.silu(squeeze(hidden.mean(dim=(2, 3))))))
    hidden = pointwise(hidden * gate[:, :, None, None], block.pointwise_out)
    shortcut = image if isinstance(block.shortcut, torch.nn.Identity) else pointwise(image, block.shortcut)
    return F.silu(hidden + shortcut)


@pytest.mark.parametrize("hidden_dim", [None, 20])
def test_it_is_blocks_then_pooling_then_blocks_then_an_mlp(hidden_dim):
    projector = random_abstractor(hidden_dim=hidden_dim)
    query = torch.randn(2, 48, 16)
    image = query.transpose(1, 2).reshape(2, 16, 6, 8) + projector.positions
    for block in projector.blocks_before:
        image = slow_block(block, image)
    image = F.adaptive_avg_pool2d(image, (3, 4))
    for block in projector.blocks_after:
        image = slow_block(block, image)
    expected = projector.mlp(image.flatten(2).transpose(1, 2))
    # values reach about 10, and some thirty float32 operations lie between
    torch.testing.assert_close(projector(VisionFeatures(query, query, (6, 8))), expected, atol=1e-4, rtol=1e-4)


def test_the_same_patches_elsewhere_make_other_tokens():
    projector = random_abstractor()
    uniform = torch.randn(1, 1, 16).expand(1, 48, 16)
    tokens = projector(VisionFeatures(uniform, uniform, (6, 8)))[0]
    assert (torch.cdist(tokens, tokens) + 100 * torch.eye(12) > 1e-3).all()


def test_learned_positions_stretch_over_other_patch_grids():
    projector = random_abstractor()
    with torch.no_grad():
        projector.positions.copy_(
            projector.positions[..., :1, :1].expand_as(projector.positions)
        )  # the same everywhere
    query = torch.randn(1, 108, 16)
    shifted = VisionFeatures(query + projector.positions[0, :, 0, 0], query, (9, 12))
    with_positions = projector(VisionFeatures(query, query, (9, 12)), scale_factor=3)
    with torch.no_grad():
        projector.positions.zero_()
    torch.testing.assert_close(projector(shifted, scale_factor=3), with_positions, atol=1e-4, rtol=1e-4)


def test_a_block_is_as_wide_as_the_vision_encoder_unless_told():
    assert CAbstractorConfig(vision_dim=1024, language_dim=4096).block_dim == 1024
    assert CAbstractorConfig(vision_dim=1152, language_dim=4096, hidden_dim=1024).block_dim == 1024


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 0}, "depth=0 must be an integer of at least 1"),
        ({"hidden_dim": 0}, "hidden_dim=0 must be an integer of at least 1"),
        ({"position_grid": 24}, r"position_grid=24 must be two integers, \(rows, cols\)"),
        ({"position_grid": (24, 0)}, "a side of position_grid=0 must be an integer of at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CAbstractorConfig(vision_dim=16, language_dim=12, **kwargs)

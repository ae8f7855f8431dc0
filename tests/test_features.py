import pytest
import torch

from tokenpacker import VisionFeatures


def test_hidden_states_with_cls_and_without_give_the_same_features():
    patches = [torch.randn(2, 6, 8) for _ in range(4)]
    with_cls = [torch.cat([torch.randn(2, 1, 8), level], dim=1) for level in patches]

    plain = VisionFeatures.from_hidden_states(patches, (2, 3), levels=(1, 3))
    dropped = VisionFeatures.from_hidden_states(with_cls, (2, 3), levels=(1, 3))

    assert torch.equal(plain.query, dropped.query)
    assert torch.equal(plain.levels, dropped.levels)
    assert torch.equal(plain.query, patches[3])
    assert torch.equal(plain.levels, torch.cat([patches[1], patches[3]], dim=-1))
    assert (plain.vision_dim, plain.num_levels) == (8, 2)


@pytest.mark.parametrize(
    ("query", "levels", "grid", "message"),
    [
        (torch.zeros(2, 6), torch.zeros(2, 6, 8), (2, 3), "three dimensions"),
        (torch.zeros(2, 7, 8), torch.zeros(2, 7, 8), (2, 3), "7 patch tokens but patch_grid=2x3 needs 6"),
        (torch.zeros(2, 6, 8), torch.zeros(3, 6, 8), (2, 3), "2 tiles but levels holds 3"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 6, 12), (2, 3), "not a multiple of the query's width 8"),
        (torch.zeros(2, 6, 8).long(), torch.zeros(2, 6, 8), (2, 3), "floating-point"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 6, 8).half(), (2, 3), "one dtype and device"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_name(query, levels, grid, message):
    with pytest.raises(ValueError, match=message):
        VisionFeatures(query, levels, grid)


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="level 9 does not exist; the encoder gave 2 hidden states"):
        VisionFeatures.from_hidden_states([torch.zeros(1, 4, 8)] * 2, (2, 2), levels=(1, 9))

import re

import pytest
import torch
from torch.utils import _pytree as pytree

from tokenpacker import VisionFeatures


def test_hidden_states_with_cls_and_without_give_the_same_features():
    patches = [torch.randn(2, 6, 8) for _ in range(4)]
    with_cls = [torch.cat([torch.randn(2, 1, 8), level], dim=1) for level in patches]

    plain = VisionFeatures.from_hidden_states(patches, (2, 3), levels=(1, 3))
    dropped = VisionFeatures.from_hidden_states(with_cls, (2, 3), levels=(1, 3), num_prefix_tokens=1)

    assert torch.equal(plain.query, dropped.query)
    assert torch.equal(plain.levels, dropped.levels)
    assert torch.equal(plain.query, patches[3])
    assert torch.equal(plain.levels, torch.cat([patches[1], patches[3]], dim=-1))
    assert (plain.vision_dim, plain.num_levels) == (8, 2)


@pytest.mark.parametrize(
    ("query", "levels", "grid", "message"),
    [
        ([[1.0]], torch.zeros(2, 6, 8), (2, 3), "query is given as list; pass a tensor"),
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


@pytest.mark.parametrize(
    ("num_tokens", "grid", "num_prefix_tokens", "told"),
    [
        (576, (23, 24), 0, "num_prefix_tokens=0 and patch_grid=23x24 need (tiles, 552, channels)"),
        (577, (24, 24), 0, "num_prefix_tokens=0 and patch_grid=24x24 need (tiles, 576, channels)"),
        (576, (24, 24), 1, "num_prefix_tokens=1 and patch_grid=24x24 need (tiles, 577, channels)"),
        (581, (24, 24), 1, "num_prefix_tokens=1 and patch_grid=24x24 need (tiles, 577, channels)"),
    ],
)
def test_the_number_of_prefix_tokens_is_never_guessed(num_tokens, grid, num_prefix_tokens, told):
    hidden_states = [torch.zeros(1, num_tokens, 8)] * 2
    with pytest.raises(ValueError, match=rf"level 1 has the shape \(1, {num_tokens}, 8\), but {re.escape(told)}"):
        VisionFeatures.from_hidden_states(hidden_states, grid, levels=(1,), num_prefix_tokens=num_prefix_tokens)


@pytest.mark.parametrize("num_prefix_tokens", [1, 5])
def test_cls_and_registers_are_left_out_as_stated(num_prefix_tokens):
    hidden_state = torch.randn(1, num_prefix_tokens + 576, 8)
    features = VisionFeatures.from_hidden_states([hidden_state], (24, 24), (0,), num_prefix_tokens=num_prefix_tokens)
    assert torch.equal(features.query, hidden_state[:, -576:])


def test_features_are_a_tree_of_two_tensors_with_the_grid_in_its_form():
    features = VisionFeatures(torch.randn(2, 6, 8), torch.randn(2, 6, 16), (2, 3))
    leaves, form = pytree.tree_flatten(features)
    assert [id(leaf) for leaf in leaves] == [id(features.query), id(features.levels)]
    again = pytree.tree_unflatten(leaves, form)
    assert (again.query is features.query, again.levels is features.levels) == (True, True)
    assert again.patch_grid == features.patch_grid
    turned = VisionFeatures(features.query, features.levels, (3, 2))
    assert pytree.tree_structure(turned) != form
    assert pytree.tree_map(lambda tensor: tensor.half(), features).levels.dtype == torch.float16

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tokenpacker.hf.vision_encoder import (
    build_vision_tower,
    count_prefix_tokens,
    cut_tower,
    encode_tiles,
    encoder_layers,
)


@pytest.mark.parametrize(("vision", "has_cls"), [("clip", True), ("siglip", False)])
def test_features_are_the_hidden_states_that_the_whole_tower_would_give(make_tiny_model, vision, has_cls):
    config = make_tiny_model(vision=vision, vision_levels=[2, 3, -1], vision_query_level=4).config
    tower = AutoModel.from_config(copy.deepcopy(config.vision_config)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    levels = config.patch_grid, config.vision_levels, config.vision_query_level
    features, _ = encode_tiles(tower, pixels, *levels)
    last = []
    encoder_layers(tower)[-1].register_forward_hook(lambda layer, given, output: last.append(output[:, int(has_cls) :]))
    hidden_states = [state[:, int(has_cls) :] for state in tower(pixels, output_hidden_states=True).hidden_states]
    assert features.patch_grid == (8, 8)
    assert torch.equal(features.query, hidden_states[4])
    assert torch.equal(features.levels, torch.cat([hidden_states[2], hidden_states[3], last[0]], dim=-1))
    short = cut_tower(tower, 4)
    assert torch.equal(encode_tiles(short, pixels, (8, 8), [2, 4], 4)[0].levels[..., 32:], hidden_states[4])


def test_a_tower_with_other_tokens_than_its_config_says_is_refused(make_tiny_model):
    model = make_tiny_model()
    with pytest.raises(ValueError, match=r"shape \(1, 65, 32\), but num_prefix_tokens=1 and patch_grid=7x8 need"):
        encode_tiles(model.model.vision_tower, torch.randn(1, 3, 32, 32), (7, 8), [2, 4], 4)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("siglip_vision_model", 0),
        ("clip_vision_model", 1),
        ("vit", 1),
        ("deit", 2),
        ("dinov2_with_registers", 5),
        ("dinov3_vit", 5),
    ],
)
def test_tokens_before_the_patches_are_known_for_every_kind_of_tower(kind, expected):
    options = SIZES | {"patch_size": 4} | ({"num_register_tokens": 4} if expected == 5 else {})
    tower = AutoModel.from_config(AutoConfig.for_model(kind, **options)).eval()
    assert count_prefix_tokens(tower) == expected
    features, _ = encode_tiles(tower, torch.randn(1, 3, 16, 16), (4, 4), [1, 2], 2)
    whole = tower(torch.randn(1, 3, 16, 16), output_hidden_states=True).hidden_states[2]
    assert whole.shape[1] == 16 + expected
    assert features.query.shape == (1, 16, 16)


def test_a_tower_that_another_model_cut_is_refused(make_tiny_model):
    tower = make_tiny_model(vision_levels=[2, 3]).model.vision_tower
    with pytest.raises(ValueError, match="CLIPVisionModel has 3 layers but level 5 is needed; another model may have"):
        cut_tower(tower, 5)


def test_only_the_needed_layers_exist(make_tiny_model):
    config = make_tiny_model(vision_levels=[2, 4]).config
    assert len(encoder_layers(build_vision_tower(config))) == 4
    assert config.vision_config.num_hidden_layers == 6


def test_something_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        encoder_layers(torch.nn.Linear(2, 2))

import copy

import pytest
import torch
from transformers import AutoModel

from tokenpacker.hf.vision_encoder import build_vision_tower, encode_tiles, encoder_layers


@pytest.mark.parametrize(("vision", "has_cls"), [("clip", True), ("siglip", False)])
def test_features_are_the_hidden_states_that_the_whole_tower_would_give(make_tiny_model, vision, has_cls):
    config = make_tiny_model(vision=vision, vision_levels=[2, 3, -1], vision_query_level=4).config
    tower = AutoModel.from_config(copy.deepcopy(config.vision_config)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    features = encode_tiles(tower, pixels, config.patch_grid, config.vision_levels, config.vision_query_level)
    hidden_states = [state[:, int(has_cls) :] for state in tower(pixels, output_hidden_states=True).hidden_states]
    assert features.patch_grid == (8, 8)
    assert torch.equal(features.query, hidden_states[4])
    # SigLIP's list ends with the normalised state in some versions: compare the levels below the last
    assert torch.equal(features.levels[..., :64], torch.cat([hidden_states[2], hidden_states[3]], dim=-1))
    assert features.num_levels == 3


def test_only_the_needed_layers_exist(make_tiny_model):
    config = make_tiny_model(vision_levels=[2, 4]).config
    assert len(encoder_layers(build_vision_tower(config))) == 4
    assert config.vision_config.num_hidden_layers == 6


def test_no_hook_stays_behind(make_tiny_model):
    model = make_tiny_model()
    model.get_image_features(torch.randn(1, 3, 32, 32))
    assert all(not layer._forward_hooks for layer in encoder_layers(model.model.vision_tower))


def test_something_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        encoder_layers(torch.nn.Linear(2, 2))

import json

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenpacker.carried.foundation import make_encoder


def small_encoder():
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8)
    )


def test_a_part_is_made_once_and_found_again(tmp_path):
    folder = make_encoder(tmp_path, small_encoder)
    assert make_encoder(tmp_path, lambda: pytest.fail("it is there already")) == folder
    assert json.loads((folder / "preprocessor_config.json").read_text()).keys() == {"image_mean", "image_std"}


def test_what_was_interrupted_is_made_again(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_encoder(tmp_path, interrupted)
    encoder = small_encoder()
    loaded = CLIPVisionModel.from_pretrained(make_encoder(tmp_path, lambda: encoder))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in encoder.state_dict().items())

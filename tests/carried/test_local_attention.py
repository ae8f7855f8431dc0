import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tokenpacker.carried.local_attention import OFFSETS, look_at_neighbours


def small_encoder(heads: int = 8) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=heads, image_size=96,
        patch_size=8, attn_implementation="eager",
    )  # fmt: skip
    return CLIPVisionModel(config).eval()


@torch.no_grad()
def test_each_head_first_looks_at_its_neighbour():
    encoder = small_encoder()
    look_at_neighbours(encoder)
    attentions = encoder(torch.zeros(1, 3, 96, 96), output_attentions=True).attentions
    row, column = 5, 6
    for layer, attention in enumerate(attentions):
        for head, (down, right) in enumerate(OFFSETS[layer]):
            most_attended = int(attention[0, head, 1 + row * 12 + column, 1:].argmax())  # CLS comes first
            assert divmod(most_attended, 12) == (row + down, column + right)


def test_heads_too_narrow_for_positions_are_refused():
    with pytest.raises(ValueError, match="too narrow"):
        look_at_neighbours(small_encoder(heads=16))

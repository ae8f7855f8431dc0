"""Initialises a vision transformer so that it learns to read quickly: each head first looks at one neighbour.

A ViT has to learn from data that nearby patches belong together, and spends most of a small budget on that. Here a few
reserved channels hold positions as sines and cosines. Queries and keys start so that head k of a layer attends to the
patch at a fixed offset, as a tap of a convolution does. All weights stay trainable. The idea of starting attention from
convolution: d'Ascoli et al., "ConViT", 2021.

Shapes: L = side*side patches, C width, H heads, P reserved channels.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

FREQUENCIES = tuple(torch.pi / 12 * 2**octave for octave in range(4))  # together they peak at one patch in 12 x 12
NUM_POSITION_CHANNELS = 4 * len(FREQUENCIES)  # sine and cosine, of row and column
POSITION_AMPLITUDE = 0.4  # after the first layer norm positions are then about as large as contents
SHARPNESS = 1.8  # scale of queries and keys: most of a head's attention lies on its one patch
OFFSETS = (  # (rows, columns) of the patch that each head looks at, layer by layer; then from the start again
    ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((0, -1), (0, 1), (-1, 0), (1, 0), (0, -2), (0, 2), (-2, 0), (2, 0)),
    ((0, -1), (0, 1), (0, -2), (0, 2), (0, -3), (0, 3), (-1, 0), (1, 0)),
)


@torch.no_grad()
def look_at_neighbours(encoder: CLIPVisionModel) -> None:
    """Re-initialises positions, queries and keys of a new encoder in place.

    Raises:
        ValueError: if a head is narrower than the reserved channels.
    """
    config = encoder.config
    head_dim = config.hidden_size // config.num_attention_heads
    if head_dim < NUM_POSITION_CHANNELS:
        raise ValueError(f"heads of {head_dim} channels are too narrow; local attention needs {NUM_POSITION_CHANNELS}")
    side = config.image_size // config.patch_size
    parameters = dict(encoder.named_parameters())
    positions = _ending(parameters, "position_embedding.weight")  # (1 + L, C), CLS first
    positions[:, :NUM_POSITION_CHANNELS] = 0
    positions[1:, :NUM_POSITION_CHANNELS] = POSITION_AMPLITUDE * _waves(side)
    _ending(parameters, "patch_embedding.weight")[:NUM_POSITION_CHANNELS] = 0
    layers = [module for module in encoder.modules() if hasattr(module, "q_proj")]
    for index, attention in enumerate(layers):
        for projection in (attention.q_proj, attention.k_proj):
            nn.init.normal_(projection.weight, std=0.02)
        for head in range(config.num_attention_heads):
            offsets = OFFSETS[index % len(OFFSETS)]
            start = head * head_dim
            rows = slice(start, start + NUM_POSITION_CHANNELS)
            columns = slice(0, NUM_POSITION_CHANNELS)
            attention.k_proj.weight[rows, columns] = SHARPNESS * torch.eye(NUM_POSITION_CHANNELS)
            attention.q_proj.weight[rows, columns] = SHARPNESS * _shift(*offsets[head % len(offsets)])


def _ending(parameters: dict[str, nn.Parameter], suffix: str) -> nn.Parameter:
    """The parameter whose name ends so; versions of transformers differ in what precedes it."""
    (found,) = (parameter for name, parameter in parameters.items() if name.endswith(suffix))
    return found


def _waves(side: int) -> Tensor:
    """(L, P), the sine and the cosine of each patch's place, for each axis and frequency."""
    angles = torch.arange(side)[:, None] * torch.tensor(FREQUENCIES)  # (side, F)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (side, 2F)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _shift(rows: int, columns: int) -> Tensor:
    """(P, P), maps the waves of a place to those of the place `rows` further down and `columns` to the right."""
    blocks = []
    for distance in (rows, columns):
        for frequency in FREQUENCIES:
            angle = torch.tensor(distance * frequency)
            sine, cosine = angle.sin(), angle.cos()
            blocks.append(torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])]))
    return torch.block_diag(*blocks)

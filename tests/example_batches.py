"""Token ids and labels of conversations as one batch, to compare with batches of the original."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenpacker.data.collate import collate_padded
from tokenpacker.data.labels import Example
from tokenpacker.data.samples import Sample


def batch_of(examples: Sequence[Example], pad_token_id: int, max_length: int | None = None) -> dict[str, Tensor]:
    """One example per row. The original cut at `max_length` here, while each image was still one mark."""
    keys = ("input_ids", "labels", "attention_mask")
    samples = [
        Sample(
            id="",
            **{key: torch.tensor(getattr(example, key)[:max_length]) for key in keys},
            pixel_values=torch.empty(0, 3, 1, 1),
            tile_grids=(),
        )
        for example in examples
    ]
    batch = collate_padded(samples, pad_token_id)
    return {key: batch[key] for key in keys}

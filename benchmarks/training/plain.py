"""A plain LLaVA-style training loop, written for the benchmark: what one writes first, without any of our savings.

A batch is the next few samples of a shuffled list, padded to its longest. The frozen vision tower runs to its last
layer and keeps every hidden state until the tiles are encoded; each sample's tiles go through it however often they
occur. Each row of embeddings is put together by itself, and logits are made at every position, padding included.

Shapes: B samples, S sequence length, N tiles of all samples, T packed tokens per tile, D language width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from tokenpacker.data.samples import Sample
from tokenpacker.features import VisionFeatures
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.sequence import IGNORED


class PlainModel(nn.Module):
    """The benchmark's model with its parts called the plain way; the same weights, and a tower with all its layers."""

    def __init__(self, model: TokenPackerForConditionalGeneration) -> None:
        super().__init__()
        self.config = model.config
        self.vision_tower = AutoModel.from_config(model.config.vision_config)  # with the layers that nothing reads
        self.vision_tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
        self.vision_tower.requires_grad_(False)
        self.projector = model.model.multi_modal_projector
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        self.loss_function = model.loss_function

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        """The mean loss of the tokens that the samples learn."""
        device = self.lm_head.weight.device
        packed = self._encode(torch.cat([sample.pixel_values for sample in samples]).to(device))  # (N, T, D)
        counts = [sample.pixel_values.shape[0] for sample in samples]
        rows = [
            self._embed(sample.input_ids.to(device), tokens)
            for sample, tokens in zip(samples, packed.split(counts), strict=True)
        ]
        embeds = pad_sequence(rows, batch_first=True)  # (B, S, D)
        labels = pad_sequence([sample.labels for sample in samples], batch_first=True, padding_value=IGNORED)
        mask = pad_sequence([sample.attention_mask for sample in samples], batch_first=True)
        outputs = self.language_model(inputs_embeds=embeds, attention_mask=mask.to(device), use_cache=False)
        logits = self.lm_head(outputs.last_hidden_state)
        return self.loss_function(
            logits=logits, labels=labels.to(device), vocab_size=self.config.text_config.vocab_size
        )

    def _encode(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[0] == 0:
            return pixel_values.new_zeros(0, 1, self.config.text_config.hidden_size)
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        config = self.config
        rows, cols = config.patch_grid
        return self.projector(
            VisionFeatures.from_hidden_states(
                hidden_states,
                (rows, cols),
                config.vision_levels,
                config.vision_query_level,
                num_prefix_tokens=hidden_states[0].shape[1] - rows * cols,
            )
        )

    def _embed(self, input_ids: Tensor, packed: Tensor) -> Tensor:
        """One sample's embeddings (length, D), packed tokens in place."""
        embeds = self.language_model.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        return embeds.masked_scatter(places[:, None], packed.to(embeds.dtype)) if len(packed) else embeds


def shuffled_batches(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The numbers of all samples in random order, `batch_size` at a time."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    for start in range(0, count, batch_size):
        yield numbers[start : start + batch_size]

"""Answers that are generated together: rows join and leave between the steps.

transformers' `generate` takes a batch that stays until its longest answer ends, and its continuous batching (5.16 to
5.24) takes no images. So this is the loop of `generate`.

Shapes: B rows, S positions of the cache, padded on the left, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.hf.image_inputs import ENCODED
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE
from tokenpacker.serve.embedded.row_cache import RowCache


@dataclass
class Prefilled:
    """Prompts that were computed: the logits (B, V) of their next tokens, their mask (B, S) and their cache."""

    logits: Tensor
    mask: Tensor
    cache: Cache


@dataclass
class RunningBatch:
    """The key/value cache of the rows that are being answered."""

    model: TokenPackerForConditionalGeneration

    def __post_init__(self) -> None:
        config = self.model.config
        self._padding = min({0, 1, 2} - {config.image_token_id, config.region_token_id})
        self.clear()

    def clear(self) -> None:
        """Drops all rows."""
        self._cache = RowCache(self.model.config.text_config.num_hidden_layers)
        self._mask = torch.empty(0, 0, dtype=torch.int64, device=self.model.device)

    def prefill(
        self, prompts: Sequence[Sequence[int]], packed: Sequence[Tensor], regions: Sequence[Tensor] = ()
    ) -> Prefilled:
        """Computes prompts, beside the batch: several threads may do so at once.

        Args:
            packed: tokens of all images of these prompts in order, each (K, D).
            regions: tokens of all regions of these prompts in order, each (R, D).
        """
        length, device = max(map(len, prompts)), self.model.device
        padding = [length - len(prompt) for prompt in prompts]
        rows = [[self._padding] * size + list(ids) for size, ids in zip(padding, prompts, strict=True)]
        mask = torch.tensor([[0] * size + [1] * (length - size) for size in padding], device=device)
        images = {}
        if packed:
            marked = torch.cat(list(regions)) if regions else None
            images[ENCODED] = {"image": ImageFeatures(pooler_output=torch.cat(list(packed)), region_tokens=marked)}
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(torch.tensor(rows, device=device), mask, positions, cache, **images)
        return Prefilled(logits, mask, cache)

    def add(self, new: Prefilled) -> None:
        """Adds a row for each prompt."""
        width = max(new.mask.shape[1], self._mask.shape[1])
        self._mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part in (self._mask, new.mask)])
        self._cache.add(new.cache)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends a token to each row and returns the logits (B, V) of the next. After an error call `clear`."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)
        return self._forward(ids, self._mask, self._mask.sum(dim=1, keepdim=True) - 1, self._cache)

    def drop(self, row: int) -> None:
        """Removes a row and moves the last one to its place."""
        self._mask[row] = self._mask[-1]
        mask = self._mask[:-1]
        unused = int(mask.any(dim=0).int().argmax()) if len(mask) else mask.shape[1]
        self._mask = mask[:, unused:]
        self._cache.drop(row, unused)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, **images: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: cache, **images}
        logits = self.model(**inputs, use_cache=True, logits_to_keep=1, return_dict=True).logits
        return logits[:, -1]

"""Answers that are generated together: rows join and leave between the steps.

transformers' `generate` takes a batch that stays until its longest answer ends, and its continuous batching (5.16 to
5.24) takes no images. So this is the loop of `generate`, over the same public cache.

Shapes: B rows, S positions of the cache, padded on the left, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.hf.image_inputs import ENCODED
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE


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
        self._cache: DynamicCache | None = None
        self._mask = torch.empty(0, 0, dtype=torch.int64, device=self.model.device)

    def join(self, prompts: Sequence[Sequence[int]], packed: Sequence[Tensor]) -> Tensor:
        """Adds a row for each prompt and returns the logits (B, V) of its next token. On errors nothing is added.

        Args:
            packed: tokens of all images of these prompts in order, each (K, D).
        """
        length, device = max(map(len, prompts)), self.model.device
        padding = [length - len(prompt) for prompt in prompts]
        rows = [[self._padding] * size + list(ids) for size, ids in zip(padding, prompts, strict=True)]
        mask = torch.tensor([[0] * size + [1] * (length - size) for size in padding], device=device)
        images = {ENCODED: {"image": ImageFeatures(pooler_output=torch.cat(list(packed)))}} if packed else {}
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = self._forward(torch.tensor(rows, device=device), mask, positions, cache, **images)
        self._merge(cache, mask)
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends a token to each row and returns the logits (B, V) of the next. After an error call `clear`."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)
        assert self._cache is not None
        return self._forward(ids, self._mask, self._mask.sum(dim=1, keepdim=True) - 1, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Drops the other rows, and the columns that only they used."""
        if not rows or self._cache is None:
            self.clear()
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]
        unused = int(self._mask.any(dim=0).int().argmax())
        self._mask = self._mask[:, unused:]
        _change(self._cache, lambda states: states[:, :, unused:])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **images: Any) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, CACHE: cache, **images}
        logits = self.model(**inputs, use_cache=True, logits_to_keep=1, return_dict=True).logits
        return logits[:, -1]

    def _merge(self, cache: DynamicCache, mask: Tensor) -> None:
        if self._cache is None:
            self._cache, self._mask = cache, mask
            return
        width = max(mask.shape[1], self._mask.shape[1])
        for one, columns in ((self._cache, self._mask), (cache, mask)):
            missing = width - columns.shape[1]
            if missing:
                _change(one, lambda states, missing=missing: pad(states, (0, 0, missing, 0)))  # type: ignore[misc]
        for layer, new in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys, layer.values = torch.cat([layer.keys, new.keys]), torch.cat([layer.values, new.values])
        self._mask = torch.cat([pad(part, (width - part.shape[1], 0)) for part in (self._mask, mask)])


def _change(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces keys and values (B, heads, S, width) of all layers."""
    for layer in cache.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)

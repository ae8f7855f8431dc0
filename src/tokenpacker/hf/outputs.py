"""What the model gives: named tensors, in the manner of transformers.

Shapes: B samples, S sequence length, N tiles, T packed tokens per tile, R regions, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The cache's name as keyword and output of every model: `cache` from transformers 5.24 on."""


def name_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache under the name that the installed transformers has for it, whichever name it came by.

    Raises:
        ValueError: for a cache under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("the cache was given as cache and as past_key_values; pass it once")
    return {CACHE: past_key_values if cache is None else cache}


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """`last_hidden_state` (N, L, C) of the query level, packed tokens as `pooler_output` (N, T, D), and region tokens.

    `region_tokens` (R, D) is None where no regions were asked for.
    """

    region_tokens: Tensor | None = None


@dataclass
class TokenPackerModelOutput(BaseModelOutputWithPast):
    """What the language model gives, and the packed tokens (N, T, D) and region tokens (R, D) that went into it."""

    image_hidden_states: Tensor | None = None
    region_hidden_states: Tensor | None = None


@dataclass
class TokenPackerCausalLMOutput(CausalLMOutputWithPast):
    """`loss` when labels are given, `logits` (B, S, vocabulary), and the rest of `TokenPackerModelOutput`."""

    image_hidden_states: Tensor | None = None
    region_hidden_states: Tensor | None = None

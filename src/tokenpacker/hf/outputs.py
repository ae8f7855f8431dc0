"""What the model gives: named tensors, in the manner of transformers.

Shapes: B samples, S sequence length, N tiles, T packed tokens per tile, R regions, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """`last_hidden_state` (N, L, C) of the query level, packed tokens as `pooler_output` (N, T, D), and region tokens.

    `region_tokens` (R, D) is None where no regions were asked for.
    """

    region_tokens: Tensor | None = None


@dataclass
class TokenPackerModelOutput(ModelOutput):
    """What the language model gives, and the packed tokens (N, T, D) and region tokens (R, D) that went into it."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    region_hidden_states: Tensor | None = None


@dataclass
class TokenPackerCausalLMOutput(ModelOutput):
    """`loss` when labels are given, `logits` (B, S, vocabulary), and the rest of `TokenPackerModelOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    region_hidden_states: Tensor | None = None

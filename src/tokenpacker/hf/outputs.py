"""Model outputs: transformers' LLaVA outputs and what is new.

Shapes: B samples, S sequence length, N tiles, T packed tokens per tile, R regions, L patches per tile, C vision width,
D language width.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the key/value cache among the arguments and outputs of models: `cache` from transformers 5.24 on."""

_HOLDS_IMAGE_OUTPUTS = "image_outputs" in LlavaModelOutputWithPast.__dataclass_fields__  # from transformers 5.24 on


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    `last_hidden_state` (N, L, C) is the level that the coarse queries come from. `pooler_output` holds the packed
    tokens: (N, T, D), or a list of N tensors (T, D) where tiles have different scale factors. `region_tokens` (R, D) is
    None without regions. `hidden_states` and `attentions` are the vision tower's, if asked for.
    """

    region_tokens: Tensor | None = None


class _PackedTokens:
    @property
    def packed_tokens(self) -> Tensor | list[Tensor] | None:
        """Packed tokens of the call's images as `ImageFeatures.pooler_output`; None without images.

        In LLaVA's outputs they are `image_outputs.pooler_output`, before transformers 5.24 `image_hidden_states`.
        """
        if not _HOLDS_IMAGE_OUTPUTS:
            return self.image_hidden_states  # type: ignore[attr-defined]
        images = self.image_outputs  # type: ignore[attr-defined]
        return None if images is None else images.pooler_output


@dataclass
class TokenPackerModelOutput(_PackedTokens, LlavaModelOutputWithPast):
    """Output of `TokenPackerModel`: LLaVA's, and the region tokens (R, D) as `region_hidden_states`."""

    region_hidden_states: Tensor | None = None


@dataclass
class TokenPackerCausalLMOutput(_PackedTokens, LlavaCausalLMOutputWithPast):
    """Output of `TokenPackerForConditionalGeneration`: LLaVA's, and the region tokens (R, D)."""

    region_hidden_states: Tensor | None = None


def image_fields(images: ImageFeatures | None) -> dict[str, Any]:
    """The encoded images as fields of an output, under the names of the installed transformers."""
    if images is None:
        return {}
    regions = {"region_hidden_states": images.region_tokens}
    if _HOLDS_IMAGE_OUTPUTS:
        return {"image_outputs": images} | regions
    return {"image_hidden_states": images.pooler_output} | regions


def name_cache(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache as an argument of the language model, under the name of the installed transformers.

    Raises:
        ValueError: for a cache under both names.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("the cache was given as cache and as past_key_values; pass it once")
    if past_key_values is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated in transformers; use `cache`", FutureWarning, stacklevel=2)
    return {CACHE: past_key_values if cache is None else cache}

"""Model outputs: transformers' LLaVA outputs with the region tokens added.

Shapes: N tiles, T packed tokens per tile, R regions, L patches per tile, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from tokenpacker.hf.versions import HAS_IMAGE_OUTPUTS


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    `last_hidden_state` (N, L, C) is the level that the coarse queries come from. `pooler_output` holds the packed
    tokens: (N, T, D), or a list of N tensors (T, D) if the tiles have different scale factors. `region_tokens` (R, D)
    is None without regions. `hidden_states` and `attentions` are those of the vision tower, if asked for.
    """

    region_tokens: Tensor | None = None


class _PackedTokens:
    @property
    def packed_tokens(self) -> Tensor | list[Tensor] | None:
        """Packed tokens of the call's images as `ImageFeatures.pooler_output`; None without images.

        LLaVA's outputs hold them in `image_outputs.pooler_output`, before transformers 5.24 in `image_hidden_states`.
        """
        if not HAS_IMAGE_OUTPUTS:
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
    """The encoded images as fields of an output."""
    if images is None:
        return {}
    own = {"image_outputs": images} if HAS_IMAGE_OUTPUTS else {"image_hidden_states": images.pooler_output}
    return own | {"region_hidden_states": images.region_tokens}

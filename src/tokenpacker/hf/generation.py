"""How images and regions pass through `generate`: once with the prompt, and encoded once for all beams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

# Of the prompt; generation needs them once. The last two are what the others become.
IMAGE_INPUTS = (
    "pixel_values",
    "tile_index",
    "region_cells",
    "region_first_tile",
    "packed_tokens",
    "region_tokens",
)


class ImageGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold images and regions."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt; later steps find them in the cache."""
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            kwargs = {key: value for key, value in kwargs.items() if key not in IMAGE_INPUTS}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats each sample for beams and multiple answers.

        A sample's images and regions must follow it as a group, and are encoded once, not once per beam.
        """
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if model_kwargs.get(name) is not None}
        if expand_size > 1:
            images = self._repeat_images(images, input_ids, expand_size, model_kwargs.get("scale_factor"))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | images

    def _repeat_images(
        self, images: dict[str, Tensor], input_ids: Tensor | None, times: int, scale_factor: int | None
    ) -> dict[str, Tensor]:
        if "pixel_values" in images:
            encoded = self.get_image_features(scale_factor=scale_factor, **images)
            images = {"packed_tokens": encoded.pooler_output, "region_tokens": encoded.region_tokens}
        repeated = {}
        if images.get("packed_tokens") is not None:
            tokens = images["packed_tokens"].flatten(0, 1)
            repeated["packed_tokens"] = _repeat(tokens, input_ids == self.config.image_token_id, times)[None]
        if images.get("region_tokens") is not None:
            is_region = input_ids == self.config.region_token_id
            repeated["region_tokens"] = _repeat(images["region_tokens"], is_region, times)
        return repeated


def _repeat(tokens: Tensor, places: Tensor, times: int) -> Tensor:
    """Tokens (T, D) of all samples in order, those of each sample repeated; `places` (B, S) tells whose they are."""
    samples = tokens.split(places.sum(dim=1).tolist())
    return torch.cat([sample for sample in samples for _ in range(times)])

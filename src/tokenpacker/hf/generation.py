"""How images and regions pass through `generate`: once with the prompt, encoded once for all beams.

Shapes: B samples, S sequence length, T tokens of all samples, D language width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from tokenpacker.hf.backbone import refuse_beside_tiles, refuse_without_tiles

# Of the prompt; generation needs them once. The last two are what the others become.
IMAGE_INPUTS = (
    "pixel_values",
    "tile_index",
    "region_cells",
    "region_first_tile",
    "packed_tokens",
    "region_tokens",
)
TOKENS = IMAGE_INPUTS[-2:]


class ImageGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold images and regions."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images enter with the prompt; later steps find them in the cache."""
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            kwargs = {key: value for key, value in kwargs.items() if key not in IMAGE_INPUTS}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        """Adds for prompt lookup that placeholders are no answer.

        Lookup copies its guesses from the prompt, most of which is placeholders, and keeps what is allowed.
        """
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if not generation_config.prompt_lookup_num_tokens:
            return processors
        placeholders = [self.config.image_token_id, self.config.region_token_id]
        known = [token_id for token_id in placeholders if token_id is not None]
        processors.insert(0, SuppressTokensLogitsProcessor(known, device=self.device))
        return processors

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
            refuse_beside_tiles(images.get("packed_tokens"), images.get("region_tokens"))
            encoded = self.get_image_features(scale_factor=scale_factor, **images)
            images = {"packed_tokens": encoded.pooler_output, "region_tokens": encoded.region_tokens}
        else:
            refuse_without_tiles(**{name: value for name, value in images.items() if name not in TOKENS})
        repeated = {}
        if images.get("packed_tokens") is not None:
            tokens = images["packed_tokens"].flatten(0, 1)
            repeated["packed_tokens"] = _repeat(tokens, input_ids == self.config.image_token_id, times, "image")[None]
        if images.get("region_tokens") is not None:
            self.model.require_region_encoder()
            is_region = input_ids == self.config.region_token_id
            repeated["region_tokens"] = _repeat(images["region_tokens"], is_region, times, "region")
        return repeated


def _repeat(tokens: Tensor, places: Tensor, times: int, kind: str) -> Tensor:
    """Tokens (T, D) of all samples in order, those of each sample repeated; `places` (B, S) tells whose they are.

    Raises:
        ValueError: for another number of tokens than places. Afterwards a multiple might fit the beams by chance.
    """
    counts = places.sum(dim=1).tolist()
    if sum(counts) != tokens.shape[0]:
        raise ValueError(
            f"the prompts hold {sum(counts)} {kind} tokens but {tokens.shape[0]} were given; pass images and regions of"
            " exactly these prompts, at the scale factor the processor counted with"
        )
    return torch.cat([sample for sample in tokens.split(counts) for _ in range(times)])

"""How images and regions pass through `generate`: once with the prompt, encoded once for all beams.

Shapes: B samples, S sequence length, K packed tokens of all samples, D language width.
"""

from __future__ import annotations

from typing import Any

import torch
from packaging import version
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    __version__,
)

from tokenpacker.hf.backbone import find_encoded
from tokenpacker.hf.outputs import ImageFeatures

TILE_INPUTS = ("tile_index", "region_cells", "region_first_tile")
IMAGE_INPUTS = ("pixel_values", "scale_factor", "scale_factors", *TILE_INPUTS)
"""What belongs to the images of a prompt; generation needs it once."""
ENCODED = "mm_encoder_outputs"
PREFILLS_IMAGES_IN_CHUNKS = version.parse(__version__) >= version.parse("5.24")


class ImageGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold images and regions."""

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As of every model in transformers; what it would drop without a word is refused.

        Raises:
            ValueError: for inputs about images that contradict each other, for image tokens without images, and for a
                prefill in chunks that would lose images (before transformers 5.24) or regions.
        """
        tiles = {name: kwargs.get(name) for name in TILE_INPUTS}
        encoded = find_encoded(kwargs.get(ENCODED), kwargs.get("pixel_values"), tiles)
        images = encoded is not None or kwargs.get("pixel_values") is not None
        ids = kwargs.get("input_ids") if inputs is None else inputs
        goes_on = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        if ids is not None and not images and not goes_on and bool((ids == self.config.image_token_id).any()):
            raise ValueError(
                "the prompt has image tokens but there are no images; pass pixel_values, as the processor made them"
            )
        settings = (kwargs, vars(kwargs.get("generation_config") or self.generation_config))
        if any(given.get("prefill_chunk_size") for given in settings):
            regions = tiles["region_cells"] is not None or getattr(encoded, "region_tokens", None) is not None
            if regions or (images and not PREFILLS_IMAGES_IN_CHUNKS):
                lost = "regions" if regions else "images"
                raise ValueError(f"prefill_chunk_size loses {lost} in transformers {__version__}; leave it out")
        return super().generate(inputs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images enter with the prompt; later steps find them in the cache."""
        if kwargs.get("use_cache", True) and not is_first_iteration:
            kwargs = {name: value for name, value in kwargs.items() if name not in (*IMAGE_INPUTS, ENCODED)}
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

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
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats each sample for beams and multiple answers, its images and regions as a group.

        Before transformers 5.19 images are encoded here, once for all beams; later versions did so already. Their own
        expansion knows nothing of regions.
        """
        if expand_size == 1:
            return input_ids, model_kwargs
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_INPUTS}
        tiles = {name: images[name] for name in TILE_INPUTS}
        encoded = find_encoded(model_kwargs.pop(ENCODED, None), images["pixel_values"], tiles)
        if images["pixel_values"] is not None:
            encoded = self.get_image_features(**images, return_dict=True)
        if encoded is not None:
            embeds = model_kwargs.get("inputs_embeds")
            ids: Any = input_ids if embeds is None else self.model.find_placeholders(embeds)
            encoded = self._repeat_images(encoded, ids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if encoded is None else model_kwargs | {ENCODED: {"image": encoded}}

    def _repeat_images(self, images: ImageFeatures, input_ids: Tensor, times: int) -> ImageFeatures:
        packed, regions = images.pooler_output, images.region_tokens
        if packed is not None:
            tokens = packed.flatten(0, 1) if isinstance(packed, Tensor) else torch.cat(list(packed))  # (K, D)
            packed = _repeat(tokens, input_ids == self.config.image_token_id, times, "image")
        if regions is not None:
            self.model.require_region_encoder()
            regions = _repeat(regions, input_ids == self.config.region_token_id, times, "region")
        return ImageFeatures(pooler_output=packed, region_tokens=regions)


def _repeat(tokens: Tensor, places: Tensor, times: int, kind: str) -> Tensor:
    """Tokens (K, D) of all samples in order, those of each sample repeated; `places` (B, S) tells whose they are.

    Raises:
        ValueError: for another number of tokens than places. Afterwards a multiple might fit the beams by chance.
    """
    counts = places.sum(dim=1).tolist()
    if sum(counts) != tokens.shape[0]:
        raise ValueError(
            f"the prompts hold {sum(counts)} {kind} tokens but {tokens.shape[0]} were given; pass images and regions of"
            " exactly these prompts, with the scale_factors that the processor gave with them"
        )
    return torch.cat([sample for sample in tokens.split(counts) for _ in range(times)])

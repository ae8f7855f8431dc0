"""`generate` for prompts with images and regions, which are encoded once and then passed on with the prompt.

Shapes: B samples, S sequence length, K packed tokens of all samples, D language width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, __version__

from tokenpacker.hf.image_inputs import ENCODED, IMAGE_INPUTS, ImageInputs, pick_image_inputs
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import PREFILLS_IMAGES_IN_CHUNKS


class ImageGenerationMixin(GenerationMixin):
    """`generate` for a model whose prompts hold images and regions."""

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Encodes the images, once for all beams and answers, and calls transformers' `generate`.

        Raises:
            ValueError: for inputs about images that contradict each other, for image tokens without images, and for a
                prefill in chunks that would lose images (before transformers 5.24) or regions.
        """
        images = pick_image_inputs(kwargs)
        encoded = images.encoded(kwargs.get(ENCODED))
        settings = vars(kwargs.get("generation_config") or self.generation_config) | kwargs
        self._check_prompt(kwargs.get("input_ids") if inputs is None else inputs, images, encoded, settings)
        if images.pixel_values is not None:
            with torch.no_grad():
                kwargs[ENCODED] = {"image": self.get_image_features(**vars(images), return_dict=True)}
            kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_INPUTS}
        if settings.get("prompt_lookup_num_tokens"):
            # Lookup copies its guesses from the prompt, where most tokens are placeholders. These are no answer.
            placeholders = {self.config.image_token_id, self.config.region_token_id} - {None}
            kwargs["suppress_tokens"] = sorted(placeholders.union(settings.get("suppress_tokens") or ()))
        return super().generate(inputs, **kwargs)

    def _check_prompt(
        self, ids: Tensor | None, images: ImageInputs, encoded: ImageFeatures | None, settings: dict[str, Any]
    ) -> None:
        has_images = encoded is not None or images.pixel_values is not None
        has_cache = settings.get("cache") is not None or settings.get("past_key_values") is not None
        if ids is not None and not has_images and not has_cache and bool((ids == self.config.image_token_id).any()):
            raise ValueError(
                "the prompt has image tokens but there are no images; pass pixel_values, as the processor made them"
            )
        has_regions = images.region_cells is not None or getattr(encoded, "region_tokens", None) is not None
        if settings.get("prefill_chunk_size") and (has_regions or (has_images and not PREFILLS_IMAGES_IN_CHUNKS)):
            lost = "regions" if has_regions else "images"
            raise ValueError(f"prefill_chunk_size loses {lost} in transformers {__version__}; leave it out")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images enter with the prompt; later steps find them in the cache."""
        if kwargs.get("use_cache", True) and not is_first_iteration:
            kwargs.pop(ENCODED, None)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats each sample for beams and multiple answers, together with its images and regions.

        transformers has no public hook here, and its own expansion repeats images without their regions.
        """
        encoded = (model_kwargs.get(ENCODED) or {}).get("image")
        if expand_size > 1 and encoded is not None:
            del model_kwargs[ENCODED]
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
    """Repeats the tokens of each sample; (K, D) tokens of all samples in order, `places` (B, S) where they belong.

    Raises:
        ValueError: if tokens and places differ in number. After the repetition they might agree by chance.
    """
    counts = places.sum(dim=1).tolist()
    if sum(counts) != tokens.shape[0]:
        raise ValueError(
            f"the prompts hold {sum(counts)} {kind} tokens but {tokens.shape[0]} were given; pass images and regions of"
            " exactly these prompts, with the scale_factors that the processor gave with them"
        )
    return torch.cat([sample for sample in tokens.split(counts) for _ in range(times)])

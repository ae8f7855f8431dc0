"""Images to vLLM's inputs, through `TokenPackerProcessor`.

Shapes: N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.transformers_utils.processor import cached_get_processor

from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.keywords import check_names
from tokenpacker.hf.processing.pictures import to_source
from tokenpacker.images import image_size, upright
from tokenpacker.router import AUTO, own_router
from tokenpacker.sequence import ImageLayout

OPTIONS = ("scale_factor", "max_image_tokens")  # others could make tiles that the model does not take


class ImageInfo(BaseProcessingInfo):
    """The model's processor, and what it says before a model runs."""

    @cached_property
    def processor(self) -> TokenPackerProcessor:
        """The model's processor."""
        config = self.ctx.model_config
        return cached_get_processor(
            config.model, revision=config.revision, processor_cls=TokenPackerProcessor, tokenizer=self.get_tokenizer()
        )

    def get_hf_processor(self, **kwargs: object) -> TokenPackerProcessor:
        """The model's processor; options belong to its calls."""
        return self.processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def parse_mm_data(self, mm_data: Mapping[str, Any], *, validate: bool = True) -> MultiModalDataItems:
        """Turns pictures upright, as vLLM's caches know them by their pixels alone, and calls vLLM's method."""
        given = mm_data.get("image")
        pictures = [given] if isinstance(given, Image.Image) else given
        if isinstance(pictures, (list, tuple)):
            turned = [upright(one) if isinstance(one, Image.Image) else one for one in pictures]
            mm_data = {**mm_data, "image": turned}
        return super().parse_mm_data(mm_data, validate=validate)

    def image_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """`mm_processor_kwargs` of a request, over those of the engine.

        Raises:
            ValueError: for an unknown name, and for a list of scale factors: vLLM keeps each image by itself.
        """
        options: dict[str, Any] = self.ctx.get_mm_config().merge_mm_processor_kwargs(given)
        check_names(options, OPTIONS, "mm_processor_kwargs")
        for name, value in options.items():
            if not (value is None or type(value) is int or (name == "scale_factor" and value == AUTO)):
                raise ValueError(f"{name}={value!r} must be one whole number for all images of a request")
        self.processor.check_plan(**options)
        return options

    def check_prompt(self, token_ids: Sequence[int], num_images: int) -> None:
        """Raises ValueError if marks and images differ in number, and for a mark of a region."""
        processor = self.processor
        if processor.region_token_id in token_ids:
            raise ValueError(f"{processor.region_token} stands for a region, which vLLM cannot serve; leave it out")
        marks = list(token_ids).count(processor.image_token_id)
        if marks != num_images:
            raise ValueError(
                f"the prompt has {marks} marks {processor.image_token} for {num_images} images; write one for each"
            )

    def layout(self, image: Any, options: Mapping[str, Any]) -> ImageLayout:
        """The token sequence of an image."""
        if options.get("scale_factor") == AUTO:
            return self.processor.plan_image(image, **options).layout
        return self.processor.image_layout(image_size(to_source(image)), **options)

    @cached_property
    def most_detail(self) -> dict[str, Any]:
        """What `scale_factor="auto"` of the engine gives an image full of detail."""
        options = self.image_options({})
        is_auto = options.get("scale_factor") == AUTO
        return {"scale_factor": own_router(self.processor.router).finest} if is_auto else {}

    @cached_property
    def largest(self) -> tuple[tuple[int, int], int]:
        """(height, width) of an image with the most packed tokens under the engine's options, and their number."""
        options, processor = self.image_options(self.most_detail), self.processor
        most, (height, width) = processor.image_processor.max_tiles, processor.image_processor.tile_size
        sizes = [(rows * height, cols * width) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
        counts = [sum(processor.image_layout(size, **options).tile_tokens) for size in sizes]
        return max(zip(sizes, counts, strict=True), key=lambda entry: entry[1])

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most packed tokens of an image under the engine's options."""
        return {"image": self.largest[1]}


class LargestImages(BaseDummyInputsBuilder[ImageInfo]):
    """The inputs with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A mark for each image."""
        return self.info.processor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Images with the most packed tokens."""
        height, width = self.info.largest[0]
        count, overrides = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):
    """Tiles of images, and the ids of the tokens that stand in the prompt for each image."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """vLLM's, at the scale factor that costs most."""
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs=self.info.most_detail)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Checks the prompt and calls vLLM's method."""
        self.info.check_prompt(inputs.prompt, inputs.mm_data_items.get_count("image", strict=False))
        return super().apply(inputs, timing_ctx)

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        options = self.info.image_options(hf_kwargs)
        if not mm_items.get_count("image", strict=False):  # all of them are in vLLM's cache
            return BatchFeature()
        images = mm_items.get_items("image", ImageProcessorItems).get_all()
        data = self.info.processor(images=list(images), return_tensors="pt", **options)
        data["num_tiles"] = torch.tensor([self.info.layout(image, options).tile_grid.num_tiles for image in images])
        data["pixel_values"] = data["pixel_values"].to(self.info.ctx.model_config.dtype)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),  # (N, 3, h, w)
            "scale_factors": MultiModalFieldConfig.flat_from_sizes("image", num_tiles, keep_on_cpu=True),  # (N,)
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, options = self.info.processor, self.info.image_options(hf_processor_mm_kwargs)
        mark = processor.image_token_id

        def tokens(index: int) -> PromptUpdateDetails:
            layout = self.info.layout(mm_items.get_items("image", ImageProcessorItems).get(index), options)
            ids = layout.token_ids(mark, processor.tile_separator_id, processor.row_separator_id)
            return PromptUpdateDetails.select_token_id(ids, mark)  # separators keep their own embeddings

        return [PromptReplacement("image", [mark], tokens)]

"""Images and prompts to vLLM's inputs, through `TokenPackerProcessor`.

Shapes: N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.transformers_utils.processor import cached_get_processor

from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.keywords import TokenPackerImagesKwargs, check_names

ARRAYS_ONLY = {"input_data_format", "return_tensors"}
OPTIONS = set(TokenPackerImagesKwargs.__annotations__) - ARRAYS_ONLY


class ProcessingInfo(BaseProcessingInfo):
    """The processor and what it says about numbers of tokens."""

    @cached_property
    def processor(self) -> TokenPackerProcessor:
        """The model's processor."""
        config = self.ctx.model_config
        return cached_get_processor(
            config.model, revision=config.revision, processor_cls=TokenPackerProcessor, tokenizer=self.get_tokenizer()
        )

    def get_hf_processor(self, **kwargs: object) -> TokenPackerProcessor:
        """The model's processor; options belong to calls."""
        return self.processor

    def image_options(self, given: Mapping[str, object]) -> dict[str, Any]:
        """`mm_processor_kwargs` of a request over those of the engine.

        Raises:
            ValueError: for an unknown name, and for a list of scale factors: vLLM caches each image by itself.
        """
        merged = self.ctx.get_mm_config().merge_mm_processor_kwargs(given)
        options = {**merged, **merged.pop("images_kwargs", {})}
        check_names(options, OPTIONS, "mm_processor_kwargs of tokenpacker")
        factor = options.get("scale_factor")
        if factor is not None and type(factor) is not int:
            raise ValueError(f"scale_factor={factor!r} must be one number for all images of a request")
        return options

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    @cached_property
    def largest(self) -> tuple[tuple[int, int], int]:
        """(height, width) of an image with the most packed tokens under the engine's options, and their number."""
        options = self.image_options({})
        images = self.processor.image_processor.with_options(
            **{name: value for name, value in options.items() if name not in ("scale_factor", "max_image_tokens")}
        )
        (height, width), most = images.tile_size, images.max_tiles
        sizes = [
            (rows * height, cols * width) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)
        ]
        counts = {size: sum(self.processor.image_layout(size, **options).tile_tokens) for size in sizes}
        size = max(sizes, key=counts.__getitem__)
        return size, counts[size]

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """The most packed tokens of an image under the engine's options."""
        return {"image": self.largest[1]}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """Images with which vLLM measures its memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A mark for each image."""
        return self.info.processor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        """Images with the most tokens."""
        height, width = self.info.largest[0]
        number = mm_counts.get("image", 0)
        images = self._get_dummy_images(
            width=width, height=height, num_images=number, overrides=mm_options.get("image")
        )
        return {"image": images}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Calls `TokenPackerProcessor` for the images, and gives vLLM the ids of their tokens."""

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        options = self.info.image_options(hf_kwargs)
        if not mm_items.get_count("image", strict=False):
            return BatchFeature()
        images = mm_items.get_items("image", ImageProcessorItems).get_all()
        processor = self.info.processor
        sizes = [(image.height, image.width) for image in images]
        data = processor(images=images, return_tensors="pt", **options)
        layouts = [processor.image_layout(size, **options) for size in sizes]
        data["num_tiles"] = torch.tensor([layout.tile_grid.num_tiles for layout in layouts])
        data["pixel_values"] = data["pixel_values"].to(self.info.ctx.model_config.dtype)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        tiles = hf_inputs.get("num_tiles", torch.empty(0))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", tiles),
            "scale_factors": MultiModalFieldConfig.flat_from_sizes("image", tiles, keep_on_cpu=True),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        processor, options = self.info.processor, self.info.image_options(hf_processor_mm_kwargs)

        def replacement(index: int) -> PromptUpdateDetails:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(index)
            layout = processor.image_layout((size.height, size.width), **options)
            ids = processor._image_tokens(layout).ids
            return PromptUpdateDetails.select_token_id(ids, processor.image_token_id)

        return [PromptReplacement("image", [processor.image_token_id], replacement)]

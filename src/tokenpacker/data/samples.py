"""Records to samples: token ids, labels and pixel tiles. The one place where a training sample is made.

    record -> conversation with marks -> ids and labels (`labels`) -> each mark its image's tokens -> tiles

A sample with one image follows the rule of the released weights: the marks of a message become one, in front of its
text. In a sample with several images every mark stays where it was written, and the k-th mark is the k-th image, cut
into its own grid. (The original merged there too, and gave all images of a sample the first one's grid.)

Shapes: S sequence length, N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from tokenpacker.data.labels import (
    GPT,
    Example,
    TrainingFormat,
    check_conversation,
    expand,
    prepare_example,
)
from tokenpacker.data.rows import ImageReference, Kind, Record, RecordError
from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.pictures import to_rgb
from tokenpacker.images import MAX_PIXELS, ImageError, image_size
from tokenpacker.sequence import IGNORED, ImageLayout
from tokenpacker.tiling import TileGrid

UNBOUNDED = int(1e30)  # nothing is cut: what is too long is left out whole


@dataclass(frozen=True, kw_only=True)
class Length:
    """What a sample costs: `tokens` in all, `image_tokens` of these with separators, `tiles` for the encoder.

    Each of its `regions` is a token too.
    """

    tokens: int
    image_tokens: int
    tiles: int
    regions: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample.

    Args:
        input_ids: (S,), image tokens in place.
        labels: (S,), IGNORED where nothing is learned; always at the first place and at image tokens.
        attention_mask: (S,), 0 at padding tokens: the original took a literal `<unk>` for one.
        pixel_values: (N, 3, h, w); N is 0 without images.
        tile_grids: one per image, in the order of the marks.
        region_cells: (R, P, L), the weight of each patch in each region; None of a model that knows no regions.
        region_first_tile: (R,), where the tiles of the region's image begin.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    tile_grids: tuple[TileGrid, ...]
    region_cells: Tensor | None = None
    region_first_tile: Tensor | None = None


class SampleMaker:
    """Makes samples, always the same from the same record.

    Args:
        processor: the model's; it decides about tiles and tokens.
        chat_format: v1 for conversations, plain for captions.
        max_length: longest sample in tokens, image tokens included; longer ones are rejected, never cut.
        max_image_tokens: budget per image, separators included.
        max_pixels: largest image, as a bound on what decoding takes: 12 bytes a pixel for its floats alone.

    Raises:
        ValueError: for an unknown format and limits that no sample can meet.
    """

    def __init__(
        self,
        processor: TokenPackerProcessor,
        chat_format: TrainingFormat = "v1",
        max_length: int = 2048,
        *,
        max_image_tokens: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if chat_format not in get_args(TrainingFormat):
            raise ValueError(
                f"chat_format={chat_format!r} is unknown; use one of {', '.join(get_args(TrainingFormat))}"
            )
        if min(max_length, max_pixels) < 1:
            raise ValueError(f"max_length={max_length} and max_pixels={max_pixels} must be at least 1")
        self.processor = processor
        self.chat_format: TrainingFormat = chat_format
        self.max_length = max_length
        self.max_image_tokens = max_image_tokens
        self.max_pixels = max_pixels
        self.check_scale_factor(None)

    def check_scale_factor(self, scale_factor: int | None) -> None:
        """Raises ValueError for a scale factor that the projector does not have, and a budget too small for it."""
        tile_height, tile_width = self.processor.image_processor.tile_size
        self._layout((tile_height, tile_width), scale_factor)

    @property
    def fingerprint(self) -> str:
        """Changes with everything that may change a sample's ids or lengths: formats, limits, processor, tokenizer."""
        tokenizer = self.processor.tokenizer
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of the last call, no part of the tokenizer
            backend.pop(state, None)
        limits = [self.chat_format, self.max_length, self.max_image_tokens, self.max_pixels]
        tokens = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        variant = tokenizer.init_kwargs.get("llama_variant")
        settings = [limits, self.processor.to_dict(), backend, tokens, variant]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def length(self, record: Record, scale_factor: int | None = None) -> Length:
        """The exact lengths of the sample that `make` makes, from the headers of the images alone.

        Raises:
            RecordError: as `make`, except for images that only decoding shows to be damaged.
        """
        example, layouts = self._prepare(record, scale_factor)
        if record.regions:
            self._region_inputs(record, [layout.tile_grid for layout in layouts])  # raises as it does for `make`
        return Length(
            tokens=len(example.input_ids),
            image_tokens=sum(layout.num_tokens for layout in layouts),
            tiles=sum(layout.tile_grid.num_tiles for layout in layouts),
            regions=sum(map(len, record.regions)),
        )

    def make(self, record: Record, scale_factor: int | None = None) -> Sample:
        """The sample of a record.

        Args:
            scale_factor: None takes the projector's own; the model must be given the same.

        Raises:
            RecordError: for a malformed conversation; a missing, damaged or too large image; another number of marks
                than of images or regions; a region that the model would not see; a sample longer than `max_length`, or
                one from which nothing would be learned.
        """
        example, layouts = self._prepare(record, scale_factor)
        grids = tuple(layout.tile_grid for layout in layouts)
        try:
            pictures = [to_rgb(image) for image in record.images]
            tiles = self.processor.image_processor(pictures, tile_grids=grids)["pixel_values"]
        except ImageError as error:
            raise RecordError(record.id, str(error), "unreadable image") from None
        return Sample(
            id=record.id,
            input_ids=torch.tensor(example.input_ids),
            labels=torch.tensor(example.labels),
            attention_mask=torch.tensor(example.attention_mask),
            pixel_values=tiles,
            tile_grids=grids,
            **self._region_inputs(record, grids),
        )

    def _prepare(self, record: Record, scale_factor: int | None) -> tuple[Example, list[ImageLayout]]:
        """Ids and labels with all image tokens in place, and each image's layout."""
        layouts = [self._layout(self._size(record.id, image), scale_factor) for image in record.images]
        example = self._example(record)
        processor = self.processor
        mark = processor.image_token_id
        num_marks = example.input_ids.count(mark)
        if num_marks != len(layouts):
            raise RecordError(
                record.id,
                f"the conversation has {num_marks} image marks for {len(layouts)} images; write"
                f" {processor.image_token} once for each image",
                "images and marks differ",
            )
        self._check_region_marks(record, example)
        separators = processor.tile_separator_id, processor.row_separator_id
        example = expand(example, mark, [layout.token_ids(mark, *separators) for layout in layouts])
        num_tokens = len(example.input_ids)
        if num_tokens > self.max_length:
            raise RecordError(
                record.id,
                f"the sample has {num_tokens} tokens, more than max_length={self.max_length}; raise it, shorten the"
                " conversation, or bound images with max_image_tokens",
                "too long",
            )
        if all(label == IGNORED for label in example.labels):
            answered = any(message["from"] == GPT for message in record.conversation)
            reason = (answered and example.problem) or "the sample has no answer to learn; write one from 'gpt'"
            raise RecordError(record.id, reason, "nothing to learn")
        return example, layouts

    def _check_region_marks(self, record: Record, example: Example) -> None:
        """Raises RecordError where regions and their marks differ in number, or the model does not know regions."""
        num_regions, mark = sum(map(len, record.regions)), self.processor.region_token_id
        kind: Kind = "regions and marks differ"
        if mark is None:
            if num_regions:
                reason = (
                    f"the row has {num_regions} regions, and the model knows none; train it with 'regions' among the"
                    " parts, or take them out"
                )
                raise RecordError(record.id, reason, kind)
            return
        num_marks = example.input_ids.count(mark)
        if num_marks != num_regions:
            reason = (
                f"the conversation has {num_marks} region marks for {num_regions} regions; write"
                f" {self.processor.region_token} once for each region"
            )
            raise RecordError(record.id, reason, kind)

    def _region_inputs(self, record: Record, grids: Sequence[TileGrid]) -> dict[str, Tensor]:
        """The weights of patches in regions; nothing for a model that knows none."""
        if self.processor.region_token_id is None:
            return {}
        sizes = [self._size(record.id, image) for image in record.images] if record.regions else []
        regions = [list(entries) for entries in record.regions]
        try:
            return dict(self.processor.region_inputs(regions, sizes, grids if regions else []))
        except ValueError as error:
            raise RecordError(record.id, str(error), "malformed region") from None

    def _layout(self, size: tuple[int, int], scale_factor: int | None) -> ImageLayout:
        return self.processor.image_layout(size, scale_factor=scale_factor, max_image_tokens=self.max_image_tokens)

    def _size(self, id: str, image: ImageReference) -> tuple[int, int]:
        try:
            height, width = image_size(image)
        except ImageError as error:
            missing = isinstance(image, str) and not os.path.exists(image)
            raise RecordError(id, str(error), "missing image" if missing else "unreadable image") from None
        if height * width > self.max_pixels:
            reason = (
                f"an image is {height}x{width}, more than max_pixels={self.max_pixels}; shrink it, or raise the limit"
            )
            raise RecordError(id, reason, "unreadable image")
        return height, width

    def _example(self, record: Record) -> Example:
        """Ids and labels, each image still one mark."""
        tokenizer = self.processor.tokenizer
        try:
            if not record.images and _has_mark(record, self.processor.image_token):
                # Read as text it would teach the model to speak of an image that it was not shown.
                raise RecordError(
                    record.id,
                    f"the conversation has {self.processor.image_token} but the row no image; add the image, or take"
                    " the mark out",
                    "images and marks differ",
                )
            return prepare_example(
                record.conversation,
                tokenizer,
                has_image=bool(record.images),
                format=self.chat_format,
                max_length=UNBOUNDED,
                merge_marks=len(record.images) < 2,
            )
        except RecordError:
            raise
        except ValueError as error:
            raise RecordError(record.id, str(error), "malformed conversation") from None


def _has_mark(record: Record, mark: str) -> bool:
    return any(mark in message["value"] for message in check_conversation(record.conversation))

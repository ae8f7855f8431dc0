"""A `Record` to a `Sample`: token ids, labels and pixel tiles. Every training sample is made here.

    record -> ids and labels with one mark per image (`labels`) -> each mark replaced by its image's tokens -> tiles

Released weights need this: in a sample with one image, the marks of a message become one in front of its text. In a
sample with several images every mark stays in its place, and the k-th mark is the k-th image, cut into its own grid.
(The original merged those marks too, and cut all images of a sample into the grid of the first.)

Shapes: S sequence length, N tiles of all images in order, (h, w) tile size.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from tokenpacker.data.labels import GPT, Example, TrainingFormat, expand, prepare_example
from tokenpacker.data.rows import ImageReference, Kind, Record, RecordError
from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.hf.processing.pictures import to_rgb
from tokenpacker.images import ImageError, image_size
from tokenpacker.sequence import IGNORED, ImageLayout
from tokenpacker.tiling import TileGrid

UNBOUNDED = int(1e30)  # nothing is cut: a sample that is too long is rejected


class Length(NamedTuple):
    """Size of a sample: all `tokens`, `image_tokens` among them with separators, `tiles`, `images` and `regions`."""

    tokens: int
    image_tokens: int
    tiles: int
    images: int
    regions: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sample.

    Args:
        input_ids: (S,), image tokens in place.
        labels: (S,), IGNORED where nothing is learned; always at the first token and at image tokens.
        attention_mask: (S,), 0 at padding tokens. The original took a literal `<unk>` for one.
        pixel_values: (N, 3, h, w); N is 0 without images.
        tile_grids: one per image, in the order of the marks.
        region_cells: (R, P, L), the weight of each patch in each region; None for a model without regions.
        region_first_tile: (R,), the first tile of the region's image.
        scale_factors: (N,), of tiles that drew their own; None if all have that of the step.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    tile_grids: tuple[TileGrid, ...]
    region_cells: Tensor | None = None
    region_first_tile: Tensor | None = None
    scale_factors: Tensor | None = None


@dataclass(frozen=True)
class Mixed:
    """Scale factors of which each tile draws one. `seed` and the record's id decide."""

    scale_factors: tuple[int, ...]
    seed: str

    def draw(self, record_id: str, counts: Sequence[int]) -> list[list[int]]:
        """For each image the scale factors of so many tiles."""
        rng = random.Random(f"{self.seed}/{record_id}")
        return [rng.choices(self.scale_factors, k=count) for count in counts]


class SampleMaker:
    """Makes samples. The same record always gives the same sample.

    Args:
        processor: of the model; decides about tiles and tokens.
        chat_format: v1 for conversations, plain for captions.
        max_length: tokens of the longest sample, image tokens included; longer ones are rejected, never cut.
        max_tiles: of the largest sample; larger ones are rejected.
        max_image_tokens: budget per image, separators included.

    Raises:
        ValueError: for an unknown format and for limits that no sample can meet.
    """

    def __init__(
        self,
        processor: TokenPackerProcessor,
        chat_format: TrainingFormat = "v1",
        max_length: int = 2048,
        *,
        max_tiles: int | None = None,
        max_image_tokens: int | None = None,
    ) -> None:
        if chat_format not in get_args(TrainingFormat):
            raise ValueError(
                f"chat_format={chat_format!r} is unknown; use one of {', '.join(get_args(TrainingFormat))}"
            )
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        self.processor = processor
        self.chat_format: TrainingFormat = chat_format
        self.max_length = max_length
        self.max_tiles = max_tiles
        self.max_image_tokens = max_image_tokens
        self.check_scale_factor(None)

    def check_scale_factor(self, scale_factor: int | None) -> None:
        """Raises ValueError if the projector lacks the scale factor, or the image budget is too small for it."""
        tile_height, tile_width = self.processor.image_processor.tile_size
        self._layout((tile_height, tile_width), scale_factor)

    @property
    def fingerprint(self) -> str:
        """Changes with all that may change the ids or lengths of samples: formats, limits, processor, tokenizer."""
        tokenizer = self.processor.tokenizer
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("padding", "truncation"):  # of the last call
            backend.pop(state, None)
        limits = [self.chat_format, self.max_length, self.max_tiles, self.max_image_tokens]
        tokens = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        variant = tokenizer.init_kwargs.get("llama_variant")
        settings = [limits, self.processor.to_dict(), backend, tokens, variant]
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def length(self, record: Record, scale_factor: int | None = None) -> Length:
        """The exact length of the sample that `make` makes, from the headers of the images alone.

        Raises:
            RecordError: for a record that `make` would refuse, unless only decoding its images shows the damage.
        """
        example, layouts = self._prepare(record, scale_factor)
        if record.regions:
            self._region_inputs(record, [layout.tile_grid for layout in layouts])  # only for its errors
        return Length(
            tokens=len(example.input_ids),
            image_tokens=sum(layout.num_tokens for layout in layouts),
            tiles=sum(layout.tile_grid.num_tiles for layout in layouts),
            images=len(record.images),
            regions=sum(map(len, record.regions)),
        )

    def make(self, record: Record, scale_factor: int | Mixed | None = None) -> Sample:
        """The sample of a record.

        Args:
            scale_factor: None takes the projector's own. The model must be called with the same, or with those that
                the sample has.

        Raises:
            RecordError: if the conversation is malformed; an image is missing, damaged or too large; marks differ in
                number from images or regions; the model would not see a region; the sample exceeds `max_length` or
                `max_tiles`, or nothing would be learned from it.
        """
        factors = None
        if isinstance(scale_factor, Mixed):
            finest = min(scale_factor.scale_factors)
            sizes = [self._size(record, image) for image in record.images]
            counts = [self._layout(size, finest).tile_grid.num_tiles for size in sizes]
            factors = scale_factor.draw(record.id, counts)
            example, layouts = self._prepare(record, factors)
        else:
            example, layouts = self._prepare(record, scale_factor)
        grids = tuple(layout.tile_grid for layout in layouts)
        try:
            pictures = [to_rgb(image) for image in record.images]
            tiles = self.processor.image_processor(pictures, tile_grids=grids)["pixel_values"]
        except ImageError as error:
            raise _reject(record, str(error), "unreadable image") from None
        return Sample(
            id=record.id,
            input_ids=torch.tensor(example.input_ids),
            labels=torch.tensor(example.labels),
            attention_mask=torch.tensor(example.attention_mask),
            pixel_values=tiles,
            tile_grids=grids,
            scale_factors=None if factors is None else torch.tensor([*chain(*factors)], dtype=torch.int64),
            **self._region_inputs(record, grids),
        )

    def _prepare(self, record: Record, scale_factor: int | list[list[int]] | None) -> tuple[Example, list[ImageLayout]]:
        """Ids and labels with all image tokens in place, and the layout of each image."""
        entries: Sequence[Any] = scale_factor if isinstance(scale_factor, list) else [scale_factor] * len(record.images)
        sizes = [self._size(record, image) for image in record.images]
        layouts = [self._layout(size, entry) for size, entry in zip(sizes, entries, strict=True)]
        example = self._example(record)
        processor = self.processor
        mark = processor.image_token_id
        num_marks = example.input_ids.count(mark)
        if num_marks != len(layouts):
            raise _reject(
                record,
                f"the conversation has {num_marks} image marks for {len(layouts)} images; write"
                f" {processor.image_token} once for each image",
                "images and marks differ",
            )
        self._check_region_marks(record, example)
        separators = processor.tile_separator_id, processor.row_separator_id
        example = expand(example, mark, [layout.token_ids(mark, *separators) for layout in layouts])
        num_tokens, num_tiles = len(example.input_ids), sum(layout.tile_grid.num_tiles for layout in layouts)
        if num_tokens > self.max_length:
            raise _reject(
                record,
                f"the sample has {num_tokens} tokens, more than max_length={self.max_length}; raise it, shorten the"
                " conversation, or bound images with max_image_tokens",
                "too long",
            )
        if self.max_tiles is not None and num_tiles > self.max_tiles:
            raise _reject(
                record,
                f"the sample has {num_tiles} tiles, more than max_tiles_per_batch={self.max_tiles}; raise it, or"
                " lower model.max_tiles",
                "too long",
            )
        if all(label == IGNORED for label in example.labels):
            answered = any(message["from"] == GPT for message in record.conversation)
            reason = (answered and example.problem) or "the sample has no answer to learn; write one from 'gpt'"
            raise _reject(record, reason, "nothing to learn")
        return example, layouts

    def _check_region_marks(self, record: Record, example: Example) -> None:
        """Raises RecordError if regions and their marks differ in number, or the model has no regions."""
        num_regions, mark = sum(map(len, record.regions)), self.processor.region_token_id
        if mark is None and num_regions:
            raise _reject(
                record,
                f"the row has {num_regions} regions, and the model knows none; train it with 'regions' among the parts,"
                " or take them out",
                "regions and marks differ",
            )
        num_marks = 0 if mark is None else example.input_ids.count(mark)
        if num_marks != num_regions:
            raise _reject(
                record,
                f"the conversation has {num_marks} region marks for {num_regions} regions; write"
                f" {self.processor.region_token} once for each region",
                "regions and marks differ",
            )

    def _region_inputs(self, record: Record, grids: Sequence[TileGrid]) -> dict[str, Tensor]:
        """The weight of each patch in each region; empty for a model without regions."""
        if self.processor.region_token_id is None:
            return {}
        sizes = [self._size(record, image) for image in record.images] if record.regions else []
        regions = [list(entries) for entries in record.regions]
        try:
            return dict(self.processor.region_inputs(regions, sizes, grids if regions else []))
        except ValueError as error:
            raise _reject(record, str(error), "malformed region") from None

    def _layout(self, size: tuple[int, int], scale_factor: int | list[int] | None) -> ImageLayout:
        return self.processor.image_layout(size, scale_factor=scale_factor, max_image_tokens=self.max_image_tokens)

    def _size(self, record: Record, image: ImageReference) -> tuple[int, int]:
        try:
            return image_size(image)
        except ImageError as error:
            missing = isinstance(image, str) and not os.path.exists(image)
            raise _reject(record, str(error), "missing image" if missing else "unreadable image") from None

    def _example(self, record: Record) -> Example:
        """Ids and labels with one mark per image."""
        image_token = self.processor.image_token
        if not record.images and any(image_token in message["value"] for message in record.conversation):
            # Read as text, the mark would teach the model to speak of an image that it was not shown.
            raise _reject(
                record,
                f"the conversation has {image_token} but the row no image; add the image, or take the mark out",
                "images and marks differ",
            )
        try:
            return prepare_example(
                record.conversation,
                self.processor.tokenizer,
                has_image=bool(record.images),
                format=self.chat_format,
                max_length=UNBOUNDED,
                merge_marks=len(record.images) < 2,
            )
        except ValueError as error:
            raise _reject(record, str(error), "malformed conversation") from None


def _reject(record: Record, reason: str, kind: Kind) -> RecordError:
    return RecordError(record.id, reason, kind, record.source)

"""Images, regions and prompts to model inputs: places, orders and counts every image token.

Shapes: B samples, S sequence length, N tiles and R regions of all samples in order, P tiles of an image at most, L
patches of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from tokenpacker.hf.chat import chat_template as default_chat_template
from tokenpacker.hf.config import TokenPackerConfig
from tokenpacker.hf.image_processor import TokenPackerImageProcessor
from tokenpacker.hf.masks import split_regions
from tokenpacker.hf.pictures import to_source
from tokenpacker.hf.region_cells import Canvas, region_entries, region_tensors
from tokenpacker.hf.tokenizer import REGION_TOKEN, encode_as_trained
from tokenpacker.images import image_size
from tokenpacker.projectors import config_from_dict
from tokenpacker.regions import RegionRule, check_rule
from tokenpacker.sequence import ImageLayout, plan_layout
from tokenpacker.text import check_text
from tokenpacker.tiling import TileGrid

RowSeparator = Literal["newline", "unknown"]


class TokenPackerProcessor(ProcessorMixin):
    """Tokenizer, image processor and the projector's count in one.

    Args:
        image_processor: a `TokenPackerImageProcessor`.
        tokenizer: any tokenizer that knows `image_token` as one token.
        chat_template: Jinja template; Vicuna's format when None.
        patch_grid: (rows, cols) of patches in one tile.
        projector_config: dict of the model's projector, which counts the tokens of a tile.
        image_token: marks an image's place in a prompt.
        row_separator: token after each row of tiles and after the thumbnail: "newline" is what the tokenizer makes of
            a line break. "unknown" is its unknown token, which the released weights need: the original looked the
            line break up as a vocabulary entry, and LLaMA's has none. (Between the tiles of a row stands a comma.)
        region_rule: how much a patch counts for a region, see `tokenpacker.regions.RegionRule`. A tokenizer without
            the token `<mask>` belongs to a model without regions; there `<mask>` is ordinary text.

    Raises:
        ValueError: when the tokenizer lacks the image token or the row separator, and for an unknown rule.
    """

    def __init__(
        self,
        image_processor: TokenPackerImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        patch_grid: Sequence[int] = (24, 24),
        projector_config: dict[str, Any] | None = None,
        image_token: str = "<image>",
        row_separator: RowSeparator = "newline",
        region_rule: RegionRule = "coverage",
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        self.patch_grid = list(patch_grid)
        self.projector_config = projector_config or {"name": "token-packer", "vision_dim": 1024, "language_dim": 4096}
        self.row_separator = _check_row_separator(row_separator, tokenizer)
        self.region_rule = check_rule(region_rule)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or default_chat_template())

    @classmethod
    def from_config(
        cls,
        config: TokenPackerConfig,
        tokenizer: PreTrainedTokenizerBase,
        row_separator: RowSeparator = "newline",
        region_rule: RegionRule = "coverage",
        **image_processor_kwargs: Any,
    ) -> TokenPackerProcessor:
        """The processor of a model's config; further arguments go to `TokenPackerImageProcessor`."""
        image_processor = TokenPackerImageProcessor(tile_size=config.tile_size, **image_processor_kwargs)
        return cls(
            image_processor,
            tokenizer,
            patch_grid=config.patch_grid,
            projector_config=config.projector_config,
            row_separator=row_separator,
            region_rule=region_rule,
        )

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor of a saved config; one that still stores the separators' ids is refused where they differ.

        Raises:
            ValueError: when a stored id is not what the tokenizer and `row_separator` give.
        """
        built = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = built[0] if isinstance(built, tuple) else built
        for name in ("tile_separator_id", "row_separator_id"):  # constructor arguments of version 0.1.0
            stored, now = processor_dict.get(name), getattr(processor, name)
            if stored not in (None, now):
                raise ValueError(
                    f"processor_config.json has {name}={stored}, but the tokenizer gives {now}; take {name} out, and"
                    " for the unknown token after rows write row_separator='unknown'"
                )
        return built

    @property
    def tile_separator_id(self) -> int:
        """Id of the comma between the tiles of a row."""
        return _token_id(self.tokenizer, ",")

    @property
    def row_separator_id(self) -> int:
        """Id of the token after each row of tiles and after the thumbnail."""
        return self.tokenizer.unk_token_id if self.row_separator == "unknown" else _token_id(self.tokenizer, "\n")

    @property
    def region_token(self) -> str:
        """Marks a region's place in a prompt."""
        return REGION_TOKEN

    @property
    def region_token_id(self) -> int | None:
        """Id of the region token; None where the tokenizer has none, for a model without regions."""
        token_id = self.tokenizer.convert_tokens_to_ids(REGION_TOKEN)
        return None if token_id in (None, self.tokenizer.unk_token_id) else token_id

    def image_layout(
        self,
        image_size: tuple[int, int],
        *,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
        max_tiles: int | None = None,
        image_mode: str | None = None,
    ) -> ImageLayout:
        """The token sequence that an image of (height, width) gets; None takes the processor's own setting.

        Raises:
            ValueError: for a scale factor that cannot be and a budget too small for one tile.
        """
        return plan_layout(
            image_size,
            (self.image_processor.tile_size[0], self.image_processor.tile_size[1]),
            config_from_dict(self.projector_config).token_grid((self.patch_grid[0], self.patch_grid[1]), scale_factor),
            sliced=(image_mode or self.image_processor.image_mode) == "slice",
            max_tiles=self.image_processor.max_tiles if max_tiles is None else max_tiles,
            max_image_tokens=max_image_tokens,
            grid_list=self.image_processor.grid_list,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        region_masks: Any = None,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
        max_tiles: int | None = None,
        image_mode: str | None = None,
        padding: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **tokenizer_kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` (B, S), and `pixel_values` (N, 3, h, w) where there are images.

        With regions also `region_cells` (R, P, L), the weights of each patch of each tile of the region's image, and
        `region_first_tile` (R,), where the tiles of that image begin. A `scale_factor` given here must be given to the
        model too.

        Args:
            images: for one prompt an image or a list of images; for several prompts a list of lists, or a flat list
                that the markers take from in order. See `TokenPackerImageProcessor.preprocess` for the types.
            text: one prompt or several, with `<image>` where each image belongs, and `<mask>` for each region.
            region_masks: one entry per image, in order, [] or None for none: a list of its regions, (R, H, W) boolean
                masks or (R, 4) boxes; for one image also a lone region. A prompt's `<mask>` markers take the regions of
                its images in order. See `hf.masks` for the forms of a region; coordinates are those of the image as
                shown, after EXIF rotation.
            max_image_tokens: budget per image, separators included.
            padding: as for tokenizers; several prompts are padded by default when tensors are asked for.

        Raises:
            ValueError: when markers and images or regions differ in number, for masks that cannot be, and as
                `image_layout`.
        """
        if text is None:
            raise ValueError("the processor needs text; for images alone use processor.image_processor")
        prompts = [text] if isinstance(text, str) else list(text)
        for number, prompt in enumerate(prompts, start=1):
            check_text(prompt, "the prompt" if len(prompts) == 1 else f"prompt {number}")
        groups = self._group_images(images, prompts)
        regions = self._group_regions(region_masks, [len(group) for group in groups], prompts)
        pictures = [[to_source(image) for image in group] for group in groups]
        plan: dict[str, Any] = {
            "scale_factor": scale_factor,
            "max_image_tokens": max_image_tokens,
            "max_tiles": max_tiles,
            "image_mode": image_mode,
        }
        layouts = [[self.image_layout(image_size(picture), **plan) for picture in group] for group in pictures]
        if any(layouts) and tokenizer_kwargs.get("truncation"):
            raise ValueError("truncation would cut images apart; leave it out and bound them with max_image_tokens")

        encoded = self._encode(prompts, tokenizer_kwargs)
        rows = [
            self._expand(dict(zip(encoded, values, strict=True)), layout)
            for values, layout in zip(zip(*encoded.values(), strict=True), layouts, strict=True)
        ]
        batch = {key: [row[key] for row in rows] for key in encoded}
        if padding is None:
            padding = return_tensors is not None and len(prompts) > 1
        padded = self.tokenizer.pad(
            batch,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        data = dict(padded)
        if any(layouts):
            grids = [layout.tile_grid for group in layouts for layout in group]
            features = self.image_processor(pictures, tile_grids=grids, image_mode=image_mode)
            data["pixel_values"] = features["pixel_values"]
            if any(map(split_regions, regions)):
                sizes = [(height, width) for height, width in features["image_sizes"].tolist()]
                data |= self.region_inputs(regions, sizes, grids, image_mode)
        return BatchFeature(data)

    def region_inputs(
        self,
        region_masks: Any,
        image_sizes: Sequence[tuple[int, int]],
        tile_grids: Sequence[TileGrid],
        image_mode: str | None = None,
    ) -> dict[str, Tensor]:
        """`region_cells` (R, P, L) and `region_first_tile` (R,) for images of (height, width); R may be 0.

        Args:
            region_masks: as for a call.
            tile_grids: per image.

        Raises:
            ValueError: when entries and images differ in number, and for masks that cannot be.
        """
        entries = region_entries(region_masks, len(image_sizes))
        patch_grid = (self.patch_grid[0], self.patch_grid[1])
        canvases = [
            Canvas(self.image_processor, size, grid, patch_grid, image_mode)
            for size, grid in zip(image_sizes, tile_grids, strict=True)
        ]
        return region_tensors(entries, image_sizes, canvases, patch_grid[0] * patch_grid[1], self.region_rule)

    def _encode(self, prompts: list[str], tokenizer_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Ids and masks, not yet padded; a start token that the chat template has written is not added again."""
        start = self.tokenizer.bos_token
        if start and all(prompt.startswith(start) for prompt in prompts):
            tokenizer_kwargs = tokenizer_kwargs | {"add_special_tokens": False}
            if set(tokenizer_kwargs) == {"add_special_tokens"} and self.tokenizer.init_kwargs.get("llama_variant"):
                # Released weights need this: see `encode_as_trained` for what one call cannot tell.
                texts = [prompt.removeprefix(start) for prompt in prompts]
                ids = [[self.tokenizer.bos_token_id, *encode_as_trained(self.tokenizer, text)] for text in texts]
                return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        return dict(self.tokenizer(prompts, **tokenizer_kwargs))

    @property
    def model_input_names(self) -> list[str]:
        """What the model's forward takes of the processor's output."""
        return ["input_ids", "attention_mask", "pixel_values", "region_cells", "region_first_tile"]

    def _group_images(self, images: Any, prompts: list[str]) -> list[list[Any]]:
        """The images of each prompt; raises ValueError where markers and images differ in number."""
        markers = [prompt.count(self.image_token) for prompt in prompts]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        nested = [isinstance(entry, (list, tuple)) for entry in images]
        if any(nested):
            if not all(nested) or len(images) != len(prompts):
                raise ValueError(f"{len(images)} lists of images for {len(prompts)} prompts; pass one list per prompt")
            groups = [list(group) for group in images]
        else:
            self._check_markers(sum(markers), len(images), "the prompt" if len(prompts) == 1 else "the prompts")
            remaining = iter(images)
            groups = [[next(remaining) for _ in range(count)] for count in markers]
        for number, (count, group) in enumerate(zip(markers, groups, strict=True), start=1):
            self._check_markers(count, len(group), "the prompt" if len(prompts) == 1 else f"prompt {number}")
        return groups

    def _group_regions(self, region_masks: Any, num_images: list[int], prompts: list[str]) -> list[Any]:
        """The regions of each image in order; raises ValueError where a prompt's markers and regions differ."""
        entries = region_entries(region_masks, sum(num_images))
        if self.region_token_id is None:
            if any(map(split_regions, entries)):
                raise ValueError(
                    f"region_masks were given but the tokenizer has no token {REGION_TOKEN!r}; use a model"
                    " that has learned regions; tokenpacker.hf.add_regions gives another what it needs to learn them"
                )
            return entries
        start = 0
        for number, (prompt, count) in enumerate(zip(prompts, num_images, strict=True), start=1):
            num_markers = prompt.count(REGION_TOKEN)
            num_regions = sum(len(split_regions(entry)) for entry in entries[start : start + count])
            start += count
            if num_markers != num_regions:
                where = "the prompt" if len(prompts) == 1 else f"prompt {number}"
                raise ValueError(
                    f"{where} needs as many {REGION_TOKEN} markers as regions: {num_markers} markers, {num_regions}"
                    f" regions; write {REGION_TOKEN} once for each region, and give its mask in region_masks"
                )
        return entries

    def _check_markers(self, num_markers: int, num_images: int, where: str) -> None:
        if num_markers != num_images:
            raise ValueError(
                f"{where} needs as many {self.image_token} markers as images: {num_markers} markers, {num_images}"
                f" images; write {self.image_token} once for each image"
            )

    def _expand(self, row: dict[str, list[Any]], layouts: list[ImageLayout]) -> dict[str, list[Any]]:
        """One tokenized prompt with each image marker replaced by its image's tokens; other values are repeated."""
        separators = self.tile_separator_id, self.row_separator_id
        expansions = iter(layout.token_ids(self.image_token_id, *separators) for layout in layouts)
        expanded: dict[str, list[Any]] = {key: [] for key in row}
        for position, token_id in enumerate(row["input_ids"]):
            ids = next(expansions) if token_id == self.image_token_id else [token_id]
            for key, values in row.items():
                expanded[key] += ids if key == "input_ids" else [values[position]] * len(ids)
        return expanded


def _check_row_separator(name: RowSeparator, tokenizer: PreTrainedTokenizerBase) -> RowSeparator:
    if name not in get_args(RowSeparator):
        raise ValueError(f"row_separator={name!r} is unknown; use 'newline' or 'unknown'")
    if name == "unknown" and tokenizer.unk_token_id is None:
        raise ValueError("row_separator='unknown' needs a tokenizer with an unknown token; use row_separator='newline'")
    return name


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of a one-character token: the piece itself where the vocabulary has it, else what encoding ends with."""
    piece = tokenizer.convert_tokens_to_ids(text)
    if piece not in (None, tokenizer.unk_token_id):
        return piece
    return tokenizer.encode(text, add_special_tokens=False)[-1]

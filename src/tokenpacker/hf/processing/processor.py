"""Images, regions and prompts to model inputs.

Shapes: B samples, S sequence length, N tiles and R regions of all samples in order, P tiles of an image at most, L
patches of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs, Unpack

from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.processing.chat import chat_template as default_chat_template
from tokenpacker.hf.processing.chat import check_parts
from tokenpacker.hf.processing.image_plans import ImagePlan, plan_sizes, process
from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor, flatten
from tokenpacker.hf.processing.keywords import TokenPackerProcessorKwargs, check_keywords
from tokenpacker.hf.processing.llama_tokenizer import REGION_TOKEN
from tokenpacker.hf.processing.placeholders import check_images, check_prompts, check_regions, count_marks
from tokenpacker.hf.processing.prompts import ImageTokens, encode_prompts
from tokenpacker.hf.processing.scale_factors import plain, token_grids
from tokenpacker.hf.regions.masks import split_regions
from tokenpacker.hf.regions.region_cells import Canvas, region_entries, region_tensors
from tokenpacker.projectors import config_from_dict
from tokenpacker.regions import RegionRule, check_rule
from tokenpacker.router import AUTO, Router
from tokenpacker.sequence import ImageLayout, plan_layout
from tokenpacker.tiling import TileGrid

RowSeparator = Literal["newline", "unknown"]


class TokenPackerProcessor(ProcessorMixin):
    """Tokenizer, image processor, and the number of tokens that the projector makes of an image.

    Its decisions about an image travel with the inputs: `model.generate(**processor(images, text, scale_factor=3))`.

    Args:
        image_processor: a `TokenPackerImageProcessor`.
        tokenizer: any tokenizer that knows `image_token` as one token.
        chat_template: Jinja template; Vicuna's format when None.
        patch_grid: (rows, cols) of patches in one tile.
        projector_config: dict of the model's projector, which counts the tokens of a tile.
        image_token: marks an image's place in a prompt.
        row_separator: token after each row of tiles and after the thumbnail. "newline" is the tokenizer's token of a
            line break, "unknown" its unknown token. Released weights need "unknown": the original looked the line
            break up in LLaMA's vocabulary, which has none. (Between the tiles of a row stands a comma.)
        region_rule: how much a patch counts for a region, see `tokenpacker.regions.RegionRule`. For a model without
            regions, whose tokenizer has no token `<mask>`, `<mask>` is ordinary text.
        router: dict of the `Router` that `scale_factor="auto"` asks. It is fitted to a model, so there is no default.

    Raises:
        ValueError: if the tokenizer lacks the image token or the row separator, and for an unknown rule or router.
    """

    valid_processor_kwargs = TokenPackerProcessorKwargs

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
        router: dict[str, Any] | None = None,
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        self.patch_grid = list(patch_grid)
        self.projector_config = projector_config or {"name": "token-packer", "vision_dim": 1024, "language_dim": 4096}
        if row_separator not in get_args(RowSeparator):
            raise ValueError(f"row_separator={row_separator!r} is unknown; use 'newline' or 'unknown'")
        if row_separator == "unknown" and tokenizer.unk_token_id is None:
            raise ValueError(
                "row_separator='unknown' needs a tokenizer with an unknown token; use row_separator='newline'"
            )
        self.row_separator = row_separator
        self.region_rule = check_rule(region_rule)
        self.router = None if router is None else Router.from_dict(router).to_dict()
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
        """The processor of a saved config. Files of version 0.1.0 also store the ids of the separators.

        Raises:
            ValueError: if a stored id is not what the tokenizer and `row_separator` give.
        """
        built = super().from_args_and_dict(args, processor_dict, **kwargs)
        processor = built[0] if isinstance(built, tuple) else built
        for name in ("tile_separator_id", "row_separator_id"):
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
        """The mark of a region's place in a prompt."""
        return REGION_TOKEN

    @property
    def region_token_id(self) -> int | None:
        """Id of the region token; None for a model without regions, whose tokenizer has none."""
        token_id = self.tokenizer.convert_tokens_to_ids(REGION_TOKEN)
        return None if token_id in (None, self.tokenizer.unk_token_id) else token_id

    @property
    def _patch_grid(self) -> tuple[int, int]:
        return self.patch_grid[0], self.patch_grid[1]

    @property
    def model_input_names(self) -> list[str]:
        """The outputs that the model's forward takes; those about regions only for a model with regions."""
        regions = [] if self.region_token_id is None else ["region_cells", "region_first_tile"]
        return [*super().model_input_names, "scale_factors", *regions]

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the image processor that the model does not take."""
        return ["tile_grids", "image_sizes", "image_layouts", "image_plans"]

    def image_layout(
        self,
        image_size: tuple[int, int],
        *,
        scale_factor: int | Sequence[int] | None = None,
        max_image_tokens: int | None = None,
        **options: Any,
    ) -> ImageLayout:
        """The token sequence of an image of (height, width).

        Args:
            scale_factor: of all tiles, or a list with one for each tile, the thumbnail's last; None takes the
                projector's own.
            max_image_tokens: most tokens that the image may have, separators included.
            options: of the image processor, if other than its own.

        Raises:
            ValueError: for a scale factor that the projector cannot have, another number of them than of tiles, a
                budget too small for one tile, "auto", which needs the pixels, and an unknown option.
        """
        if scale_factor == AUTO:
            raise ValueError(f"scale_factor={AUTO!r} needs an image's pixels, and got its size alone; see plan_image")
        images = self.image_processor.with_options(**options)
        return plan_layout(
            (image_size[0], image_size[1]),
            (images.tile_size[0], images.tile_size[1]),
            token_grids(config_from_dict(self.projector_config), self._patch_grid, scale_factor),
            sliced=images.image_mode == "slice",
            max_tiles=images.max_tiles,
            max_image_tokens=max_image_tokens,
            grid_list=images.grid_list,
        )

    def plan_image(self, image: Any, **options: Any) -> ImagePlan:
        """The token sequence of an image, and with `scale_factor="auto"` what the router saw and chose.

        Args:
            options: about images, as in a call. Raises as a call.
        """
        return process(self, image, self._merge_kwargs(**options)["images_kwargs"])["image_plans"][0]

    def check_plan(self, **options: Any) -> None:
        """Raises ValueError for a scale factor or a budget that no image can meet, and for "auto" without a router."""
        plan_sizes(self, [(1, 1)], options)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        region_masks: Any = None,
        **kwargs: Unpack[TokenPackerProcessorKwargs],
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` (B, S); with images `pixel_values` (N, 3, h, w) and `scale_factors` (N,).

        With regions also `region_cells` (R, P, L), the weights of each patch of each tile of the region's image, and
        `region_first_tile` (R,), where the tiles of that image begin. The model takes all of it as `**inputs`.

        If a text begins with the start token, as chat templates write it, no second one is added. Tokenizers of
        released weights encode as in training, see `encode_as_trained`.

        Args:
            images: for one prompt an image or a list of images; for several prompts a list of lists, or a flat list
                that the markers take from in order. See `TokenPackerImageProcessor.preprocess` for the types.
            text: one prompt or several, with `<image>` where each image belongs, and `<mask>` for each region.
            region_masks: one entry per image, in order, [] or None for none: a list of its regions, (R, H, W) boolean
                masks or (R, 4) boxes; for one image also a lone region. A prompt's `<mask>` markers take the regions of
                its images in order. See `hf.regions.masks` for the forms of a region; coordinates are those of the
                image as shown, after EXIF rotation.
            kwargs: transformers' own, flat or in `text_kwargs` and `images_kwargs`; to the latter belong the options of
                `TokenPackerImageProcessor` and two more. `max_image_tokens` is a budget per image, separators included.
                `scale_factor` is one number for all images, or a list with one entry per image of all prompts in order:
                a number, None for the projector's own, "auto" for what `router` makes of its pixels, or a list with one
                number per tile, row by row, the thumbnail's last; for one image of several tiles that list may stand
                alone. Several prompts are padded by default if tensors are asked for.

        Raises:
            ValueError: for unknown keywords, if markers and images or regions differ in number, for masks that cannot
                be read, and as `image_layout`.
        """
        # `ProcessorMixin.__call__` writes each image's tokens into the prompt and tokenizes that text. Released weights
        # need exact ids, which this cannot give: a separator would be tokenized together with its neighbours. So the
        # same steps are taken here, and images are put in among the ids.
        check_prompts(images, text, self.image_token)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        images, prompts, *_ = self.prepare_inputs_layout(images=images, text=text)
        self.validate_inputs(images=images, text=prompts)
        regions = region_entries(region_masks, 0 if images is None else len(flatten(images)))
        check_regions(regions, prompts or [], self.image_token, known=self.region_token_id is not None)
        processed, replacements = self._process_images(images, **merged["images_kwargs"])
        layouts = processed["image_layouts"]
        data = {} if prompts is None else self._process_text(prompts, layouts, replacements, merged)
        if any(map(split_regions, regions)):
            sizes, grids = processed["image_sizes"].tolist(), [layout.tile_grid for layout in layouts]
            data |= self.region_inputs(regions, sizes, grids, merged["images_kwargs"].get("image_mode"))
        data |= {name: value for name, value in processed.items() if name not in self.unused_input_names}
        tensors = merged["text_kwargs"].get("return_tensors")
        return BatchFeature(data, tensor_type=tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Checks the conversation and calls transformers' method.

        Raises:
            ValueError: for a part of a message that the model does not read, for tools if the template has no place for
                them, and with `tokenize=True` for an image part without its image.
        """
        template = (args[0] if args else kwargs.get("chat_template")) or self.chat_template
        if kwargs.get("tools") and "tools" not in str(template):
            raise ValueError("tools were given, but the chat template has no place for them; leave tools out")
        check_parts(conversation, needs_images=bool(kwargs.get("tokenize")))
        return super().apply_chat_template(conversation, *args, **kwargs)

    def region_inputs(
        self,
        region_masks: Any,
        image_sizes: Sequence[Sequence[int]],
        tile_grids: Sequence[TileGrid],
        image_mode: str | None = None,
    ) -> dict[str, Tensor]:
        """`region_cells` (R, P, L) and `region_first_tile` (R,) for images of (height, width); R may be 0.

        Args:
            region_masks: as for a call.
            tile_grids: per image.

        Raises:
            ValueError: if entries and images differ in number, and for masks that cannot be read.
        """
        entries = region_entries(region_masks, len(image_sizes))
        images = self.image_processor.with_options(image_mode=image_mode)
        canvases = [
            Canvas(images, (height, width), grid, self._patch_grid)
            for (height, width), grid in zip(image_sizes, tile_grids, strict=True)
        ]
        return region_tensors(entries, canvases, math.prod(self.patch_grid), self.region_rule)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The tokens of an image as text, for engines that ask for one; a call gives the exact ids.

        Args:
            image_inputs: output of `_process_images` or of the image processor.
            kwargs: arguments of `image_layout`, needed with the output of the image processor.
        """
        if "image_layouts" in image_inputs:
            layout = image_inputs["image_layouts"][image_idx]
        else:
            layout = self.image_layout(image_inputs["image_sizes"][image_idx].tolist(), **kwargs)
        return "".join(self._image_tokens(layout).texts)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """For each image of (height, width) the number of its tokens, and of its rows in `pixel_values`."""
        if image_sizes is None:
            return MultiModalData()
        options = self._merge_kwargs(**kwargs)["images_kwargs"]
        plans = plan_sizes(self, [(height, width) for height, width in image_sizes], options)
        if AUTO in [plan.scale_factors for plan in plans]:
            raise ValueError(f"scale_factor={AUTO!r} needs the pixels of images, and got their sizes; give a number")
        layouts = [plan.layout for plan in plans]
        return MultiModalData(
            num_image_tokens=[layout.num_tokens for layout in layouts],
            num_image_patches=[layout.tile_grid.num_tiles for layout in layouts],
        )

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Raises ValueError if there is no input, or marks and images differ in number."""
        if images is None and text is None:
            raise ValueError(f"You need to provide at least one input to call {type(self).__name__}")
        if text is not None:
            check_images(images, text, self.image_token)

    def _merge_kwargs(
        self, ModelProcessorKwargs: Any = None, tokenizer_init_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Merges keywords as transformers does, but raises ValueError for unknown names and wrong types."""
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{type(self).__name__} takes images and text, no {name}; leave it out")
        check_keywords(kwargs, type(self).__name__)
        try:
            merged = super()._merge_kwargs(self.valid_processor_kwargs, tokenizer_init_kwargs, **kwargs)
            validate_typed_dict(TextKwargs, merged["text_kwargs"])  # which transformers does for images alone
            return merged
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from None

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        """Inputs of the model with `image_layouts` beside them, and the text that stands for each image."""
        if images is None or not flatten(images):
            factor = plain(kwargs.get("scale_factor"))
            plan_sizes(self, [], kwargs)  # options are checked without an image, too
            one = None if isinstance(factor, list) else factor
            plan_sizes(self, [self._patch_grid], kwargs | {"scale_factor": one})
            return {"image_layouts": []}, []
        processed = process(self, images, kwargs)
        return processed, [self.replace_image_token(processed, i) for i in range(len(processed["image_layouts"]))]

    def _process_text(
        self, text: list[str], layouts: Sequence[ImageLayout], replacements: list[str], merged: dict[str, Any]
    ) -> dict[str, Any]:
        options = dict(merged["text_kwargs"])
        wants_types, wants_offsets = (
            bool(options.pop(name, False) or merged.get(name))  # in text_kwargs before transformers 5.24
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )
        if "padding" not in options:
            options["padding"] = options.get("return_tensors") is not None and len(text) > 1
        remaining = map(self._image_tokens, layouts)
        images = [[next(remaining) for _ in range(count_marks(self.image_token, prompt))] for prompt in text]
        data = encode_prompts(
            self.tokenizer, text, images, self.image_token_id, options, offsets_in_expanded_text=wants_offsets
        )
        if not wants_types:
            del data["mm_token_type_ids"]
        if wants_offsets:
            _, offsets = self.get_text_with_replacements(list(text), replacements)
            for entries, shown in zip(offsets, images, strict=True):
                for entry, image in zip(entries, shown, strict=True):
                    entry["token_ids"] = image.ids  # exact, where encoding the replacement is not
            data["text_replacement_offsets"] = offsets
        return data

    def _image_tokens(self, layout: ImageLayout) -> ImageTokens:
        ids = layout.token_ids(self.image_token_id, self.tile_separator_id, self.row_separator_id)
        row_separator = self.tokenizer.unk_token if self.row_separator == "unknown" else "\n"
        return ImageTokens(ids, layout.token_ids(self.image_token, ",", row_separator))


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of a one-character token: of that piece if the vocabulary has it, else the last id of its encoding."""
    piece = tokenizer.convert_tokens_to_ids(text)
    if piece not in (None, tokenizer.unk_token_id):
        return piece
    return tokenizer.encode(text, add_special_tokens=False)[-1]

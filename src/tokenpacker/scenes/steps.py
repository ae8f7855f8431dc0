"""Training steps of generated scenes: images, or labels in their place, with conversations about them.

Item `index` of `Steps` is one whole step. It depends only on the seed and the index, so a resumed run sees the same
steps as a run without an interruption.

Shapes: N tiles of all images, K label heads, P tiles of one image, (h, w) patch grid, L = h*w, R regions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.scenes import EasyVqa, Question, easy_vqa, fine_print
from tokenpacker.scenes import marked_objects as regions
from tokenpacker.scenes.conversations import Segment, make_segment, pack
from tokenpacker.scenes.dense_labels import label_tiles
from tokenpacker.scenes.scene import IMAGE_MEAN, IMAGE_STD, Region, Scene, draw
from tokenpacker.sequence import ImageLayout
from tokenpacker.tiling import TileGrid, choose_tile_grid

ASK_CAPTION = ("describe the image.", "what is in the image?")
TWO_TURN_SHARE = 0.15
OFFICIAL_SHARE = 0.8  # of easy-VQA pictures; the others are look-alikes
TOKENS_OF_SEGMENTS = 200  # about twelve questions with their answers
REGION_FORMS: dict[regions.Form, float] = {"mask": 0.5, "rough": 0.25, "box": 0.25}  # shares of the objects
QUESTIONS_PER_KIND = 2  # about regions
ONE_TILE = TileGrid(1, 1)
Show = Literal["pixels", "labels"]


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What the training steps show and ask.

    Args:
        show: `pixels` gives pictures; `labels` gives the labels of `dense_labels`, for the language model alone.
        captions: share of images that are described instead of asked about.
        easy_share: share of steps with easy-VQA pictures; the others show fine print.
        one_tile_share: share of the steps, at the beginning, whose fine print is the size of one tile and not cut.
        paced_at: scale factor whose number of tokens decides how many images a step holds. With None it is the step's
            own, and a step of fewer tokens per image holds more images.
        tokens_per_step: limit on the image tokens of a step.
        regions: share of steps that ask about marked objects; None for a model without regions.
        mixed_share: share of steps in which each tile draws its own scale factor.
    """

    show: Show
    captions: float
    scale_factors: tuple[int, ...]
    easy_share: float = 0.3
    one_tile_share: float = 0.0
    paced_at: int | None = None
    questions_per_image: int = 12
    tokens_per_step: int = 3000
    max_images: int = 16
    max_tiles: int = 9
    tile_size: tuple[int, int] = (96, 96)
    patch_size: int = 8
    regions: float | None = None
    mixed_share: float = 0.0


@dataclass(frozen=True)
class _Shown:
    """An image of a step: a scene that is drawn when it is needed, or a picture of the official easy-VQA."""

    caption: str
    questions: tuple[Question, ...]
    scene: Scene | None = None
    image: Image.Image | None = None
    regions: tuple[Region, ...] = ()
    grid: TileGrid = ONE_TILE

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        image = self.image or self.scene
        assert image is not None, "either is given"
        return image.height, image.width


class Steps(Dataset[dict[str, Any]]):
    """A sequence of `num_steps` training steps; each is a batch for the model.

    Args:
        processor: the model's. With one that knows `<mask>`, every step has region inputs, which may be empty.

    Raises:
        ValueError: for steps about regions without a processor that knows `<mask>`, and for a processor whose chat
            template differs from the conversations of the steps.
    """

    def __init__(
        self,
        spec: StepSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_steps: int,
        seed: int,
        processor: TokenPackerProcessor | None = None,
    ) -> None:
        self.takes_regions = processor is not None and processor.region_token_id is not None
        if spec.regions and not self.takes_regions:
            raise ValueError(
                f"regions={spec.regions} needs a model that takes regions, with {regions.MASK} in its tokenizer; train"
                " its region module with region-tiny first, or leave regions out"
            )
        self.processor = processor
        self.spec = spec
        self.tokenizer = tokenizer
        self.num_steps = num_steps
        self.seed = seed
        self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        self.opening = [tokenizer.bos_token_id, *tokenizer("USER: ", add_special_tokens=False).input_ids]
        self.closing = tokenizer("\n", add_special_tokens=False).input_ids
        self.tile_separator = tokenizer(",", add_special_tokens=False).input_ids[0]
        self.image_processor = TokenPackerImageProcessor(
            tile_size=spec.tile_size, image_mean=[IMAGE_MEAN] * 3, image_std=[IMAGE_STD] * 3, image_mode="slice"
        )
        self.official = EasyVqa("train") if spec.show == "pixels" else None
        if processor is not None:
            self._require_same_prompt(processor)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"steps/{self.seed}/{index}")
        scale_factor = rng.choice(self.spec.scale_factors)
        one_tile = index < self.spec.one_tile_share * self.num_steps
        images = self._draw_images(rng, self._tokens_per_tile(self.spec.paced_at or scale_factor), one_tile)
        is_mixed = self.spec.mixed_share > 0 and rng.random() < self.spec.mixed_share
        options = self.spec.scale_factors if is_mixed else (scale_factor,)
        factors = [rng.choices(options, k=image.grid.num_tiles) if is_mixed else list(options) for image in images]
        prefixes = [self._prefix(image.grid, own) for image, own in zip(images, factors, strict=True)]
        segments = [self._segments(rng, image) for image in images]
        batch: dict[str, Any] = pack(prefixes, segments, self.tokenizer.pad_token_id)
        key = "pixel_values" if self.spec.show == "pixels" else "patch_labels"
        batch[key] = torch.cat([self._show(image) for image in images])
        if self.processor is not None and self.takes_regions:
            batch |= _region_inputs(self.processor, images, segments)
        if is_mixed:
            return batch | {"scale_factors": torch.tensor([factor for own in factors for factor in own])}
        return batch | {"scale_factor": scale_factor}

    def _require_same_prompt(self, processor: TokenPackerProcessor) -> None:
        """Raises ValueError when the processor's chat template differs from the conversations of the steps."""
        image, turns = {"type": "image"}, [Question("what?", "this", ""), Question("and that?", "that", "")]
        chat: list[dict[str, Any]] = []
        for turn in turns:
            question = {"type": "text", "text": turn.text}
            chat += [{"role": "user", "content": [question] if chat else [image, question]}]
            chat += [{"role": "assistant", "content": turn.answer}]
        asked = processor.apply_chat_template(chat, tokenize=False)
        learned = [*self.opening, self.image_token_id, *self.closing, *make_segment(self.tokenizer, turns).input_ids]
        if self.tokenizer(asked, add_special_tokens=False).input_ids != learned:
            raise ValueError(
                f"generated scenes teach {self.tokenizer.decode(learned)!r}, and the model would be asked {asked!r};"
                " set model.chat_format=bare"
            )

    def _tokens_per_tile(self, scale_factor: int) -> int:
        return (self.spec.tile_size[0] // self.spec.patch_size // scale_factor) ** 2

    def _draw_images(self, rng: random.Random, per_tile: int, one_tile: bool) -> list[_Shown]:
        """The images of one step. All have the same number of tiles, so that little padding is needed."""
        count = self.spec.max_images
        if self.spec.regions and rng.random() < self.spec.regions:
            look = rng.choice(regions.LOOKS)
            if look == "page":
                return self._alike(rng, per_tile, lambda: regions.make_scene(rng, look), _marked)
            return [_marked(regions.make_scene(rng, look), rng, ONE_TILE) for _ in range(count)]
        if rng.random() < self.spec.easy_share:
            return [self._draw_easy(rng) for _ in range(count)]
        if one_tile:
            scenes = [fine_print.make_scene(rng, one_tile=True) for _ in range(count)]
            return [_fine_print(scene, rng, ONE_TILE) for scene in scenes]
        return self._alike(rng, per_tile, lambda: fine_print.make_scene(rng), _fine_print)

    def _alike(
        self,
        rng: random.Random,
        per_tile: int,
        make: Callable[[], Scene],
        describe: Callable[[Scene, random.Random, TileGrid], _Shown],
    ) -> list[_Shown]:
        """The scenes of one step. Each has the number of tiles that the first one has."""
        scene = make()
        grid = self._grid(scene)
        num_tiles = grid.num_tiles
        count = self.spec.tokens_per_step // (num_tiles * (per_tile + 1) + TOKENS_OF_SEGMENTS)
        images = [describe(scene, rng, grid)]
        while len(images) < max(2, min(self.spec.max_images, count)):
            scene = make()
            grid = self._grid(scene)
            if grid.num_tiles == num_tiles:
                images.append(describe(scene, rng, grid))
        return images

    def _draw_easy(self, rng: random.Random) -> _Shown:
        if self.official is not None and rng.random() < OFFICIAL_SHARE:
            sample = self.official[rng.randrange(len(self.official))]
            return _Shown(sample.caption, sample.questions, image=sample.image)
        scene = easy_vqa.make_scene(rng)
        item = scene.items[0]
        return _Shown(easy_vqa.describe(item.color, item.text), tuple(easy_vqa.ask(scene, rng)), scene)

    def _grid(self, scene: Scene) -> TileGrid:
        return choose_tile_grid((scene.height, scene.width), self.spec.tile_size, self.spec.max_tiles)

    def _prefix(self, grid: TileGrid, factors: Sequence[int]) -> list[int]:
        """The ids up to the first question; `factors` has one scale factor, or one for each tile."""
        sides = [math.isqrt(self._tokens_per_tile(factor)) for factor in factors]
        grids = [(side, side) for side in sides]
        layout = ImageLayout(grid, grids if len(grids) == grid.num_tiles else grids[0])
        image = layout.token_ids(self.image_token_id, self.tile_separator, row_separator=self.closing[0])
        return [*self.opening, *image, *self.closing]

    def _segments(self, rng: random.Random, image: _Shown) -> list[Segment]:
        """A caption, or several conversations of one or two turns; marked objects are never described."""
        if not image.regions and rng.random() < self.spec.captions:
            turn = Question(rng.choice(ASK_CAPTION), image.caption, "caption")
            return [make_segment(self.tokenizer, [turn])]
        questions = rng.sample(image.questions, min(self.spec.questions_per_image, len(image.questions)))
        segments = []
        while questions:
            num_turns = 2 if rng.random() < TWO_TURN_SHARE else 1
            turns, questions = questions[:num_turns], questions[num_turns:]
            segments.append(make_segment(self.tokenizer, turns))
        return segments

    def _show(self, image: _Shown) -> Tensor:
        """(P, 3, height, width) tiles, or (P, K, h, w) labels of their patches."""
        if self.spec.show == "labels":
            assert image.scene is not None, "the official pictures are never shown as labels"
            return label_tiles(image.scene, image.grid, self.spec.tile_size, self.spec.patch_size)
        picture = image.image if image.scene is None else draw(image.scene)
        return self.image_processor([picture], tile_grids=[image.grid])["pixel_values"]


def _region_inputs(
    processor: TokenPackerProcessor, images: Sequence[_Shown], segments: Sequence[Sequence[Segment]]
) -> dict[str, Tensor]:
    """`region_cells` (R, P, L) and `region_first_tile` (R,) of every `<mask>` of a step, in order."""
    inputs = processor.region_inputs(
        [list(image.regions) for image in images],
        [image.size for image in images],
        [image.grid for image in images],
        image_mode="slice",
    )
    first_regions = accumulate((len(image.regions) for image in images), initial=0)
    marks = [
        first + place
        for first, parts in zip(first_regions, segments, strict=False)
        for part in parts
        for place in part.regions
    ]
    return {name: tensor[marks] for name, tensor in inputs.items()}


def _fine_print(scene: Scene, rng: random.Random, grid: TileGrid) -> _Shown:
    return _Shown(fine_print.describe(scene), tuple(fine_print.ask(scene, rng)), scene, grid=grid)


def _marked(scene: Scene, rng: random.Random, grid: TileGrid) -> _Shown:
    """Each object is marked in a random form."""
    forms = rng.choices(list(REGION_FORMS), list(REGION_FORMS.values()), k=len(scene.items))
    marked = tuple(regions.mark(scene, item, form, rng) for item, form in zip(scene.items, forms, strict=True))
    questions = tuple(regions.ask(scene, rng, each=QUESTIONS_PER_KIND))
    return _Shown("", questions, scene, regions=marked, grid=grid)

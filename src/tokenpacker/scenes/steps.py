"""What each training step sees: images or their descriptions, with conversations about them.

Item `index` of `Steps` is one whole step, made from (seed, index) alone: a resumed run sees exactly the steps that the
interrupted one would have seen.

Shapes: N tiles of all images, P tiles of one image, (h, w) patch grid, L = h*w, B images, S sequence length, R regions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tokenpacker.carried.encoder import IMAGE_MEAN, IMAGE_STD
from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.scenes import EasyVqa, Question, easy_vqa, fine_print
from tokenpacker.scenes import marked_objects as regions
from tokenpacker.scenes.conversations import Segment, make_segment, pack
from tokenpacker.scenes.dense_labels import label_tiles
from tokenpacker.scenes.scene import Region, Scene, draw
from tokenpacker.sequence import ImageLayout
from tokenpacker.tiling import TileGrid, choose_tile_grid

ASK_CAPTION = ("describe the image.", "what is in the image?")
TWO_TURN_SHARE = 0.15
OFFICIAL_SHARE = 0.8  # of the easy pictures; the rest are look-alikes
TOKENS_OF_SEGMENTS = 200  # about twelve questions with their answers
REGION_FORMS: dict[regions.Form, float] = {"mask": 0.5, "rough": 0.25, "box": 0.25}  # people mark as they like
QUESTIONS_PER_KIND = 2  # about regions
Show = Literal["pixels", "labels"]


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """How steps are made.

    `show` hands out pictures or, for the language model's own foundation, their dense labels. `captions` is the share
    of images that are described instead of asked about. `tokens_per_step` bounds B by the number of image tokens.
    `paced_at` is the scale factor whose tokens decide B; None takes the step's own: fewer tokens make more images then.
    `one_tile_share` of the steps, at first, show scenes that are one tile at full size, without a grid or a thumbnail.
    `regions` is the share of steps that ask about marked objects; None is none of them.
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


@dataclass(frozen=True)
class _Entry:
    """An image to be shown: `scene` where its truth is known, `image` where there is a file instead.

    One with marked objects has questions about those, and is never described.
    """

    caption: str
    questions: tuple[Question, ...]
    scene: Scene | None = None
    image: Image.Image | None = None
    regions: tuple[Region, ...] = ()


class Steps(Dataset[dict[str, Any]]):
    """`num_steps` training steps.

    Args:
        processor: of the model, where it takes regions: every step then says which there are, be it none.

    Raises: ValueError for steps about regions without a processor that knows `<mask>`, and for a processor whose
        questions are not those that are learned.
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
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        self.opening = [tokenizer.bos_token_id, *encode("USER: ")]
        self.closing = encode("\n")
        self.tile_separator, self.row_separator = encode(",")[0], encode("\n")[0]
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
        per_tile = self._tokens_per_tile(scale_factor)
        one_tile = index < self.spec.one_tile_share * self.num_steps
        entries = self._draw_entries(rng, self._tokens_per_tile(self.spec.paced_at or scale_factor), one_tile)
        prefixes = [self._prefix(grid, per_tile) for _, grid in entries]
        segments = [self._segments(rng, entry) for entry, _ in entries]
        batch: dict[str, Any] = pack(prefixes, segments, self.tokenizer.pad_token_id)
        key = "pixel_values" if self.spec.show == "pixels" else "patch_labels"
        batch[key] = torch.cat([self._show(entry, grid) for entry, grid in entries])
        if self.takes_regions:
            batch |= self._regions(entries, segments)
        return batch | {"scale_factor": scale_factor}

    def _require_same_prompt(self, processor: TokenPackerProcessor) -> None:
        """Raises ValueError where the trained model would be asked in another form than the one it learns."""
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

    def _draw_entries(self, rng: random.Random, per_tile: int, one_tile: bool) -> list[tuple[_Entry, TileGrid]]:
        """The images of one step, all of about as many tokens, so that little padding is needed."""
        grid = TileGrid(1, 1)
        if self.spec.regions and rng.random() < self.spec.regions:
            look = rng.choice(regions.LOOKS)
            make = lambda: regions.make_scene(rng, look)  # noqa: E731
            if look == "page":
                return self._alike(rng, per_tile, make, _marked_entry)
            return [(_marked_entry(make(), rng), grid) for _ in range(self.spec.max_images)]
        if rng.random() < self.spec.easy_share:
            return [(self._draw_easy(rng), grid) for _ in range(self.spec.max_images)]
        if one_tile:
            scenes = [fine_print.make_scene(rng, one_tile=True) for _ in range(self.spec.max_images)]
            return [(_fine_print_entry(scene, rng), grid) for scene in scenes]
        return self._alike(rng, per_tile, lambda: fine_print.make_scene(rng), _fine_print_entry)

    def _alike(
        self,
        rng: random.Random,
        per_tile: int,
        make: Callable[[], Scene],
        entry_of: Callable[[Scene, random.Random], _Entry],
    ) -> list[tuple[_Entry, TileGrid]]:
        """As many scenes as a step holds, all of as many tiles as the first one."""
        scene = make()
        grid = self._grid(scene)
        tokens = grid.num_tiles * (per_tile + 1) + TOKENS_OF_SEGMENTS
        count = max(2, min(self.spec.max_images, self.spec.tokens_per_step // tokens))
        entries = [(entry_of(scene, rng), grid)]
        while len(entries) < count:
            scene = make()
            if self._grid(scene).num_tiles == grid.num_tiles:
                entries.append((entry_of(scene, rng), self._grid(scene)))
        return entries

    def _draw_easy(self, rng: random.Random) -> _Entry:
        if self.official is not None and rng.random() < OFFICIAL_SHARE:
            sample = self.official[rng.randrange(len(self.official))]
            return _Entry(sample.caption, sample.questions, image=sample.image)
        scene = easy_vqa.make_scene(rng)
        item = scene.items[0]
        return _Entry(easy_vqa.describe(item.color, item.text), tuple(easy_vqa.ask(scene, rng)), scene=scene)

    def _grid(self, scene: Scene) -> TileGrid:
        return choose_tile_grid((scene.height, scene.width), self.spec.tile_size, self.spec.max_tiles)

    def _prefix(self, grid: TileGrid, per_tile: int) -> list[int]:
        side = math.isqrt(per_tile)
        layout = ImageLayout(grid, (side, side))
        image = layout.token_ids(self.image_token_id, self.tile_separator, self.row_separator)
        return [*self.opening, *image, *self.closing]

    def _segments(self, rng: random.Random, entry: _Entry) -> list[Segment]:
        """A caption, or several conversations of one or two turns."""
        if not entry.regions and rng.random() < self.spec.captions:
            turn = Question(rng.choice(ASK_CAPTION), entry.caption, "caption")
            return [make_segment(self.tokenizer, [turn])]
        questions = rng.sample(entry.questions, min(self.spec.questions_per_image, len(entry.questions)))
        segments = []
        while questions:
            num_turns = 2 if rng.random() < TWO_TURN_SHARE else 1
            turns, questions = questions[:num_turns], questions[num_turns:]
            segments.append(make_segment(self.tokenizer, turns))
        return segments

    def _regions(
        self, entries: Sequence[tuple[_Entry, TileGrid]], segments: Sequence[Sequence[Segment]]
    ) -> dict[str, Tensor]:
        """`region_cells` (R, P, L) and `region_first_tile` (R,) of every `<mask>` of a step, in order."""
        assert self.processor is not None, "takes_regions says so"
        cells, first_tiles, first = [], [], 0
        for (entry, grid), parts in zip(entries, segments, strict=True):
            places = torch.tensor([place for part in parts for place in part.regions], dtype=torch.int64)
            if entry.scene is not None and len(places):
                size = (entry.scene.height, entry.scene.width)
                made = self.processor.region_inputs([list(entry.regions)], [size], [grid], image_mode="slice")
                cells.append(made["region_cells"][places])
                first_tiles.append(torch.full_like(places, first))
            first += grid.num_tiles
        if not cells:
            return self.processor.region_inputs([], [], [])
        return {"region_cells": torch.cat(cells), "region_first_tile": torch.cat(first_tiles)}

    def _show(self, entry: _Entry, grid: TileGrid) -> Tensor:
        """(N, 3, h, w) tiles, or (N, K, h, w) labels of their patches."""
        if self.spec.show == "labels":
            assert entry.scene is not None, "labels need a scene"
            return label_tiles(entry.scene, grid, self.spec.tile_size, self.spec.patch_size)
        image = draw(entry.scene) if entry.image is None and entry.scene is not None else entry.image
        assert image is not None
        return self.image_processor([image.convert("RGB")], tile_grids=[grid])["pixel_values"]


def _fine_print_entry(scene: Scene, rng: random.Random) -> _Entry:
    return _Entry(fine_print.describe(scene), tuple(fine_print.ask(scene, rng)), scene=scene)


def _marked_entry(scene: Scene, rng: random.Random) -> _Entry:
    """Each object marked in one of the forms, with questions about some of them."""
    forms = rng.choices(list(REGION_FORMS), list(REGION_FORMS.values()), k=len(scene.items))
    marked = tuple(regions.mark(scene, item, form, rng) for item, form in zip(scene.items, forms, strict=True))
    return _Entry("", tuple(regions.ask(scene, rng, each=QUESTIONS_PER_KIND)), scene=scene, regions=marked)

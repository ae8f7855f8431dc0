"""Regions: generated pictures with marked objects, and questions that only the marks answer.

Pictures have one of three looks: a few shapes on 64 x 64 pixels in easy-VQA's style, fine print of one tile, and fine
print of up to nine tiles. The regions of a sample are the objects of its scene, in the order of drawing. A question
names up to four of them, each as `<mask>`. "Left of" and "above" are asked only about pictures of one tile: a region
token is made of patch features, which know their place in the tile but not the tile's place in the picture.
Each sample depends only on its split and index. The splits use disjoint seeds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from tokenpacker.scenes import easy_vqa, fine_print
from tokenpacker.scenes.scene import Box, Item, Mask, Question, Region, Sample, Scene, draw, ink, overlap, pale_color
from tokenpacker.tiling import choose_tile_grid

Look = Literal["shapes", "tile", "page"]
Form = Literal["mask", "rough", "box"]
LOOKS: tuple[Look, ...] = get_args(Look)
FORMS: tuple[Form, ...] = get_args(Form)
MASK = "<mask>"
FIRST_SEED = {"train": 3_000_000_000, "test": 4_000_000_000}  # above those of fine print
SPLIT_SIZE = fine_print.SPLIT_SIZE

MIN_OBJECTS = 2  # the mask of a lone object would not have to be looked at
NUM_SHAPES = (2, 4)
SHAPE_SIDES = (11, 26)  # pixels; four of easy-VQA's, 9 to 34, would not fit
SHAPE_GAP = 3  # free pixels between shapes
PLACEMENT_TRIES = 40
ROUGH_REACH = 3  # pixels by which a rough mask or a box exceeds its object
MOST_REGIONS = 4  # in one question


class Regions:
    """The samples of one split as a sequence. `Regions("test")[7]` is always the same sample.

    A sample has at most one question of each kind.

    Args:
        form: how objects are marked: by the pixels that they are drawn on (`mask`), by a mask that is too large
            (`rough`), or by a box that is a little too large (`box`).

    Raises:
        ValueError: for an unknown split or form.
    """

    def __init__(self, split: str = "test", form: Form = "mask") -> None:
        if split not in FIRST_SEED:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(FIRST_SEED)}")
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}")
        self.split = split
        self.form: Form = form

    def __len__(self) -> int:
        return SPLIT_SIZE

    def __getitem__(self, index: int) -> Sample:
        scene, questions = self.truth(index)
        rng = random.Random(f"form/{self.split}/{index}")
        return Sample(
            name=f"regions-{self.split}-{index}",
            image=draw(scene),
            questions=tuple({question.kind: question for question in questions}.values()),
            caption="",
            scene=scene,
            regions=tuple(mark(scene, item, self.form, rng) for item in scene.items),
        )

    def truth(self, index: int) -> tuple[Scene, tuple[Question, ...]]:
        """The scene of one sample and all questions about it, without drawing the picture."""
        if not 0 <= index < SPLIT_SIZE:
            raise IndexError(f"index={index} is outside 0..{SPLIT_SIZE - 1}")
        rng = random.Random(FIRST_SEED[self.split] + index)
        scene = make_scene(rng, rng.choice(LOOKS))
        return scene, tuple(ask(scene, rng))


def make_scene(rng: random.Random, look: Look) -> Scene:
    """A random scene of at least two objects."""
    while True:
        scene = _make_shapes(rng) if look == "shapes" else fine_print.make_scene(rng, one_tile=look == "tile")
        if len(scene.items) >= MIN_OBJECTS:
            return scene


def _make_shapes(rng: random.Random) -> Scene:
    """Several shapes with easy-VQA's colors and background; in half of the scenes two of them share a color."""
    side = easy_vqa.IMAGE_SIDE
    colors = rng.sample(list(easy_vqa.COLORS), NUM_SHAPES[1])
    if rng.random() < 0.5:
        colors[1] = colors[0]
    items: list[Item] = []
    for color in colors[: rng.randint(*NUM_SHAPES)]:
        shape, width = rng.choice(easy_vqa.SHAPES), rng.uniform(*SHAPE_SIDES)
        heights = {"triangle": width * easy_vqa.TRIANGLE_ASPECT, "rectangle": rng.uniform(*SHAPE_SIDES)}
        box = _free_place(rng, heights.get(shape, width), width, [item.box for item in items])
        if box is not None:
            items.append(Item(kind="shape", text=shape, color=color, rgb=easy_vqa.COLORS[color], box=box))
    return Scene(height=side, width=side, background=pale_color(rng, 228), items=tuple(items))


def _free_place(rng: random.Random, height: float, width: float, occupied: list[Box]) -> Box | None:
    """A box that keeps SHAPE_GAP from all others; None when none was found."""
    for _ in range(PLACEMENT_TRIES):
        left, top = rng.uniform(0, easy_vqa.IMAGE_SIDE - width), rng.uniform(0, easy_vqa.IMAGE_SIDE - height)
        right, bottom = left + width, top + height
        kept_free = (left - SHAPE_GAP, top - SHAPE_GAP, right + SHAPE_GAP, bottom + SHAPE_GAP)
        if not any(overlap(kept_free, other) for other in occupied):
            return left, top, right, bottom
    return None


def mark(scene: Scene, item: Item, form: Form, rng: random.Random) -> Region:
    """The region of an object: a mask (height, width), or a box (left, top, right, bottom)."""
    if form == "box":
        left, top, right, bottom = (
            edge + direction * rng.uniform(0, ROUGH_REACH)
            for edge, direction in zip(item.box, (-1, -1, 1, 1), strict=True)
        )
        return max(0.0, left), max(0.0, top), min(float(scene.width), right), min(float(scene.height), bottom)
    exact = ink(scene, item)
    return exact if form == "mask" else grown(exact, rng.randint(1, ROUGH_REACH))


def grown(mask: Mask, reach: int) -> Mask:
    """The mask with all pixels that are at most `reach` rows and columns away from it."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * reach + 1))) > 0


def shuffled(sample: Sample, rng: random.Random) -> Sample:
    """The sample with its regions exchanged: every question then points at other objects than its answer is about."""
    turn = rng.randrange(1, len(sample.regions))
    return replace(sample, regions=(*sample.regions[turn:], *sample.regions[:turn]))


@dataclass(frozen=True)
class _Kind:
    """A kind of question.

    Args:
        answer: gives the answer about some objects; None when the question makes no sense for them.
        num_regions: the fewest and the most objects in one question.
    """

    name: str
    wordings: tuple[str, ...]
    answer: Callable[..., str | None]
    num_regions: tuple[int, int] = (1, 1)
    needs_one_tile: bool = False


def _text_of(kind: str) -> Callable[[Item], str | None]:
    return lambda item: item.text if item.kind == kind else None


def _name(item: Item) -> str:
    return f"the {item.color} {item.text}" if item.kind == "shape" else f"the {item.color} {item.kind} {item.text}"


def _colors(*items: Item) -> str:
    return ", ".join(item.color for item in items)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _before(axis: Literal[0, 1]) -> Callable[[Item, Item], str | None]:
    """Whether the first object comes first on an axis (0 from the left, 1 from the top); None where the two overlap."""

    def answer(one: Item, other: Item) -> str | None:
        apart = one.box[axis + 2] <= other.box[axis] or other.box[axis + 2] <= one.box[axis]
        return _yes(one.box[axis] < other.box[axis]) if apart else None

    return answer


READ = ("what does {0} read?", "what is written in {0}?")
SAME_COLOR = ("do {0} and {1} have the same color?", "is {0} the same color as {1}?")
KINDS = (
    _Kind("color", ("what color is {0}?", "what is the color of {0}?"), lambda item: item.color),
    _Kind("shape", ("what shape is {0}?",), _text_of("shape")),
    _Kind("word", READ, _text_of("word")),
    _Kind("number", READ, _text_of("number")),
    _Kind("name", ("what is {0}?",), _name),
    _Kind("box", ("what color is the box around {0}?", "which box is {0} in?"), lambda item: item.frame),
    _Kind("colors", ("what colors are {all}?",), _colors, (2, MOST_REGIONS)),
    _Kind("same color", SAME_COLOR, lambda one, other: _yes(one.color == other.color), (2, 2)),
    _Kind("left", ("is {0} left of {1}?", "is {0} to the left of {1}?"), _before(0), (2, 2), needs_one_tile=True),
    _Kind("above", ("is {0} above {1}?",), _before(1), (2, 2), needs_one_tile=True),
)


def ask(scene: Scene, rng: random.Random, each: int = 1) -> list[Question]:
    """Up to `each` questions of each kind, in random order. All answers that occur in the scene are equally likely.

    A yes-or-no question is asked only where both answers occur, so that neither is likelier.
    """
    kinds = [kind for kind in KINDS if is_one_tile(scene) or not kind.needs_one_tile]
    drawn = [_ask(kind, scene, rng) for kind in kinds for _ in range(each)]
    questions = [question for question in drawn if question is not None]
    rng.shuffle(questions)
    return questions


def is_one_tile(scene: Scene) -> bool:
    """Whether the picture is shown as one tile."""
    grid = choose_tile_grid((scene.height, scene.width), fine_print.TILE_SIZE, fine_print.MAX_TILES)
    return grid.num_tiles == 1


def _ask(kind: _Kind, scene: Scene, rng: random.Random) -> Question | None:
    """A random question of one kind; None when the scene has no objects for it."""
    least, most = kind.num_regions
    count = rng.randint(least, min(most, len(scene.items)))
    drawn = [tuple(rng.sample(range(len(scene.items)), count)) for _ in range(4 * len(scene.items))]
    by_answer: dict[str, list[tuple[int, ...]]] = {}
    for places in drawn:
        answer = kind.answer(*(scene.items[place] for place in places))
        if answer is not None:
            by_answer.setdefault(answer, []).append(places)
    if not by_answer or (set(by_answer) <= {"yes", "no"} and len(by_answer) < 2):
        return None
    answer = rng.choice(sorted(by_answer))
    places = rng.choice(by_answer[answer])
    enumerated = f"{', '.join([MASK] * (count - 1))} and {MASK}"
    text = rng.choice(kind.wordings).format(*[MASK] * count, all=enumerated)
    return Question(text, answer, kind.name, places)

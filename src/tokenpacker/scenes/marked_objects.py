"""Regions: generated pictures whose objects are marked, and questions that nobody can answer without the marks.

Pictures are of three looks: a few shapes on 64 x 64 pixels in easy-VQA's style, fine print of a single tile, and fine
print that is cut into up to nine. A sample's regions are its scene's objects, in the order of drawing; a question names
up to four of them, each as `<mask>`. "Left of" and "above" are asked where a picture is one tile: a region's token is
made of its patches' features, and these know their place in the tile, not the tile's place in the picture.
Sample `index` of a split depends on nothing but (split, index); the splits use disjoint seeds.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from tokenpacker.scenes import easy_vqa, fine_print
from tokenpacker.scenes.scene import Box, Item, Mask, Question, Region, Sample, Scene, draw, ink

Look = Literal["shapes", "tile", "page"]
Form = Literal["mask", "rough", "box"]
LOOKS: tuple[Look, ...] = get_args(Look)
FORMS: tuple[Form, ...] = get_args(Form)
MASK = "<mask>"
FIRST_SEED = {"train": 3_000_000_000, "test": 4_000_000_000}  # above those of fine print
SPLIT_SIZE = fine_print.SPLIT_SIZE

MIN_OBJECTS = 2  # with fewer, no mask can be mistaken for another
NUM_SHAPES = (2, 4)
SHAPE_SIDES = (11, 26)  # pixels; easy-VQA's own are 9 to 34, of which four would not fit
SHAPE_GAP = 3  # free pixels between shapes
PLACEMENT_TRIES = 40
ROUGH_REACH = 3  # pixels that a rough mask, or a loose box, goes beyond its object
MOST_REGIONS = 4  # of a question


class Regions:
    """One split as a sequence: `Regions("test")[7]` is always the same sample.

    A sample asks at most one question of each kind. `form` is how objects are marked: `mask` gives exactly the pixels
    they are drawn on, `rough` a mask that is too large, `box` a box a little too large.

    Raises: ValueError for an unknown split or form.
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
        """What one sample shows and may be asked, without drawing it."""
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
    """easy-VQA's colors, shapes and background, but several shapes; every other time two of them share a color."""
    side = easy_vqa.IMAGE_SIDE
    colors = rng.sample(list(easy_vqa.COLORS), NUM_SHAPES[1])
    if rng.random() < 0.5:
        colors[1] = colors[0]
    items: list[Item] = []
    for color in colors[: rng.randint(*NUM_SHAPES)]:
        shape, width = rng.choice(easy_vqa.SHAPES), rng.uniform(*SHAPE_SIDES)
        height = {"triangle": width * easy_vqa.TRIANGLE_ASPECT, "rectangle": rng.uniform(*SHAPE_SIDES)}
        box = _free_place(rng, (height.get(shape, width), width), side, [item.box for item in items])
        if box is not None:
            items.append(Item(kind="shape", text=shape, color=color, rgb=easy_vqa.COLORS[color], box=box))
    background = (rng.randint(228, 255), rng.randint(228, 255), rng.randint(228, 255))
    return Scene(height=side, width=side, background=background, items=tuple(items))


def _free_place(rng: random.Random, size: tuple[float, float], side: int, occupied: Sequence[Box]) -> Box | None:
    """Where an object of (height, width) lies apart from all others; None when no such place was found."""
    height, width = size
    for _ in range(PLACEMENT_TRIES):
        left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
        box = (left, top, left + width, top + height)
        if all(_apart(box, other, 0, SHAPE_GAP) or _apart(box, other, 1, SHAPE_GAP) for other in occupied):
            return box
    return None


def _apart(box: Box, other: Box, axis: Literal[0, 1], gap: float = 0) -> bool:
    """Whether nothing of the two boxes is at the same place of an axis, 0 from left to right, 1 from top to bottom."""
    return box[axis + 2] + gap <= other[axis] or other[axis + 2] + gap <= box[axis]


def mark(scene: Scene, item: Item, form: Form, rng: random.Random) -> Region:
    """How somebody marks an object: a mask (height, width), or a box (left, top, right, bottom)."""
    if form == "box":
        left, top, right, bottom = (
            edge + direction * rng.uniform(0, ROUGH_REACH)
            for edge, direction in zip(item.box, (-1, -1, 1, 1), strict=True)
        )
        return max(0.0, left), max(0.0, top), min(float(scene.width), right), min(float(scene.height), bottom)
    exact = ink(scene, item)
    return exact if form == "mask" else grown(exact, rng.randint(1, ROUGH_REACH))


def grown(mask: Mask, reach: int) -> Mask:
    """The mask with all pixels that are at most `reach` rows and columns from it."""
    result = mask
    for axis in (0, 1):
        lines = np.moveaxis(result, axis, 0)
        wider = lines.copy()
        for distance in range(1, reach + 1):
            wider[distance:] |= lines[:-distance]
            wider[:-distance] |= lines[distance:]
        result = np.moveaxis(wider, 0, axis)
    return result


def shuffled(sample: Sample, rng: random.Random) -> Sample:
    """The sample with its regions exchanged: each is another object's, so that what a question says is about others."""
    turn = rng.randrange(1, len(sample.regions))
    return replace(sample, regions=(*sample.regions[turn:], *sample.regions[:turn]))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of question: for how many objects, in which words, and the answer; None where it makes no sense."""

    name: str
    wordings: tuple[str, ...]
    answer: Callable[[Sequence[Item]], str | None]
    num_regions: tuple[int, int] = (1, 1)
    needs_one_tile: bool = False


def _name(items: Sequence[Item]) -> str:
    (item,) = items
    return f"the {item.color} {item.text}" if item.kind == "shape" else f"the {item.color} {item.kind} {item.text}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _before(axis: Literal[0, 1]) -> Callable[[Sequence[Item]], str | None]:
    def answer(items: Sequence[Item]) -> str | None:
        first, second = items
        return _yes(first.box[axis] < second.box[axis]) if _apart(first.box, second.box, axis) else None

    return answer


KINDS = (
    _Kind(
        name="color",
        wordings=("what color is {0}?", "what is the color of {0}?"),
        answer=lambda items: items[0].color,
    ),
    _Kind(
        name="shape",
        wordings=("what shape is {0}?",),
        answer=lambda items: items[0].text if items[0].kind == "shape" else None,
    ),
    _Kind(
        name="word",
        wordings=("what does {0} read?", "what is written in {0}?"),
        answer=lambda items: items[0].text if items[0].kind == "word" else None,
    ),
    _Kind(
        name="number",
        wordings=("what does {0} read?", "what is written in {0}?"),
        answer=lambda items: items[0].text if items[0].kind == "number" else None,
    ),
    _Kind(name="name", wordings=("what is {0}?",), answer=_name),
    _Kind(
        name="box",
        wordings=("what color is the box around {0}?", "which box is {0} in?"),
        answer=lambda items: items[0].frame,
    ),
    _Kind(
        name="colors",
        wordings=("what colors are {all}?",),
        answer=lambda items: ", ".join(item.color for item in items),
        num_regions=(2, MOST_REGIONS),
    ),
    _Kind(
        name="same color",
        wordings=("do {0} and {1} have the same color?", "is {0} the same color as {1}?"),
        answer=lambda items: _yes(items[0].color == items[1].color),
        num_regions=(2, 2),
    ),
    _Kind(
        name="left",
        wordings=("is {0} left of {1}?", "is {0} to the left of {1}?"),
        answer=_before(0),
        num_regions=(2, 2),
        needs_one_tile=True,
    ),
    _Kind(
        name="above",
        wordings=("is {0} above {1}?",),
        answer=_before(1),
        num_regions=(2, 2),
        needs_one_tile=True,
    ),
)


def ask(scene: Scene, rng: random.Random, each: int = 1) -> list[Question]:
    """Up to `each` questions of each kind about the scene's objects, in random order; answers are drawn evenly.

    Yes and no are asked for only where the scene has both, so that neither is likelier.
    """
    questions = []
    for kind in KINDS:
        if kind.needs_one_tile and not is_one_tile(scene):
            continue
        for _ in range(each):
            question = _ask(kind, scene, rng)
            if question is not None:
                questions.append(question)
    rng.shuffle(questions)
    return questions


def is_one_tile(scene: Scene) -> bool:
    """Whether a picture is shown in one piece."""
    size = (scene.height, scene.width)
    return fine_print.choose_tile_grid(size, fine_print.TILE_SIZE, fine_print.MAX_TILES).num_tiles == 1


def _ask(kind: _Kind, scene: Scene, rng: random.Random) -> Question | None:
    """A question of the kind about objects drawn so that its answers are equally frequent, or None if there is none."""
    least, most = kind.num_regions
    count = rng.randint(least, min(most, len(scene.items)))
    drawn = [tuple(rng.sample(range(len(scene.items)), count)) for _ in range(4 * len(scene.items))]
    by_answer: dict[str, list[tuple[int, ...]]] = {}
    for places in drawn:
        answer = kind.answer([scene.items[place] for place in places])
        if answer is not None:
            by_answer.setdefault(answer, []).append(places)
    if not by_answer or (set(by_answer) <= {"yes", "no"} and len(by_answer) < 2):
        return None
    answer = rng.choice(sorted(by_answer))
    places = rng.choice(by_answer[answer])
    return Question(_worded(rng.choice(kind.wordings), count), answer, kind.name, places)


def _worded(wording: str, count: int) -> str:
    enumerated = " and ".join([", ".join([MASK] * (count - 1)), MASK])
    return wording.format(*[MASK] * count, all=enumerated)

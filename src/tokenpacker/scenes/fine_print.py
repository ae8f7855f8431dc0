"""Fine print: generated pictures with text so small that a model needs HD tiles to read it.

An image is 96 to 400 pixels a side. It shows words, numbers and shapes at random places. Some texts have a colored box
around them, some stand just below a shape. Text is about 16 pixels high when the image is cut into up to nine tiles of
96 pixels, and 4 to 8 pixels when the whole image is shrunk to one such tile.
Each sample depends only on its split and index. The splits use disjoint seeds.
"""

import math
import random
from dataclasses import replace

from tokenpacker.scenes.scene import (
    FRAME_WIDTH,
    SHAPES,
    Box,
    Item,
    Question,
    Rgb,
    Sample,
    Scene,
    draw,
    overlap,
    pale_color,
    text_size,
)
from tokenpacker.tiling import choose_tile_grid, fit_within

WORDS = (
    *("cat", "dog", "sun", "moon", "fish", "bird", "milk", "rain", "king", "wolf"),
    *("jam", "fox", "book", "hand", "leaf", "zebra", "apple", "river", "queen", "lemon"),
)
TEXT_COLORS: dict[str, Rgb] = {
    "black": (20, 20, 20),
    "red": (220, 20, 20),
    "green": (0, 140, 30),
    "blue": (25, 50, 230),
}
FRAME_COLORS: dict[str, Rgb] = TEXT_COLORS | {"yellow": (240, 205, 0), "purple": (160, 30, 200)}
MIN_SIDE, MAX_SIDE = 96, 400
MAX_ASPECT = 2.2
TILE_SIZE, MAX_TILES = (96, 96), 9  # the text is sized for this cut; the next four are in pixels of its tiles
FONT_SIZES = (15.5, 17.5)  # about two patches of 8 pixels
MIN_GAP = 6  # around every group: a text alone, in a box, or below a shape
PIXELS_PER_GROUP = 8000
PIXELS_PER_CROWDED_GROUP = 2400
MAX_GROUPS = 8
PLACEMENT_TRIES = 40

FIRST_SEED = {"train": 0, "test": 1_000_000_000, "foundation": 2_000_000_000}
SPLIT_SIZE = 1_000_000_000


class FinePrint:
    """The samples of one split as a sequence. `FinePrint("test")[7]` is always the same sample.

    A sample has at most one question of each kind. So every kind weighs the same, however many texts a picture shows.

    Raises:
        ValueError: for an unknown split.
    """

    def __init__(self, split: str = "test") -> None:
        if split not in FIRST_SEED:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(FIRST_SEED)}")
        self.split = split

    def __len__(self) -> int:
        return SPLIT_SIZE

    def __getitem__(self, index: int) -> Sample:
        scene, every_question = self.truth(index)
        questions = tuple({question.kind: question for question in every_question}.values())
        name = f"fine-print-{self.split}-{index}"
        return Sample(name=name, image=draw(scene), questions=questions, caption=describe(scene), scene=scene)

    def truth(self, index: int) -> tuple[Scene, tuple[Question, ...]]:
        """The scene of one sample and all questions about it, without drawing the picture."""
        if not 0 <= index < SPLIT_SIZE:
            raise IndexError(f"index={index} is outside 0..{SPLIT_SIZE - 1}")
        rng = random.Random(FIRST_SEED[self.split] + index)
        scene = make_scene(rng)
        return scene, tuple(ask(scene, rng))


def make_scene(rng: random.Random, *, crowded: bool = False, one_tile: bool = False) -> Scene:
    """A random scene. No word, number, box color or shape occurs twice, so every question has one answer.

    Args:
        crowded: repeats them and fills the picture as far as placement allows, to give an encoder more labels.
        one_tile: makes a picture of the size of one tile, to give a language model fewer tokens to search at first.
    """
    height = _random_side(rng, MIN_SIDE, MAX_SIDE)
    width = _random_side(rng, max(MIN_SIDE, height / MAX_ASPECT), min(MAX_SIDE, height * MAX_ASPECT))
    background = pale_color(rng, 225)
    canvas = choose_tile_grid((height, width), TILE_SIZE, MAX_TILES).canvas_size(TILE_SIZE)
    unit = height / fit_within((height, width), canvas)[0]  # image pixels per pixel of its tiles, 0.6 to 1.4
    num_groups = min(MAX_GROUPS, max(1, round(height * width / unit**2 / PIXELS_PER_GROUP * rng.uniform(0.6, 1.4))))
    repeats = 1
    if crowded:
        num_groups, repeats = round(height * width / unit**2 / PIXELS_PER_CROWDED_GROUP), MAX_GROUPS
    elif one_tile:
        (height, width), unit, num_groups = TILE_SIZE, 1.0, rng.randint(2, 5)
    words, frames, shapes = list(WORDS) * repeats, list(FRAME_COLORS) * repeats, list(SHAPES) * repeats
    numbers = [str(number) for number in range(10, 100)] * repeats
    for names in (words, frames, shapes, numbers):
        rng.shuffle(names)
    items: list[Item] = []
    occupied: list[Box] = []
    for _ in range(num_groups):
        frame = frames.pop() if frames and rng.random() < 0.5 else None
        shape = shapes.pop() if frame is None and shapes and rng.random() < 0.6 else None
        kind, text = ("word", words.pop()) if rng.random() < 0.55 else ("number", numbers.pop())
        group = _make_group(rng, kind, text, frame, shape, unit)
        items += _place(rng, group, (height, width), MIN_GAP * unit, occupied)
    return Scene(height=height, width=width, background=background, items=tuple(items))


def make_page(rng: random.Random, side: int) -> Scene:
    """A square full of lines of text in random colors, cut off at the edges; an encoder learns to read from it."""
    items: list[Item] = []
    top = rng.uniform(-12, 4)
    while top < side:
        left = rng.uniform(-30, 8)
        while left < side:
            kind, text = ("word", rng.choice(WORDS)) if rng.random() < 0.55 else ("number", str(rng.randint(10, 99)))
            (item,) = _make_group(rng, kind, text, None, None, 1.0)
            items.append(_moved(item, round(left), round(top)))
            left += item.box[2] + rng.uniform(6, 16)
        top += rng.uniform(18, 26)
    background = pale_color(rng, 225)
    return Scene(height=side, width=side, background=background, items=tuple(items))


def _random_side(rng: random.Random, shortest: float, longest: float) -> int:
    """A side in pixels, uniform in the logarithm: 100 to 200 is as frequent as 200 to 400."""
    return round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))


def _make_group(
    rng: random.Random, kind: str, text: str, frame: str | None, shape: str | None, unit: float
) -> list[Item]:
    """A text alone, in a frame or below a shape. The group's top left corner is at (0, 0)."""
    size = round(unit * rng.uniform(*FONT_SIZES), 1)
    width, height = text_size(text, size)
    color = rng.choice(list(TEXT_COLORS))
    item = Item(kind=kind, text=text, color=color, rgb=TEXT_COLORS[color], box=(0, 0, width, height), font_size=size)
    if frame is not None:
        pad = FRAME_WIDTH + round(unit * rng.uniform(3, 5))
        outer = (0, 0, width + 2 * pad, height + 2 * pad)
        return [replace(_moved(item, pad, pad), frame=frame, frame_rgb=FRAME_COLORS[frame], frame_box=outer)]
    if shape is None:
        return [item]
    side, gap = round(unit * rng.uniform(14, 20)), round(unit * rng.uniform(3, 5))
    group_width = max(side, width)
    left = (group_width - side) / 2
    color = rng.choice(list(TEXT_COLORS))
    mark = Item(kind="shape", text=shape, color=color, rgb=TEXT_COLORS[color], box=(left, 0, left + side, side))
    return [mark, replace(_moved(item, (group_width - width) // 2, side + gap), above=shape)]


def _moved(item: Item, dx: float, dy: float) -> Item:
    def move(box: Box) -> Box:
        return (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy)

    return replace(item, box=move(item.box), frame_box=item.frame_box and move(item.frame_box))


def _place(rng: random.Random, group: list[Item], size: tuple[int, int], gap: float, occupied: list[Box]) -> list[Item]:
    """The group at a free place, which is added to `occupied`; an empty list when none was found."""
    height, width = size
    group_width = max(item.outer_box[2] for item in group)
    group_height = max(item.outer_box[3] for item in group)
    for _ in range(PLACEMENT_TRIES):
        left = rng.randint(2, max(2, int(width - group_width - 2)))
        top = rng.randint(2, max(2, int(height - group_height - 2)))
        box = (left - gap, top - gap, left + group_width + gap, top + group_height + gap)
        if not any(overlap(box, other) for other in occupied):
            occupied.append((left, top, left + group_width, top + group_height))
            return [_moved(item, left, top) for item in group]
    return []


def describe(scene: Scene) -> str:
    """The caption: every text from top to bottom, with its color, its box and the shape above it."""
    phrases = []
    for item in sorted(scene.items, key=lambda item: item.outer_box[1]):
        if item.kind != "shape":
            place = f" in a {item.frame} box" if item.frame else f" below a {item.above}" if item.above else ""
            phrases.append(f"the {item.color} {item.kind} {item.text}{place}")
    return ", ".join(phrases) + "."


PRESENCE = ("is the word {word} there?", "is the word {word} in the image?", "does the image contain the word {word}?")
COUNT = ("how many words are there?", "how many words are in the image?")
TEXT_IN_BOX = ("what {kind} is in the {frame} box?", "which {kind} is in the {frame} box?")
TEXT_BELOW = ("which {kind} is just below the {above}?", "what {kind} is just below the {above}?")
COLOR_OF_TEXT = ("what color is the {kind} {text}?", "what is the color of the {kind} {text}?")
COLOR_IN_BOX = ("what color is the {kind} in the {frame} box?",)
BOX_OF_TEXT = ("what color is the box around the {kind} {text}?", "which box is the {kind} {text} in?")
SHAPE_ABOVE = ("which shape is just above the {kind} {text}?", "what shape is just above the {kind} {text}?")


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """All questions about a scene, in random order. Presence is asked once for each of the answers yes and no."""
    questions: list[Question] = []
    for item in scene.items:
        if item.kind != "shape":
            questions += _ask_about_text(item, rng)
    present = [item.text for item in scene.items if item.kind == "word"]
    absent = [word for word in WORDS if word not in present]
    for words, answer in ((present, "yes"), (absent, "no")):
        if words:
            questions.append(Question(rng.choice(PRESENCE).format(word=rng.choice(words)), answer, "presence"))
    questions.append(Question(rng.choice(COUNT), str(len(present)), "count"))
    rng.shuffle(questions)
    return questions


def _ask_about_text(item: Item, rng: random.Random) -> list[Question]:
    def question(templates: tuple[str, ...], answer: str, kind: str) -> Question:
        text = rng.choice(templates).format(kind=item.kind, text=item.text, frame=item.frame, above=item.above)
        return Question(text, answer, kind)

    questions = [question(COLOR_OF_TEXT, item.color, f"color of {item.kind}")]
    if item.frame is not None:
        questions.append(question(TEXT_IN_BOX, item.text, f"{item.kind} in box"))
        questions.append(question(COLOR_IN_BOX, item.color, "color in box"))
        questions.append(question(BOX_OF_TEXT, item.frame, f"box of {item.kind}"))
    if item.above is not None:
        questions.append(question(TEXT_BELOW, item.text, f"{item.kind} below shape"))
        questions.append(question(SHAPE_ABOVE, item.above, f"shape above {item.kind}"))
    return questions

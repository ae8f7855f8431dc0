"""easy-VQA: 4,000 training and 1,000 test images of one shape, 38,575 and 9,673 questions, 13 answers.

The official images come from the package `easy-vqa`. `make_sample` draws any number of look-alikes: pictures and
questions in the same style, from a seed. Training uses the official training images and look-alikes, never the test
images.
"""

import random
import re
from pathlib import Path

from PIL import Image

from tokenpacker.scenes.scene import Item, Question, Rgb, Sample, Scene, draw, pale_color

IMAGE_SIDE = 64
SHAPES = ("circle", "rectangle", "triangle")
COLORS: dict[str, Rgb] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
TRUTHFUL_SHARE = 0.18  # official share of yes-or-no questions that name the shape or color of the image
TRIANGLE_ASPECT = 0.866  # equilateral: height = sqrt(3)/2 * side

ASK_SHAPE = ("what shape does the image contain?", "what shape is in the image?", "what shape is present?")
ASK_COLOR = ("what color is the {thing}?", "what is the color of the {thing}?")
ASK_SHAPE_OF_COLOR = ("what is the {color} shape?",)
ASK_PRESENCE = (
    "does the image contain a {thing}?", "is a {thing} present?", "is there a {thing} in the image?",
    "is there a {thing}?",
)  # fmt: skip
ASK_ABSENCE = (
    "does the image not contain a {thing}?", "is no {thing} present?", "is there not a {thing} in the image?",
    "is there not a {thing}?",
)  # fmt: skip


class EasyVqa:
    """The samples of one official split: images with their questions.

    Raises:
        ValueError: for an unknown split.
        ModuleNotFoundError: when the package `easy-vqa` is not installed.
    """

    def __init__(self, split: str = "test") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r} is unknown; use train or test")
        try:
            import easy_vqa  # it ships no types
        except ModuleNotFoundError as error:
            remedy = "pip install 'tokenpacker[evaluate]' (or pip install easy-vqa)"
            raise ModuleNotFoundError(f"the easy-VQA data set is not installed; {remedy}") from error
        texts, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
        paths: dict[int, str] = getattr(easy_vqa, f"get_{split}_image_paths")()
        questions: dict[int, list[Question]] = {image_id: [] for image_id in sorted(paths)}
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
            questions[image_id].append(Question(text, answer, question_kind(text)))
        self.split = split
        self._entries = [(image_id, Path(paths[image_id]), tuple(asked)) for image_id, asked in questions.items()]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        image_id, path, questions = self._entries[index]
        with Image.open(path) as image:
            picture = image.convert("RGB")
        color, shape = deduce(questions)
        name = f"easy-vqa-{self.split}-{image_id}"
        return Sample(name=name, image=picture, questions=questions, caption=describe(color, shape))


def question_kind(text: str) -> str:
    """The kind of a question of this set: `shape`, `color`, `presence` or `absence`."""
    if text in ASK_SHAPE or re.fullmatch(r"what is the \w+ shape\?", text):
        return "shape"
    if text.startswith("what"):
        return "color"
    return "absence" if re.search(r"\b(not|no)\b", text) else "presence"


def deduce(questions: tuple[Question, ...]) -> tuple[str | None, str | None]:
    """The (color, shape) that the answers tell; None for what they do not tell."""
    color = shape = None
    for question in questions:
        words = re.findall(r"\w+", question.text)
        if question.kind in ("color", "shape"):
            words.append(question.answer)
        elif question.answer != ("no" if question.kind == "absence" else "yes"):
            continue  # what it names is not in the image
        color = next((word for word in words if word in COLORS), color)
        shape = next((word for word in words if word in SHAPES), shape)
    return color, shape


def describe(color: str | None, shape: str | None) -> str:
    """The caption; it leaves out what is None."""
    return f"a {color} {shape or 'shape'}." if color else f"a {shape or 'shape'}."


def make_scene(rng: random.Random) -> Scene:
    """A look-alike: one shape of 9 to 34 pixels on a pale background, 64 x 64."""
    shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
    width = rng.uniform(9, 33)
    height = {"circle": width, "rectangle": rng.uniform(9, 33), "triangle": width * TRIANGLE_ASPECT}[shape]
    left, top = max(0.0, rng.uniform(-0.5, IMAGE_SIDE - width)), max(0.0, rng.uniform(-0.5, IMAGE_SIDE - height))
    background = pale_color(rng, darkest=rng.choice((200, 228, 228, 228)))  # most of the set are very pale
    item = Item(kind="shape", text=shape, color=color, rgb=COLORS[color], box=(left, top, left + width, top + height))
    return Scene(height=IMAGE_SIDE, width=IMAGE_SIDE, background=background, items=(item,))


def make_sample(seed: int) -> Sample:
    """The look-alike of a seed, with ten questions in the official style."""
    rng = random.Random(seed)
    scene = make_scene(rng)
    questions = tuple(ask(scene, rng))
    item = scene.items[0]
    caption = describe(item.color, item.text)
    return Sample(name=f"easy-like-{seed}", image=draw(scene), questions=questions, caption=caption, scene=scene)


def ask(scene: Scene, rng: random.Random, count: int = 10) -> list[Question]:
    """`count` random questions in the official style and proportions (three of four are yes or no)."""
    item = scene.items[0]
    return [_ask_open(item, rng) if rng.random() < 0.26 else _ask_closed(item, rng) for _ in range(count)]


def _ask_open(item: Item, rng: random.Random) -> Question:
    if rng.random() < 0.5:
        thing = rng.choice(("shape", item.text))
        return Question(rng.choice(ASK_COLOR).format(thing=thing), item.color, "color")
    return Question(rng.choice(ASK_SHAPE + ASK_SHAPE_OF_COLOR).format(color=item.color), item.text, "shape")


def _ask_closed(item: Item, rng: random.Random) -> Question:
    truthful = rng.random() < TRUTHFUL_SHARE
    if rng.random() < 0.27:
        others = [shape for shape in SHAPES if shape != item.text]
        thing = item.text if truthful else rng.choice(others)
    else:
        others = [color for color in COLORS if color != item.color]
        thing = f"{item.color if truthful else rng.choice(others)} shape"
    negated = rng.random() < 0.5
    text = rng.choice(ASK_ABSENCE if negated else ASK_PRESENCE).format(thing=thing)
    return Question(text, "yes" if truthful != negated else "no", "absence" if negated else "presence")


def all_question_texts() -> tuple[str, ...]:
    """Every question of the set, sorted."""
    texts = set(ASK_SHAPE)
    texts |= {template.format(thing=thing) for template in ASK_COLOR for thing in ("shape", *SHAPES)}
    texts |= {template.format(color=color) for template in ASK_SHAPE_OF_COLOR for color in COLORS}
    things = [*SHAPES, *(f"{color} shape" for color in COLORS)]
    texts |= {template.format(thing=thing) for template in ASK_PRESENCE + ASK_ABSENCE for thing in things}
    return tuple(sorted(texts))

"""A few questions about test images: the answers of every setting, and pictures of the tokens behind them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from tokenpacker.demo.drawings import attention_picture, grid_picture
from tokenpacker.evaluate import Answer
from tokenpacker.evaluate.asker import Asker
from tokenpacker.evaluate.evaluation import answers_of, group_of
from tokenpacker.scenes import Sample
from tokenpacker.speed.question import Setting
from tokenpacker.visualize import PackedImage

MAX_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer of one setting, and the number of image tokens that it read."""

    label: str
    answer: Answer
    num_image_tokens: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question about one image. The pictures belong to the first reply."""

    name: str
    question: str
    truth: str
    layout: str
    is_sliced: bool
    replies: tuple[Reply, ...]
    grid_picture: Markup
    attention_picture: Markup


def draw_examples(samples: Mapping[str, Sequence[Sample]], counts: Mapping[str, int], seed: int) -> list[Sample]:
    """Draws `counts[task]` samples of each task at random by the seed, each with one of its questions."""
    rng = random.Random(seed)
    drawn = [sample for task, count in counts.items() for sample in rng.sample(samples[task], count)]
    return [replace(sample, questions=(rng.choice(sample.questions),)) for sample in drawn]


def ask_example(settings: Sequence[Setting], sample: Sample) -> Example:
    """Asks every setting the sample's question, and draws the first setting, which must be a TokenPacker."""
    packed = PackedImage.plan(settings[0].processor, sample.image, scale_factor=settings[0].scale_factor)
    weights = packed.attention(settings[0].model, settings[0].processor)
    assert weights is not None
    grid = packed.layout.tile_grid
    tiles = f"{grid.rows} × {grid.cols} tiles and a thumbnail" if grid.has_thumbnail else "one tile"
    return Example(
        name=sample.name,
        question=sample.questions[0].text,
        truth=sample.questions[0].answer,
        layout=f"{sample.image.height} × {sample.image.width} pixels, {tiles}",
        is_sliced=grid.has_thumbnail,
        replies=tuple(_reply(setting, sample) for setting in settings),
        grid_picture=grid_picture(packed),
        attention_picture=attention_picture(packed, weights),
    )


def _reply(setting: Setting, sample: Sample) -> Reply:
    asker = Asker(setting.model, setting.processor, scale_factor=setting.scale_factor)
    (replies,) = asker.answer([group_of(sample)], MAX_NEW_TOKENS)
    assert isinstance(replies, tuple), "the images of samples are in memory"
    (answer,) = answers_of(sample, replies)
    return Reply(label=setting.label, answer=answer, num_image_tokens=replies[0].image_tokens)

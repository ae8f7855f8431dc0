"""Samples of mixed lengths, made from a seed: the data that the training benchmark's variants all learn from.

Four kinds, equally often, at about a quarter of the real lengths, as the benchmark's tile has 36 packed tokens where
the paper's has 144: text alone, a caption of one tile, a question about an image of several tiles, and a conversation
of several rounds about one tile. Neither words nor pictures mean anything; no two pictures are alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ANNOTATIONS = "samples.json"
NUM_KINDS = 4
WORDS = tuple(f"{first}{second}" for first in "bdfgklmnprstvz" for second in ("a", "e", "i", "o", "u"))  # a token each
QUESTION_WORDS, ANSWER_WORDS = (5, 15), (5, 30)
TEXT_QUESTION_WORDS, TEXT_ANSWER_WORDS = (10, 40), (20, 200)
ROUNDS = (2, 8)
LARGEST_SIDE_TILES = 3.0  # of an image that is cut: up to three tiles a side, the paper's nine
DETAIL = 12  # pixels of noise per side, enlarged: more than one colour, and no harder to decode than a photograph


def write_samples(folder: Path, count: int, tile_size: int, seed: int) -> dict[str, int]:
    """How many samples of each kind were written into `folder`: annotations in LLaVA's format, and pictures."""
    chance = random.Random(f"training benchmark/{seed}")
    makers = (_text, _caption, _high_resolution, _conversation)
    assert len(makers) == NUM_KINDS
    rows = []
    for number in range(count):
        maker = makers[number % len(makers)]
        row = maker(chance, tile_size, folder / f"{number}.jpg")
        rows.append({"id": f"{maker.__name__.strip('_')}-{number}", **row})
    (folder / ANNOTATIONS).write_text(json.dumps(rows), encoding="utf-8")
    return {maker.__name__.strip("_"): len(range(kind, count, len(makers))) for kind, maker in enumerate(makers)}


def all_texts() -> list[str]:
    """Every word there is, for a tokenizer."""
    return [f" {word}" for word in WORDS] * 4


def _text(chance: random.Random, tile_size: int, path: Path) -> dict[str, Any]:
    return {"conversations": _round(chance, TEXT_QUESTION_WORDS, TEXT_ANSWER_WORDS)}


def _caption(chance: random.Random, tile_size: int, path: Path) -> dict[str, Any]:
    return _shown(_picture(chance, tile_size, tile_size, path), _round(chance, QUESTION_WORDS, ANSWER_WORDS))


def _high_resolution(chance: random.Random, tile_size: int, path: Path) -> dict[str, Any]:
    side: Callable[[], int] = lambda: round(chance.uniform(1.0, LARGEST_SIDE_TILES) * tile_size)  # noqa: E731
    return _shown(_picture(chance, side(), side(), path), _round(chance, QUESTION_WORDS, ANSWER_WORDS))


def _conversation(chance: random.Random, tile_size: int, path: Path) -> dict[str, Any]:
    rounds = [_round(chance, QUESTION_WORDS, ANSWER_WORDS) for _ in range(chance.randint(*ROUNDS))]
    return _shown(_picture(chance, tile_size, tile_size, path), [message for pair in rounds for message in pair])


def _shown(image: str, conversation: list[dict[str, str]]) -> dict[str, Any]:
    conversation[0]["value"] = f"<image>\n{conversation[0]['value']}"
    return {"image": image, "conversations": conversation}


def _round(chance: random.Random, question: tuple[int, int], answer: tuple[int, int]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": " ".join(chance.choices(WORDS, k=chance.randint(*bounds)))}
        for speaker, bounds in (("human", question), ("gpt", answer))
    ]


def _picture(chance: random.Random, height: int, width: int, path: Path) -> str:
    noise = Image.frombytes("RGB", (DETAIL, DETAIL), chance.randbytes(DETAIL * DETAIL * 3))
    noise.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return path.name

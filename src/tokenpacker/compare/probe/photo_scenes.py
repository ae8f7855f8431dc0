"""Pictures of photographed things: cut-outs of Tux Paint's stamps on a background, each thing in a frame.

The stamps are those of Debian's package `tuxpaint-stamps-default` (GPL-2). They are read where they lie, and never
travel with this package. A scene is divided into 4 x 4 cells. It has 3 to 8 things, each of another kind, in a cell, a
size and a frame of its own; half of them are mirrored. There are four sorts of questions:

- kind: what lies in this cell? 16 questions, 10 answers
- place: in which cell lies the thing of this kind? 10 questions, 16 answers
- color: what color has the frame in this cell? 16 questions, 6 answers
- number: how many things are there? 1 question, 6 answers

An empty cell and a missing kind are not asked about. The splits share no cut-out and no background. Files whose names
begin with the same word, such as `apple_red` and `apple_green`, are all in one split.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageDraw, ImageOps

from tokenpacker.compare.probe.contract import NO_ANSWER, SIZE, Split, grid_centers
from tokenpacker.compare.results import digest_of

VERSION = 1  # raised when the same cut-outs give other pictures or answers
INSTALLED = Path("/usr/share/tuxpaint/stamps")
HOW_TO_GET = (
    "on Debian and Ubuntu: apt-get install tuxpaint-stamps-default; or, without root, apt-get download"
    " tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb stamps, and give that folder (--stamps stamps)"
)
CELLS = 4  # of a scene, on each side
NUM_CELLS, CELL = CELLS**2, SIZE // CELLS
FEWEST, MOST = 3, 8  # things in a scene
THING_SIZES = (24, 40)  # longer side of a thing, in pixels
FRAME_WIDTH, FRAME_GAP = 2, 1
SPLITS: tuple[Split, ...] = get_args(Split)
FIRST_SEED: Mapping[Split, int] = {"train": 0, "test": 10**6, "dev": 2 * 10**6}
HELD_OUT = 0.2  # of the cut-outs of a kind, for the test, and as many for development
LARGEST = 96  # side of a cut-out in memory, in pixels
LOW, HIGH = 70, 200  # brightness of a background
GRAINS = (1, 2, 6, 24, SIZE)  # spots of a background on each side: plain, shaded, cloudy, rough, grainy

# folders of the package and their kinds; the first that fits counts
FOLDERS = {
    "animals/mammals/aquatic": "sea animal",
    "animals/fish": "sea animal",
    "animals/shellfish": "sea animal",
    "animals/birds": "bird",
    "animals/mammals": "mammal",
    "animals/marsupials": "mammal",
    "food/fruit": "fruit",
    "food/nuts": "fruit",
    "food/vegetables": "vegetable",
    "plants/flowers": "flower",
    "vehicles": "vehicle",
    "military/vehicles": "vehicle",
    "town/roadsigns": "road sign",
    "symbols/money": "coin",
    "household/tools": "tool",
    "household/arttools": "tool",
}
KINDS = tuple(dict.fromkeys(FOLDERS.values()))
DRAWINGS = {"cartoon", "00_symbols", "plastic"}  # folders within those that have no photographs
FRAME_COLORS = {
    "red": (225, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 220, 30),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
SORTS = {  # of questions -> how many questions, how many answers
    "kind": (NUM_CELLS, len(KINDS)),
    "place": (len(KINDS), NUM_CELLS),
    "color": (NUM_CELLS, len(FRAME_COLORS)),
    "number": (1, MOST - FEWEST + 1),
}


class Photos:
    """Scenes of cut-outs.

    Args:
        folder: holds the package's files at any depth; None takes the installed package's.

    Raises:
        ValueError: if a kind has no cut-out for one of the splits; the message says how to get them.
    """

    name = "photos"
    num_classes = tuple(answers for questions, answers in SORTS.values() for _ in range(questions))
    sorts: Mapping[str, int] = {sort: questions for sort, (questions, _) in SORTS.items()}
    places = np.concatenate(
        [
            grid_centers(CELLS, CELLS) if sort in ("kind", "color") else np.full((questions, 2), np.nan)
            for sort, (questions, _) in SORTS.items()
        ]
    )

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = INSTALLED if folder is None else folder
        self.cut_outs = split_cut_outs(self.folder)
        missing = [kind for kind in KINDS if not all(self.cut_outs[split][kind] for split in SPLITS)]
        if missing:
            raise ValueError(f"{self.folder} has too few cut-outs of {', '.join(missing)}; get them {HOW_TO_GET}")

    @cached_property
    def digest(self) -> str:
        """Of the cut-outs of each split, and of what draws them."""
        files = {
            split: [hashlib.sha256(path.read_bytes()).hexdigest() for paths in kinds.values() for path in paths]
            for split, kinds in self.cut_outs.items()
        }
        return digest_of([VERSION, files, PIL.__version__])

    def draw(self, split: Split, number: int) -> tuple[Image.Image, npt.NDArray[np.int64]]:
        """A scene and its answers: kinds by cell, cells by kind, colors by cell, and the number of things less 3."""
        draw = random.Random(FIRST_SEED[split] + number)
        scene = _background(draw)
        things = draw.randint(FEWEST, MOST)
        kinds, cells = draw.sample(range(len(KINDS)), things), draw.sample(range(NUM_CELLS), things)
        kind_in, color_in = np.full((2, NUM_CELLS), NO_ANSWER)
        place_of = np.full(len(KINDS), NO_ANSWER)
        for kind, cell in zip(kinds, cells, strict=True):
            color = draw.randrange(len(FRAME_COLORS))
            thing = _thing(draw.choice(self.cut_outs[split][KINDS[kind]]), draw)
            _put(scene, thing, cell, list(FRAME_COLORS.values())[color], draw)
            kind_in[cell], color_in[cell], place_of[kind] = kind, color, cell
        return scene, np.concatenate([kind_in, place_of, color_in, [things - FEWEST]])


def split_cut_outs(folder: Path) -> Mapping[Split, Mapping[str, Sequence[Path]]]:
    """The files of each split and kind; none of a kind whose folders are missing."""
    root = next((found for found in sorted(folder.rglob("stamps")) if (found / "animals").is_dir()), folder)
    words: dict[str, dict[str, list[Path]]] = {kind: {} for kind in KINDS}
    for path in sorted(root.rglob("*.png")):
        if (kind := _kind(path.relative_to(root))) is not None:
            word = re.search("[a-z]+", path.stem.lower())
            words[kind].setdefault(word.group() if word else path.stem, []).append(path)
    by_kind = {kind: _split(files) for kind, files in words.items()}
    return {split: {kind: by_kind[kind][split] for kind in KINDS} for split in SPLITS}


def _kind(path: Path) -> str | None:
    if DRAWINGS & set(path.parts):
        return None
    return next((kind for folder, kind in FOLDERS.items() if path.as_posix().startswith(f"{folder}/")), None)


def _split(words: Mapping[str, Sequence[Path]]) -> Mapping[Split, list[Path]]:
    """A kind's files of each split: words fill the test and development as far as they fit."""
    share = math.ceil(HELD_OUT * sum(map(len, words.values())))
    order = sorted(words)
    random.Random(0).shuffle(order)
    parts: dict[Split, list[Path]] = {split: [] for split in SPLITS}
    for word in order:
        held_out: tuple[Split, ...] = ("test", "dev")
        fitting = (split for split in held_out if len(parts[split]) + len(words[word]) <= share)
        parts[next(fitting, "train")] += words[word]
    return parts


@lru_cache(maxsize=512)
def _cut_out(path: Path) -> Image.Image:
    with Image.open(path) as image:
        cut_out = image.convert("RGBA")
    cut_out = cut_out.crop(cut_out.getchannel("A").getbbox())
    cut_out.thumbnail((LARGEST, LARGEST))
    return cut_out


def _thing(path: Path, draw: random.Random) -> Image.Image:
    """A cut-out in some size, perhaps mirrored."""
    size = draw.randint(*THING_SIZES)
    thing = ImageOps.contain(_cut_out(path), (size, size))
    return ImageOps.mirror(thing) if draw.random() < 0.5 else thing


def _put(scene: Image.Image, thing: Image.Image, cell: int, color: tuple[int, int, int], draw: random.Random) -> None:
    """Puts a thing and its frame somewhere in a cell."""
    margin = FRAME_GAP + FRAME_WIDTH
    row, col = divmod(cell, CELLS)
    left = col * CELL + draw.randint(margin, CELL - thing.width - margin)
    top = row * CELL + draw.randint(margin, CELL - thing.height - margin)
    scene.paste(thing, (left, top), thing)
    frame = (left - margin, top - margin, left + thing.width + margin - 1, top + thing.height + margin - 1)
    ImageDraw.Draw(scene).rectangle(frame, outline=color, width=FRAME_WIDTH)


def _background(draw: random.Random) -> Image.Image:
    rng = np.random.default_rng(draw.getrandbits(64))
    low, high = np.sort(rng.integers(LOW, HIGH, size=(2, 3)), axis=0)
    grains = draw.choice(GRAINS)
    ground = rng.uniform(low, high, size=(grains, grains, 3)).astype(np.uint8)
    return Image.fromarray(ground).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

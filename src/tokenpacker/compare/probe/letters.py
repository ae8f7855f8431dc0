"""Pictures of letters: 6 rows of 8 letters and digits in a font of this machine; the questions are all 48 of them.

Every picture has a font, a size, colors and an offset of its own. Training, development and test have fonts of
different families.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageDraw, ImageFont, features

from tokenpacker.compare.probe.contract import SIZE, Split, grid_centers
from tokenpacker.compare.results import digest_of

VERSION = 1  # raised when other pictures are drawn
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ROWS, COLS = 6, 8
HELD_OUT, FEWEST_FAMILIES = 4, 12  # families of the test, and as many for development; the rest is for training
FIRST_SEED: dict[Split, int] = {"train": 0, "test": 10**6, "dev": 2 * 10**6}  # of the pictures
SIZES = (15, 21)  # of the font, in pixels; a row has 32, a letter 24
UNFIT = ("italic", "oblique", "symbol", "math", "thin")  # in the name of a font


class Letters:
    """Pictures of letters.

    Args:
        fonts: files for each split; None takes those of this machine.

    Raises:
        ValueError: if the machine has too few.
        ImportError: without matplotlib, which finds them.
    """

    name = "letters"
    num_classes = (len(CHARACTERS),) * (ROWS * COLS)
    sorts: Mapping[str, int] = {"letter": ROWS * COLS}
    places = grid_centers(ROWS, COLS)

    def __init__(self, fonts: Mapping[Split, Sequence[Path]] | None = None) -> None:
        self.fonts = split_fonts(_installed_fonts()) if fonts is None else fonts

    @cached_property
    def digest(self) -> str:
        """Of the font files of each split, and of what draws them."""
        fonts = {
            split: [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
            for split, files in self.fonts.items()
        }
        return digest_of([VERSION, fonts, PIL.__version__, features.version("freetype2")])

    def draw(self, split: Split, number: int) -> tuple[Image.Image, npt.NDArray[np.int64]]:
        """A picture and the indices of its 48 characters in `CHARACTERS`, row by row."""
        draw = random.Random(FIRST_SEED[split] + number)
        font = _font(draw.choice(self.fonts[split]), draw.randint(*SIZES))
        light, dark = (tuple(draw.randint(low, low + 75) for _ in range(3)) for low in (180, 0))
        ground, ink = (light, dark) if draw.random() < 0.5 else (dark, light)
        image = Image.new("RGB", (SIZE, SIZE), ground)
        pen = ImageDraw.Draw(image)
        indices = [draw.randrange(len(CHARACTERS)) for _ in range(ROWS * COLS)]
        high, wide = SIZE / ROWS, SIZE / COLS
        down, right = draw.uniform(-3, 3), draw.uniform(-2, 2)
        for place, index in enumerate(indices):
            row, col = divmod(place, COLS)
            center = ((col + 0.5) * wide + right + draw.uniform(-1, 1), (row + 0.5) * high + down + draw.uniform(-1, 1))
            pen.text(center, CHARACTERS[index], fill=ink, font=font, anchor="mm")
        return image, np.array(indices)


def _installed_fonts() -> list[Path]:
    try:
        from matplotlib.font_manager import findSystemFonts
    except ImportError as error:
        raise ImportError("fonts are found with matplotlib; run: pip install 'tokenpacker[compare]'") from error
    return [Path(path) for path in findSystemFonts()]


def split_fonts(files: Iterable[Path]) -> Mapping[Split, tuple[Path, ...]]:
    """The upright text fonts among these files; test and development have one font of each of their families.

    Raises:
        ValueError: for fewer than 12 families with Latin letters.
    """
    families: dict[str, list[Path]] = {}
    for path in sorted(files, key=lambda path: path.name):
        if family := latin_family(path):
            families.setdefault(family, []).append(path)
    if len(families) < FEWEST_FAMILIES:
        raise ValueError(
            f"the letters need {FEWEST_FAMILIES} font families with Latin letters, and {len(families)} were found;"
            " install more, on Debian: apt-get install fonts-dejavu fonts-freefont-ttf fonts-lato fonts-liberation2"
            " fonts-noto-core fonts-open-sans fonts-roboto"
        )
    names = sorted(families)
    random.Random(0).shuffle(names)
    test, others = names[:HELD_OUT], sorted(names[HELD_OUT:])
    random.Random(1).shuffle(others)
    dev, train = others[:HELD_OUT], others[HELD_OUT:]
    return {
        "train": tuple(path for name in sorted(train) for path in families[name]),
        "dev": tuple(families[name][0] for name in sorted(dev)),
        "test": tuple(families[name][0] for name in sorted(test)),
    }


def latin_family(path: Path) -> str | None:
    """The family of an upright font in which no two of the characters look alike, or None.

    It is the first two words of the font's name, so that Noto Sans Display belongs to Noto Sans.
    """
    try:
        font = _font(path, 18)
        family, style = font.getname()
        shapes = {bytes(font.getmask(character)) for character in CHARACTERS}
    except OSError:
        return None
    if not family or len(shapes) < len(CHARACTERS) or any(word in f"{family} {style}".lower() for word in UNFIT):
        return None
    return " ".join(family.split()[:2])


@lru_cache(maxsize=512)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)

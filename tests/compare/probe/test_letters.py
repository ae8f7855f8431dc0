from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont

from tokenpacker.compare.probe import letters
from tokenpacker.compare.probe.letters import CHARACTERS, COLS, ROWS, Letters, latin_family, split_fonts


@pytest.fixture
def drawn(dejavu) -> Letters:
    return Letters({"train": [dejavu], "dev": [dejavu], "test": [dejavu]})


def test_a_picture_is_the_same_whenever_it_is_drawn(drawn):
    (picture, answers), (again, same) = drawn.draw("train", 3), drawn.draw("train", 3)
    assert picture.tobytes() == again.tobytes()
    assert (answers == same).all()


def test_no_picture_of_a_split_is_in_another(drawn):
    pictures = {drawn.draw(split, number)[0].tobytes() for split in ("train", "dev", "test") for number in range(4)}
    assert len(pictures) == 12


def glyph(picture: Image.Image) -> np.ndarray:
    """A letter on a plain ground, cut out and stretched to 16 x 16, ink 1."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, picture.getpixel((0, 0)))).convert("L")
    inked = difference.point(lambda value: 255 * (value > 60))
    return np.asarray(inked.crop(inked.getbbox()).resize((16, 16)), dtype=float) / 255


def test_the_answers_are_the_letters_of_the_picture_row_by_row(drawn, dejavu):
    shapes = []
    for character in CHARACTERS:
        page = Image.new("RGB", (60, 60), "white")
        ImageDraw.Draw(page).text((30, 30), character, fill="black", font=ImageFont.truetype(dejavu, 18), anchor="mm")
        shapes.append(glyph(page))
    picture, answers = drawn.draw("test", 0)
    wide, high = picture.width / COLS, picture.height / ROWS
    read = []
    for place in range(ROWS * COLS):
        row, col = divmod(place, COLS)
        cell = glyph(
            picture.crop((round(col * wide), round(row * high), round((col + 1) * wide), round((row + 1) * high)))
        )
        read.append(min(range(len(shapes)), key=lambda index: np.abs(shapes[index] - cell).sum()))
    assert np.mean(np.array(read) == answers) > 0.8  # a 0 may be taken for an O, and a letter may reach into a cell


def test_the_splits_share_no_family_of_fonts(monkeypatch):
    monkeypatch.setattr(letters, "latin_family", lambda path: path.name.partition("-")[0])
    files = [Path(f"family{number}-{style}.ttf") for number in range(14) for style in ("Bold", "Regular")]
    fonts = split_fonts(files)
    families = {split: {path.name.partition("-")[0] for path in paths} for split, paths in fonts.items()}
    assert [len(families[split]) for split in ("train", "dev", "test")] == [6, 4, 4]
    assert len(set.union(*families.values())) == 14
    assert len(fonts["train"]) == 12  # all styles; the others have one font of each family
    assert split_fonts(reversed(files)) == fonts


def test_too_few_fonts_are_told_with_the_remedy(dejavu):
    with pytest.raises(
        ValueError,
        match=r"need 12 font families with Latin letters, and 1 were found; install more, .*: apt-get install fonts-",
    ):
        split_fonts([dejavu, dejavu.with_name("DejaVuSans-Oblique.ttf")])


def test_fonts_of_one_family_are_one_family_whatever_their_style(dejavu, tmp_path):
    assert latin_family(dejavu) == latin_family(dejavu.with_name("DejaVuSansMono-Bold.ttf")) == "DejaVu Sans"
    (tmp_path / "no.ttf").write_text("no font")
    assert latin_family(tmp_path / "no.ttf") is None

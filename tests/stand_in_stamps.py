"""Stand-ins for Tux Paint's stamps, in its folders: one plain color for each kind."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from tokenpacker.compare.probe.photo_scenes import FOLDERS, KINDS

WORDS = ("ash", "birch", "cedar", "elm", "fir")


def kind_color(kind: int) -> tuple[int, int, int]:
    """A color that no frame and no background has."""
    return (255, 20 * kind, 255)


def make_stamps(folder: Path) -> Path:
    """Five words for each kind, two files of a word, and a drawing."""
    root = folder / "usr/share/tuxpaint/stamps"
    for kind, name in enumerate(KINDS):
        place = root / next(path for path, of in FOLDERS.items() if of == name)
        for word in WORDS:
            for number in (1, 2):
                _draw(place / f"{word}_{number}.png", kind_color(kind), wide=20 + 10 * number)
        _draw(place / "cartoon" / "drawing.png", (0, 255, 255), wide=30)
    return folder


def _draw(path: Path, color: tuple[int, int, int], wide: int) -> None:
    stamp = Image.new("RGBA", (60, 50))
    ImageDraw.Draw(stamp).rectangle((5, 10, 5 + wide, 40), fill=(*color, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp.save(path)

"""Draws docs/images/auto-document.png and auto-photo.png: which tile gets how many tokens with `scale_factor="auto"`.

    python -m benchmarks.auto_pictures

The document is drawn here. The photo is one that matplotlib ships: Grace Hopper, by the US Navy, in the public domain.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default

from tokenpacker.hf import TokenPackerProcessor, carried_model_path
from tokenpacker.router import AUTO
from tokenpacker.visualize import PackedImage, draw_page

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LETTER = (
    "Dear reader,",
    "this letter has a short text, a table and much white paper.",
    "A tile of white paper says nothing, and one token says so.",
    "A tile of small type says much, and gets nine.",
)
TABLE = (("item", "count", "price"), ("paper", "500", "4.20"), ("ink", "2", "18.00"), ("stamps", "10", "8.50"))


def document() -> Image.Image:
    """A letter of 800 x 600 pixels, of which the lower half is empty paper."""
    page = Image.new("RGB", (600, 800), "white")
    draw = ImageDraw.Draw(page)
    draw.text((60, 60), "Office of white paper", "black", load_default(32))
    for number, line in enumerate(LETTER):
        draw.text((60, 130 + 26 * number), line, "black", load_default(17))
    for row, cells in enumerate(TABLE):
        for col, cell in enumerate(cells):
            box = (60 + 160 * col, 260 + 32 * row, 220 + 160 * col, 292 + 32 * row)
            draw.rectangle(box, outline="black")
            draw.text((box[0] + 10, box[1] + 7), cell, "black", load_default(17))
    return page


def photo() -> Image.Image:
    """The photo."""
    with get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


def main() -> None:
    """Writes both pictures and prints what each costs."""
    processor = TokenPackerProcessor.from_pretrained(carried_model_path())
    for name, picture in (("document", document()), ("photo", photo())):
        packed = PackedImage.plan(processor, picture, scale_factor=AUTO)
        draw_page(packed, name).save(IMAGES / f"auto-{name}.png", optimize=True)
        print(name, packed.image.size, packed.layout.tile_grid, packed.layout.num_tokens, packed.layout.tile_tokens)
        for factor in (2, 3, 4, 6):
            size = (picture.height, picture.width)
            print(f"  s = {factor}: {processor.image_layout(size, scale_factor=factor).num_tokens}")


if __name__ == "__main__":
    main()

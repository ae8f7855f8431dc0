"""All pages that Pillow draws can be read at half size, whatever they show."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ImageDraw

from tokenpacker.data.check import DataReport, draw_report
from tokenpacker.data.index import Lengths
from tokenpacker.data.samples import Length
from tokenpacker.evaluate.results.elastic_curve import draw_curve as draw_elastic_curve
from tokenpacker.evaluate.results.results_folder import PlanEntry, ResultEntry
from tokenpacker.sequence import ImageLayout
from tokenpacker.tiling import choose_tile_grid, slice_views
from tokenpacker.train.finish import draw_curve
from tokenpacker.visualize import PackedImage, draw_conversation, draw_page
from tokenpacker.visualize.page_style import shorten, wrap

LEAST = 18  # pixels; 9 at half size


@pytest.fixture
def written(monkeypatch):
    """What has been written: (picture, text, box, size), the box with the stroke around the letters."""
    texts, text_of = [], ImageDraw.ImageDraw.text

    def text(draw, xy, text, fill=None, font=None, anchor=None, stroke_width=0, **options):
        box = draw.textbbox(xy, text, font, anchor, stroke_width=stroke_width)
        texts.append((draw._image, text, box, getattr(font, "size", 0)))
        return text_of(draw, xy, text, fill, font, anchor, stroke_width=stroke_width, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def assert_readable(written) -> None:
    shown = [entry for entry in written if entry[1]]
    assert shown
    assert [text for _, text, _, size in shown if size < LEAST] == []
    cut = [
        text
        for picture, text, (left, top, right, bottom), _ in shown
        if left < 0 or top < 0 or right > picture.width or bottom > picture.height
    ]
    assert cut == []
    overlapping = [
        (one[1], other[1])
        for one, other in itertools.combinations(shown, 2)
        if one[0] is other[0]
        and all(one[2][i] + 1 < other[2][i + 2] and other[2][i] + 1 < one[2][i + 2] for i in (0, 1))
    ]
    assert overlapping == []


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("scale_factor", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["sign.png", "W" * 500], ids=["short", "long"])
def test_a_packing_page_can_be_read(written, image_of, size, scale_factor, name):
    grid, side = choose_tile_grid(size, (32, 32)), -(-8 // scale_factor)
    layout = ImageLayout(grid, (side, side))
    factors = (scale_factor,) * grid.num_tiles
    packed = PackedImage(image_of(*size), layout, slice_views(size, grid, (32, 32)), (32, 32), (8, 8), factors)
    weights = np.zeros((16, scale_factor, scale_factor))
    weights[:, 0, 0] = 1
    draw_page(packed, name, 0, weights)
    assert_readable(written)


@pytest.mark.parametrize("said", ["is <mask> a cat?", "", "W" * 500, "it is " * 100])
@pytest.mark.parametrize("size", [(200, 300), (1, 500), (500, 1)])
def test_a_page_of_a_conversation_can_be_read(written, image_of, said, size):
    height, width = size
    boxes = [(0, 0, min(2, width), min(2, height))] * 5 + [(width - 1, height - 1, width, height)] * 5
    draw_conversation([image_of(*size)], [(0, box) for box in boxes], [(True, said), (False, said)])
    assert {str(number) for number in range(1, 11)} <= {text for _, text, _, _ in written}
    assert_readable(written)


@pytest.mark.parametrize(
    "tokens",
    [[], [7], [5] * 100_000 + [100_000], range(1, 3000), range(1_000_000, 9_000_000, 9001)],
    ids=["none", "one", "one far away", "usual", "millions"],
)
@pytest.mark.parametrize("title", ["data.json", "W" * 500], ids=["short", "long"])
def test_a_report_on_data_can_be_read(written, tokens, title):
    numbers = {name: np.asarray(tokens if name == "tokens" else [1] * len(tokens), int) for name in Length._fields}
    draw_report(DataReport(Lengths(**numbers, errors={}), 0.01, False), title)
    assert_readable(written)


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [(1, 0.5)],
        [(1, 1e5), (2, float("nan")), (10**6, 1.0)],
        [(1, float("inf"))],
        [(1, 0.0)],
        [(1, 1e30), (2, 1e-30)],
    ],
)
def test_a_curve_of_losses_can_be_read(written, losses):
    draw_curve(losses)
    assert_readable(written)


def test_text_is_wrapped_and_shortened_to_a_width():
    assert wrap("one two", 18, 1000) == ["one two"]
    assert "".join(wrap("W" * 50, 18, 100)) == "W" * 50
    assert wrap("", 18, 100) == [""]
    assert shorten("one two", 18, 1000) == "one two"
    assert shorten("one two three four", 18, 100).endswith("...")


RESULTS = {
    "one": [(None, 36.0, 50.0, (40.0, 60.0))],
    "no interval": [(2, 36.0, 0.0, None)],
    "equal": [(2, 144.0, 100.0, (100.0, 100.0)), (4, 144.0, 100.0, (100.0, 100.0))],
    "no images": [(2, 0.0, 50.0, (49.0, 51.0))],
    "far": [(2, 1e6, 2000.0, (0.0, 2800.0)), (4, 1.0, -5.0, (-10.0, 0.0))],
    "near": [(2, 100.0, 50.0, (49.99, 50.01)), (3, 100.4, 50.01, (50.0, 50.02)), (4, 101, 50.0, (49.9, 50.1))],
    "many": [(n, 10.0 * n, 40.0 + n, (38.0 + n, 42.0 + n)) for n in range(1, 30)],
}


@pytest.mark.parametrize("rows", RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize("task", ["fine-print", "W" * 500], ids=["short", "long"])
def test_an_elastic_curve_can_be_read(written, rows, task):
    entries = [
        ResultEntry(
            task=task, plan=f"{kind}{n}", numbers={"number" * 9: score},
            interval_95={"number" * 9: span} if span else {},
            questions=9, answered=9, problems=0, image_tokens=tokens * (1 if kind == "s" else 1.7), seconds=1,
        )
        for n, tokens, score, span in rows
        for kind in ("s", "max")
    ]  # fmt: skip
    plans = [PlanEntry(name=entry.plan, max_image_tokens=9 if entry.plan[0] == "m" else None) for entry in entries]
    folder = SimpleNamespace(
        run=SimpleNamespace(plans=plans),
        of_task=lambda name: sorted(entries, key=lambda entry: -entry.image_tokens),
    )
    draw_elastic_curve(folder, task)
    assert_readable(written)
    assert len(written) > 6

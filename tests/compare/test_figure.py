import itertools

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from tokenpacker.compare.figure import OWN_COLOR, Point, draw_figure, styles_of


def drawn(tmp_path, *points: Point, panels: int = 1) -> np.ndarray:
    """(H, W, 3) pixels of the figure with these points in every panel."""
    path = tmp_path / "figure.png"
    draw_figure("title", [("heading", points)] * panels, path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places_of(pixels: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where a color is, the legend at the bottom left out."""
    rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
    legend = int(pixels.shape[0] * 0.75)
    return np.nonzero((pixels[:legend] == rgb).all(axis=-1))


def test_faster_is_left_and_better_is_above(tmp_path):
    pixels = drawn(tmp_path, Point("token-packer", 36, 5.0, 90.0), Point("mlp", 36, 50.0, 80.0))
    own_rows, own_cols = places_of(pixels, OWN_COLOR)
    rows, cols = places_of(pixels, styles_of({"token-packer", "mlp"})["mlp"][0])
    assert own_cols.max() < cols.min()
    assert own_rows.max() < rows.min()


def test_areas_of_marks_are_as_the_tokens(tmp_path):
    pixels = drawn(tmp_path, Point("token-packer", 144, 5.0, 90.0), Point("token-packer", 36, 50.0, 80.0))
    _, cols = places_of(pixels, OWN_COLOR)
    large, small = ((cols < pixels.shape[1] / 2).sum(), (cols > pixels.shape[1] / 2).sum())
    assert large / small == pytest.approx(4, rel=0.2)  # white edges take a little of both


def test_an_interval_is_a_line_through_its_circle(tmp_path):
    points = [Point("token-packer", 36, 5.0, 80.0, half=8.0), Point("mlp", 36, 50.0, 80.0)]
    with_line = drawn(tmp_path, *points)
    without = drawn(tmp_path, Point("token-packer", 36, 5.0, 80.0), Point("mlp", 36, 50.0, 80.0, half=8.0))
    assert (with_line != without).any()


def test_an_interval_ends_at_100_percent(tmp_path):
    lowest = Point("mlp", 36, 50.0, 90.0)
    ends, ends_beyond = (
        places_of(drawn(tmp_path, Point("token-packer", 36, 5.0, 98.0, half=half), lowest), OWN_COLOR)[0].min()
        for half in (2.0, 8.0)
    )
    assert ends == ends_beyond  # the axis reaches no higher, so the circle stays where it is


def test_a_projector_keeps_its_color_and_has_a_mark_of_its_own():
    assert styles_of({"token-packer", "mlp"})["token-packer"] == styles_of({"token-packer"})["token-packer"]
    assert len(set(styles_of({"token-packer", *map(str, range(30))}).values())) == 31


def test_each_panel_adds_to_the_width(tmp_path):
    point = Point("mlp", 36, 5.0, 90.0, 1.0)
    widths = [drawn(tmp_path, point, panels=panels).shape[1] for panels in (2, 3, 4)]
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=1)
    assert widths[1] > widths[0]


OPTIONS = ":option=true,other_option=false"
EXTREMES = {
    "one": [[Point("mlp", 576, 12.3, 50.0)]],
    "equal": [[Point("mlp", 576, 12.3, 100.0, 3.0), Point("token-packer", 576, 12.3, 100.0, 3.0)]] * 2,
    "far": [[Point("token-packer-plus:" * 9, 1, 1.0, 0.0, 60.0), Point("mlp", 100_000, 1e5, 100.0, 60.0)]],
    "near": [[Point(str(i), 9, 24 + i / 2, 95.0 + i, 6.0) for i in range(3)]] * 3,
    "many": [[Point(f"projector-{i}{OPTIONS}", 1 + 100 * i, 1.0 + i * i, 3.3 * i, 5.0 + i) for i in range(30)]] * 3,
}


@pytest.mark.parametrize("panels", EXTREMES.values(), ids=EXTREMES)
def test_a_figure_can_be_read_at_half_size_and_cuts_nothing(panels, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    draw_figure("Accuracy and time to the first token", [("fine print, one tile", points) for points in panels], None)
    (figure,) = figures
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) > 5
    assert min(text.get_fontsize() for text in texts) * figure.dpi / 72 / 2 >= 10  # pixels at half size
    boxes = [text.get_window_extent() for text in texts]
    edges = figure.bbox.padded(1)
    assert [text.get_text() for text, box in zip(texts, boxes, strict=True) if not inside(box, edges)] == []
    pairs = itertools.combinations(zip(texts, boxes, strict=True), 2)
    assert [(one.get_text(), other.get_text()) for (one, a), (other, b) in pairs if a.padded(-1).overlaps(b)] == []
    for axes, points in zip(figure.axes, panels, strict=True):
        lines = [axes.transData.transform(line) for drawn in axes.collections for line in segments(drawn)]
        marks = [drawn for drawn in axes.collections if isinstance(drawn, PathCollection)]
        assert (len(lines), len(marks)) == (sum(point.half is not None for point in points), len(points))
        for mark in marks:
            (middle,), (area,) = axes.transData.transform(mark.get_offsets()), mark.get_sizes()
            lines.append(middle + np.array([[-1.0], [1.0]]) * np.sqrt(area) / 2 * figure.dpi / 72)
        assert all((line >= axes.bbox.min).all() and (line <= axes.bbox.max).all() for line in lines)


def segments(drawn) -> list:
    return drawn.get_segments() if isinstance(drawn, LineCollection) else []


def inside(box, around) -> bool:
    return bool((box.min >= around.min).all() and (box.max <= around.max).all())

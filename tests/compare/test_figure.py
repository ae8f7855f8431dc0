import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from tokenpacker.compare.figure import OWN_COLOR, Point, colors_of, draw_figure


def drawn(tmp_path, *points: Point, panels: int = 1) -> np.ndarray:
    """(H, W, 3) pixels of the figure with these points in every panel."""
    path = tmp_path / "figure.png"
    draw_figure("title", [("heading", points)] * panels, path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places_of(pixels: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where a color is, the legend at the right left out."""
    rgb = [int(color[index : index + 2], 16) for index in (1, 3, 5)]
    legend = int(pixels.shape[1] * 0.79)
    return np.nonzero((pixels[:, :legend] == rgb).all(axis=-1))


def test_faster_is_left_and_better_is_above(tmp_path):
    pixels = drawn(tmp_path, Point("token-packer", 36, 5.0, 90.0), Point("mlp", 36, 50.0, 80.0))
    own_rows, own_cols = places_of(pixels, OWN_COLOR)
    rows, cols = places_of(pixels, colors_of({"token-packer", "mlp"})["mlp"])
    assert own_cols.max() < cols.min()
    assert own_rows.max() < rows.min()


def test_areas_of_circles_are_as_the_tokens(tmp_path):
    pixels = drawn(tmp_path, Point("token-packer", 144, 5.0, 90.0), Point("mlp", 36, 50.0, 80.0))
    large = len(places_of(pixels, OWN_COLOR)[0])
    small = len(places_of(pixels, colors_of({"token-packer", "mlp"})["mlp"])[0])
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


def test_a_color_stays_with_its_projector():
    assert colors_of({"token-packer", "mlp"})["token-packer"] == OWN_COLOR
    assert len(set(colors_of({"token-packer", "mlp", "ldp-v2", "average-pool"}).values())) == 4


def test_each_panel_adds_to_the_width(tmp_path):
    point = Point("mlp", 36, 5.0, 90.0, 1.0)
    widths = [drawn(tmp_path, point, panels=panels).shape[1] for panels in (1, 2, 3)]
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=1)
    assert widths[1] > widths[0]

import pytest

from tokenpacker.compare.figure import ACCENT, MARGIN, PANEL, TITLE, Point, draw_figure


def test_areas_of_circles_are_as_the_tokens():
    small, large = (Point("mlp", tokens, 1.0, 50.0) for tokens in (9, 144))
    assert large.radius**2 / small.radius**2 == pytest.approx(144 / 9)


def test_a_single_circle_stands_in_the_middle_of_its_panel():
    figure = draw_figure("title", [("heading", [Point("token-packer", 144, 10.0, 90.0)])])
    middle = (MARGIN + PANEL // 2, TITLE + 26 + PANEL // 2)
    assert "#{:02x}{:02x}{:02x}".format(*figure.getpixel(middle)) == ACCENT
    assert figure.getpixel((middle[0] + 40, middle[1] + 40)) != figure.getpixel(middle)  # beyond its radius of 20


def test_faster_is_left_and_better_is_above():
    points = [Point("token-packer", 36, 5.0, 90.0), Point("mlp", 36, 50.0, 80.0)]
    figure = draw_figure("title", [("heading", points)])
    accent = tuple(int(ACCENT[index : index + 2], 16) for index in (1, 3, 5))
    places = [
        (x, y)
        for x in range(figure.width)
        for y in range(TITLE + 40, figure.height)
        if figure.getpixel((x, y)) == accent
    ]
    assert places
    assert max(x for x, _ in places) < MARGIN + PANEL / 2
    assert max(y for _, y in places) < TITLE + PANEL / 2


def test_each_panel_adds_to_the_width():
    panel = ("heading", [Point("mlp", 36, 5.0, 90.0, 1.0)])
    assert draw_figure("t", [panel] * 3).width - draw_figure("t", [panel] * 2).width == PANEL + MARGIN

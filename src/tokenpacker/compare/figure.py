"""The figure: accuracy against time to the first token; the area of a mark is the number of tokens per tile."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

OWN, OWN_COLOR = "token-packer", "#d9480f"  # the projector that the package is named after
# Shapes tell projectors apart where colors do not. 10 colors and 7 shapes give 70 marks.
OTHER_COLORS = (
    "#1971c2", "#2b8a3e", "#9c36b5", "#343a40", "#0b7285", "#a65d00", "#a61e4d", "#74a012", "#f06595", "#d4a600",
)  # fmt: skip
CIRCLE, OTHER_SHAPES = "o", ("s", "^", "D", "v", "p", "<", ">")
AREA_PER_TOKEN, LARGEST, SMALLEST = 4.0, 600.0, 30.0  # square points; of the largest mark at most, of the smallest
EDGE = 0.7  # points, of white around a mark
PANEL, TOP, MIN_WIDTH = (3.5, 3.6), 0.4, 6.0  # inches: a panel, the title, the figure
FONT, LINE, LETTER = 10, 16, 6.2  # points: the smallest text, a line of the legend, the mean width of a letter
MAX_SIZES = 4  # in the legend
DPI = 150  # at half of it, FONT is 10 pixels high
ROOM = 0.12  # of an axis, free on both sides for half a mark


@dataclass(frozen=True)
class Point:
    """A mark: its projector, its size and its place. `half` is half the interval of the accuracy."""

    name: str
    tokens: int
    milliseconds: float
    accuracy: float
    half: float | None = None


def require_matplotlib() -> None:
    """Raises ImportError with the remedy if matplotlib is missing."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib; run `pip install 'tokenpacker[compare]'`") from error


def draw_figure(title: str, panels: Sequence[tuple[str, Sequence[Point]]], path: Path) -> None:
    """Writes a PNG of panels side by side, each with its own heading and axes; accuracies in percent."""
    require_matplotlib()
    from matplotlib.figure import Figure

    styles = styles_of({point.name for _, points in panels for point in points})
    tokens = sorted({point.tokens for _, points in panels for point in points})
    areas = {count: max(SMALLEST, min(AREA_PER_TOKEN, LARGEST / tokens[-1]) * count) for count in tokens}
    width = max(MIN_WIDTH, PANEL[0] * len(panels))
    letters = int(72 * width / LETTER)
    names = [_mark(textwrap.fill(name, letters - 10), *styles[name], 50) for name in styles]
    some = [*tokens[: -1 : -(-len(tokens) // MAX_SIZES)], tokens[-1]]
    sizes = [_mark(f"{count:,} tokens a tile", "#868e96", CIRCLE, areas[count]) for count in some]
    legends = [(names, LINE), (sizes, max(LINE, math.sqrt(areas[tokens[-1]]) + 3))]  # with the height of a line
    columns, lines = zip(*(_legend_size(marks, letters) for marks, _ in legends), strict=True)
    heights = [PANEL[1] + TOP, *(count * line / 72 for count, (_, line) in zip(lines, legends, strict=True))]
    figure = Figure((width, sum(heights)), dpi=DPI, layout="constrained")
    charts, *places = figure.subfigures(3, 1, squeeze=False, height_ratios=heights).flat
    charts.suptitle(textwrap.fill(title, int(letters / 1.3)), fontsize=13)
    for axes, (heading, points) in zip(charts.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(heading, fontsize=11)
        _draw_panel(axes, points, styles, areas)
    charts.supylabel("accuracy, %", fontsize=FONT)
    lines_are = "lines: 95 % interval of the accuracy over seeds"
    charts.supxlabel(f"ms to the first token (logarithmic)\n{lines_are}", fontsize=FONT)
    for place, (marks, line), number in zip(places, legends, columns, strict=True):
        spacing = line / FONT - 1.2  # in sizes of the text, of which a line takes 1.2
        place.legend(handles=marks, loc="center", ncols=number, labelspacing=spacing, fontsize=FONT, frameon=False)
    figure.savefig(path)


def styles_of(names: set[str]) -> dict[str, tuple[str, str]]:
    """A color and a shape for each name, the same for the same set of names; `OWN` always has the same."""
    others = sorted(names - {OWN})
    styles = {
        name: (OTHER_COLORS[index % len(OTHER_COLORS)], OTHER_SHAPES[index % len(OTHER_SHAPES)])
        for index, name in enumerate(others)
    }
    return ({OWN: (OWN_COLOR, CIRCLE)} if OWN in names else {}) | styles


def _draw_panel(
    axes: Axes, points: Sequence[Point], styles: Mapping[str, tuple[str, str]], areas: Mapping[int, float]
) -> None:
    """Draws marks and intervals, with limits that hold them all."""
    ends: list[float] = []
    for point in sorted(points, key=lambda point: -point.tokens):  # small ones on top
        place, (color, shape) = (point.milliseconds, point.accuracy), styles[point.name]
        half = point.half or 0.0
        reach = min(half, point.accuracy), min(half, 100 - point.accuracy)
        ends += [point.accuracy - reach[0], point.accuracy + reach[1]]
        if point.half is not None:
            axes.errorbar(*place, yerr=[[reach[0]], [reach[1]]], color=color, capsize=2, alpha=0.7, zorder=1)
        area = areas[point.tokens]
        axes.scatter(*place, s=area, color=color, marker=shape, edgecolor="white", linewidths=EDGE, zorder=2)
    axes.set_xscale("log")
    axes.minorticks_off()
    times = [math.log10(point.milliseconds) for point in points]
    left, right = _with_room(min(times), max(times), least=0.05)
    low, high = _with_room(min(ends), max(ends), least=1.0)
    axes.set_xlim(10**left, 10**right)
    axes.set_ylim(low, high)
    ticks = _log_ticks(10**left, 10**right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([tick for tick in axes.get_yticks() if max(0, low) <= tick <= min(100, high)])
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25)


def _with_room(low: float, high: float, least: float) -> tuple[float, float]:
    """Limits with room on both sides; they are at least `least` apart from the middle."""
    middle, reach = (low + high) / 2, max((high - low) / 2 / (1 - 2 * ROOM), least)
    return middle - reach, middle + reach


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis, few enough for labels side by side."""
    from matplotlib.ticker import MaxNLocator

    if high < 4 * low:
        ticks = MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high)
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in ((1, 2, 5) if high < 50 * low else (1,))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks[:: -(-len(ticks) // 5)]


def _legend_size(marks: Sequence[Line2D], letters: int) -> tuple[int, int]:
    """(columns, lines of text) of a legend in a figure that is so many letters wide."""
    labels = [str(mark.get_label()).split("\n") for mark in marks]
    columns = max(1, letters // (max(len(line) for lines in labels for line in lines) + 8))
    return columns, -(-len(marks) // columns) * max(map(len, labels))


def _mark(label: str, color: str, shape: str, area: float) -> Line2D:
    """A legend entry."""
    from matplotlib.lines import Line2D

    size = math.sqrt(area)  # as `scatter` has it: area against diameter
    mark = Line2D([], [], linestyle="", marker=shape, markersize=size, color=color, label=label)
    mark.set_markeredgecolor("white")
    mark.set_markeredgewidth(EDGE)
    return mark

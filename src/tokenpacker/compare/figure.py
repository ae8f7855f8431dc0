"""The figure: accuracy against time to the first token; the area of a circle is the number of tokens per tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OWN, OWN_COLOR = "token-packer", "#d9480f"  # the projector that the package is named after
OTHER_COLORS = ("#1c7ed6", "#2f9e44", "#9c36b5", "#343a40", "#0c8599", "#f08c00", "#5c940d", "#a61e4d", "#74b816")
AREA_PER_TOKEN = 4.0  # square points
PANEL = (4.4, 4.2)  # inches
DPI = 130


@dataclass(frozen=True)
class Point:
    """A circle: its projector, its size and its place. `half` is half the interval of the accuracy."""

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
    from matplotlib.ticker import FuncFormatter

    colors = colors_of({point.name for _, points in panels for point in points})
    figure = Figure((PANEL[0] * len(panels) + 2.2, PANEL[1]), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=13)
    for axes, (heading, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for point in sorted(points, key=lambda point: -point.tokens):  # small ones on top
            place = (point.milliseconds, point.accuracy)
            if point.half is not None:
                reach = [[min(point.half, point.accuracy)], [min(point.half, 100 - point.accuracy)]]
                axes.errorbar(*place, yerr=reach, color=colors[point.name], linewidth=1, alpha=0.6, zorder=1)
            area = AREA_PER_TOKEN * point.tokens
            axes.scatter(*place, s=area, color=colors[point.name], edgecolor="white", zorder=2)
        axes.set_title(heading, fontsize=11)
        axes.set_xlabel("ms to the first token (logarithmic)")
        axes.set_xscale("log")
        for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(which="both", labelsize=8, length=3, pad=4)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy, %; lines: 95 % interval over seeds")
    circles = [_circle(name, color, 36) for name, color in colors.items()]
    circles += [
        _circle(f"{tokens} tokens a tile", "#adb5bd", tokens)
        for tokens in sorted({point.tokens for _, points in panels for point in points})
    ]
    figure.legend(
        handles=circles, loc="outside right center", fontsize=8, frameon=False, labelspacing=1.1, handlelength=3
    )
    figure.savefig(path)


def colors_of(names: set[str]) -> dict[str, str]:
    """A color for each name, the same for the same set of names; `OWN` always has the same color."""
    others = sorted(names - {OWN})
    colors = {name: OTHER_COLORS[index % len(OTHER_COLORS)] for index, name in enumerate(others)}
    return ({OWN: OWN_COLOR} if OWN in names else {}) | colors


def _circle(label: str, color: str, tokens: int) -> object:
    """A legend entry."""
    from matplotlib.lines import Line2D

    size = math.sqrt(AREA_PER_TOKEN * tokens)  # as `scatter` has it: area against diameter
    return Line2D([], [], linestyle="", marker="o", markersize=size, color=color, markeredgecolor="white", label=label)

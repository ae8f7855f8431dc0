"""The figures of a probe: accuracy over tokens, with a panel for each number of steps, and over steps of training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenpacker.compare.figure import DPI, EDGE, FONT, OWN, require_matplotlib, styles_of
from tokenpacker.compare.intervals import Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

FULL = "mlp"  # keeps all tokens; over steps it stands in every panel
PANEL, MIN_WIDTH, COLUMNS = (3.6, 3.3), 6.0, 3  # inches of a panel and of the figure, panels of a row
TOP = 0.7  # inches, of the title and the label below
LETTER, LETTERS, LINE = 6.2, 44, 16  # points, of a letter; letters of a name; points, of a line of the legend
MARK = 6.5  # points
Curve = Sequence[tuple[int, Mean]]  # tokens or steps, and the accuracy in percent
Panel = tuple[str, dict[str, Curve]]  # a heading, and curves by projector


def draw_over_tokens(title: str, accuracies: Mapping[tuple[str, int, int], Mean], path: Path) -> None:
    """Writes a PNG of accuracies in percent by (projector, tokens, steps), with a panel for each number of steps."""
    by_steps: dict[int, dict[str, list[tuple[int, Mean]]]] = {}
    for (name, tokens, steps), mean in accuracies.items():
        by_steps.setdefault(steps, {}).setdefault(name, []).append((tokens, mean))
    panels: list[Panel] = [(f"{steps:,} steps", {**by_steps[steps]}) for steps in sorted(by_steps)]
    _draw(title, panels, path, counts=sorted({tokens for _, tokens, _ in accuracies}))


def draw_over_steps(title: str, curves: Mapping[tuple[str, int], Curve], path: Path) -> None:
    """Writes a PNG of accuracies in percent after so many steps, by (projector, tokens), a panel for each of tokens."""
    full = {name: curve for (name, _), curve in curves.items() if name == FULL}
    by_tokens: dict[int, dict[str, Curve]] = {}
    for (name, tokens), curve in curves.items():
        if name != FULL:
            by_tokens.setdefault(tokens, dict(full))[name] = curve
    panels: list[Panel] = [(f"{tokens:,} tokens", by_tokens[tokens]) for tokens in sorted(by_tokens, reverse=True)]
    _draw(title, panels or [("all tokens", full)], path)


def _draw(title: str, panels: Sequence[Panel], path: Path, counts: Sequence[int] | None = None) -> None:
    """Panels in rows, the legend below. With `counts` of tokens the axis is logarithmic, and has those counts."""
    require_matplotlib()
    from matplotlib.figure import Figure

    styles = styles_of({name for _, curves in panels for name in curves})
    cols = min(COLUMNS, len(panels))
    rows, width = -(-len(panels) // cols), max(MIN_WIDTH, PANEL[0] * cols)
    labels = {name: textwrap.fill(name.replace(":", ": "), LETTERS) for name in styles}
    labels |= {FULL: f"{FULL}, all tokens"} if FULL in labels else {}
    longest = max(len(line) for label in labels.values() for line in label.split("\n"))
    columns = max(1, int(72 * width / LETTER) // (longest + 8))
    high = [label.count("\n") + 1 for label in labels.values()]
    names = -(-len(high) // columns)  # of a column
    lines = max(sum(high[start : start + names]) for start in range(0, len(high), names))
    heights = PANEL[1] * rows + TOP, lines * LINE / 72
    figure = Figure((width, sum(heights)), dpi=DPI, layout="constrained")
    charts, legend = figure.subfigures(2, 1, height_ratios=heights)
    grid = charts.subplots(rows, cols, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (heading, curves) in zip(grid.flat, panels, strict=False):
        axes.set_title(heading, fontsize=11)
        _draw_panel(axes, curves, styles)
        if counts:
            _show_counts(axes, counts)
        else:
            _show_steps(axes)
    low, high = grid[0][0].get_ylim()  # of all panels
    grid[0][0].set_yticks([tick for tick in grid[0][0].get_yticks() if max(0, low) <= tick <= min(100, high)])
    charts.suptitle(title, fontsize=13)
    charts.supylabel("accuracy, %", fontsize=FONT)
    over = "tokens of a picture (logarithmic)" if counts else "training steps"
    charts.supxlabel(f"{over}; lines: 95 % interval over seeds", fontsize=FONT)
    marks = [_mark(labels[name], *styles[name]) for name in styles]
    legend.legend(
        handles=marks, loc="center", ncols=columns, labelspacing=LINE / FONT - 1.2, fontsize=FONT, frameon=False
    )
    figure.savefig(path)


def _draw_panel(axes: Axes, curves: Mapping[str, Curve], styles: Mapping[str, tuple[str, str]]) -> None:
    for name, curve in sorted(curves.items(), key=lambda item: item[0] == OWN):  # its own on top
        color, shape = styles[name]
        places, means = zip(*sorted(curve, key=lambda point: point[0]), strict=True)
        values = [mean.mean for mean in means]
        reach = [
            [min(mean.half or 0.0, mean.mean) for mean in means],
            [min(mean.half or 0.0, 100 - mean.mean) for mean in means],
        ]
        axes.errorbar(
            places, values, yerr=reach, color=color, marker=shape, markersize=MARK, markeredgecolor="white",
            markeredgewidth=EDGE, linewidth=1.6 if name == OWN else 1.1, elinewidth=0.8, capsize=2,
            linestyle="--" if name == FULL else "-",
        )  # fmt: skip
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25)


def _show_counts(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
    axes.set_xticks(list(counts), [f"{count:,}" for count in counts])


def _show_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    last = axes.get_xlim()[1]
    ticks = [tick for tick in MaxNLocator(5).tick_values(0, last) if tick <= last]
    axes.set_xlim(0, last)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])


def _mark(label: str, color: str, shape: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=color, marker=shape, markersize=MARK, markeredgecolor="white", markeredgewidth=EDGE, label=label
    )

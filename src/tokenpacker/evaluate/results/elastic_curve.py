"""The elastic curve: score against image tokens over all plans of a run, as a figure and as a table.

Sizes in pixels. The figure is shown at half its size or smaller, so its text is twice that of a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont, ImageFont, load_default

from tokenpacker.evaluate.results.results_folder import PlanEntry, ResultEntry, ResultsFolder
from tokenpacker.visualize.page_style import FAINT_INK, INK, PADDING, PAPER, shorten

SIZE = WIDTH, HEIGHT = 1440, 800
TEXT, TITLE = 30, 38  # sizes of text
TOP, BOTTOM, SIDE, GAP = 150, 116, 40, 14  # free above and below the axes, at the sides, and beside a mark
MARK, THIN, THICK, HALO = 11, 2, 5, 3  # half a mark; widths of lines, and of the paper around a label
ROOM = 0.09  # of an axis, free on both sides
COLUMNS = 2  # of a figure with several tasks

Font = FreeTypeFont | ImageFont
Kind = Literal["auto", "budget", "factor"]
KINDS: dict[Kind, str] = {"auto": "auto", "budget": "budget", "factor": "scale factor"}  # what the legend calls them


@dataclass(frozen=True)
class Colors:
    """What a figure is drawn in."""

    ink: str = INK
    faint: str = FAINT_INK
    rule: str = PADDING
    paper: str = PAPER
    factor: str = "#c2410c"
    budget: str = "#1971c2"
    auto: str = "#2b8a3e"


LIGHT = Colors()
DARK = Colors("#eceae4", "#a0a5ab", "#32363a", "#1c1f22", "#ff9466", "#79b8f5", "#7bd88f")


def plan_text(plan: PlanEntry) -> str:
    """What a plan does, in words."""
    parts = [f"scale factor {plan.scale_factor}"] if plan.scale_factor else []
    parts += [f"at most {plan.max_image_tokens:,} tokens an image"] if plan.max_image_tokens else []
    return ", ".join(parts) or "the model's own"


def draw_curves(folder: ResultsFolder, colors: Colors = LIGHT) -> Image.Image | None:
    """A panel for each task, side by side in two columns; None if no task has a score."""
    panels = [draw_curve(folder, task.name, colors) for task in folder.run.tasks if scored(folder, task.name)]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    page = Image.new("RGB", (columns * WIDTH, -(-len(panels) // columns) * HEIGHT), colors.paper)
    for place, panel in enumerate(panels):
        page.paste(panel, (place % columns * WIDTH, place // columns * HEIGHT))
    return page


def curve_table(folder: ResultsFolder) -> str:
    """The same as a Markdown table, a row for each task and plan."""
    lines = ["| task | plan | image tokens | score | 95 % interval | questions |", "|---|---|--:|--:|--:|--:|"]
    plans = {plan.name: plan_text(plan) for plan in folder.run.plans}
    for task in folder.run.tasks:
        for entry in folder.of_task(task.name):
            cells = (
                f"{_cell(task.name)}, {_cell(entry.headline or 'not scored')}",
                _cell(plans.get(entry.plan, entry.plan)),
                number(entry.image_tokens),
                number(entry.score),
                span(entry.interval),
                f"{entry.questions:,}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None, sign: str = "-") -> str:
    """A score with one digit; `-` if there is none. `sign="+"` is for differences."""
    return "-" if value is None else f"{value:{sign},.1f}"


def span(interval: tuple[float, float] | None, sign: str = "-") -> str:
    """An interval in words."""
    return "-" if interval is None else f"{number(interval[0], sign)} to {number(interval[1], sign)}"


def scored(folder: ResultsFolder, task: str) -> list[ResultEntry]:
    """A task's results with a score, fewest tokens first."""
    return [entry for entry in reversed(folder.of_task(task)) if entry.score is not None]


def draw_curve(folder: ResultsFolder, task: str, colors: Colors = LIGHT) -> Image.Image:
    """The score of a task against its image tokens, with 95 % intervals; the plans must have scores."""
    entries = scored(folder, task)
    kinds = {plan.name: _kind(plan) for plan in folder.run.plans}
    picture = Image.new("RGB", SIZE, colors.paper)
    draw, font = ImageDraw.Draw(picture), load_default(TEXT)
    draw.text((SIDE, SIDE), shorten(task, TITLE, WIDTH - 2 * SIDE), colors.ink, load_default(TITLE))
    axes = _Axes.of(entries, font)
    _draw_axes(draw, axes, colors, font)
    headline = shorten(f"{entries[0].headline}, with 95 % intervals", TEXT, WIDTH / 2)
    draw.text((SIDE, TOP - 24), headline, colors.faint, font, "ls")
    draw.text((WIDTH - SIDE, HEIGHT - 28), "image tokens of a question, mean (logarithmic)", colors.faint, font, "rs")
    taken = [(*axes.place(entry), *axes.place(entry)) for entry in entries]
    taken = [(left - MARK, top - MARK, right + MARK, bottom + MARK) for left, top, right, bottom in taken]
    right = WIDTH - SIDE
    for kind, name in KINDS.items():
        members, color = [entry for entry in entries if kinds.get(entry.plan) == kind], getattr(colors, kind)
        if len(members) > 1:
            draw.line([axes.place(entry) for entry in members], color, THICK)
        for entry in members:
            taken.append(_draw_mark(draw, axes, entry, kind, color))
        if members:
            draw.text((right, TOP - 24), name, colors.faint, font, "rs")
            right -= round(font.getlength(name)) + GAP + MARK
            _shape(draw, (right, TOP - 34), kind, color)
            right -= MARK + 3 * GAP
    for entry in entries:
        _draw_label(draw, axes, entry, taken, colors, font)
    return picture


@dataclass(frozen=True)
class _Axes:
    """Where scores and tokens lie. `left` is where the axes begin; x is the logarithm of the tokens."""

    left: float
    xs: tuple[float, float]
    ys: tuple[float, float]

    @classmethod
    def of(cls, entries: Sequence[ResultEntry], font: Font) -> _Axes:
        ends = [value for entry in entries for value in (entry.score or 0.0, *(entry.interval or ()))]
        tokens = [math.log10(max(1.0, entry.image_tokens or 0.0)) for entry in entries]
        ys = _with_room(min(ends), max(ends), least=0.5)
        labels = max(font.getlength(_label(tick)) for tick in _ticks(*ys))
        return cls(SIDE + labels + GAP, _with_room(min(tokens), max(tokens), least=0.02), ys)

    def x(self, tokens: float) -> float:
        share = (math.log10(max(1.0, tokens)) - self.xs[0]) / (self.xs[1] - self.xs[0])
        return self.left + share * (WIDTH - SIDE - self.left)

    def y(self, score: float) -> float:
        return HEIGHT - BOTTOM - (score - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - BOTTOM - TOP)

    def place(self, entry: ResultEntry) -> tuple[float, float]:
        return self.x(entry.image_tokens or 0.0), self.y(entry.score or 0.0)


def _draw_axes(draw: ImageDraw.ImageDraw, axes: _Axes, colors: Colors, font: Font) -> None:
    for tick in _ticks(*axes.ys):
        draw.line((axes.left, axes.y(tick), WIDTH - SIDE, axes.y(tick)), colors.rule, THIN)
        draw.text((axes.left - GAP, axes.y(tick)), _label(tick), colors.faint, font, "rm")
    end = -math.inf
    for tick in _log_ticks(*axes.xs):
        half = font.getlength(_label(tick)) / 2
        if axes.x(tick) - half < end + 2 * GAP or axes.x(tick) + half > WIDTH:
            continue
        end = axes.x(tick) + half
        draw.line((axes.x(tick), HEIGHT - BOTTOM, axes.x(tick), HEIGHT - BOTTOM + GAP / 2), colors.faint, THIN)
        draw.text((axes.x(tick), HEIGHT - BOTTOM + GAP), _label(tick), colors.faint, font, "mt")
    draw.line((axes.left, HEIGHT - BOTTOM, WIDTH - SIDE, HEIGHT - BOTTOM), colors.faint, THIN)


def _kind(plan: PlanEntry) -> Kind:
    if plan.scale_factor == "auto":
        return "auto"
    return "budget" if plan.max_image_tokens else "factor"


def _draw_mark(
    draw: ImageDraw.ImageDraw, axes: _Axes, entry: ResultEntry, kind: Kind, color: str
) -> tuple[float, float, float, float]:
    """Draws a mark with its interval, and returns the box around the interval."""
    x, y = axes.place(entry)
    high, low = (axes.y(end) for end in reversed(entry.interval or (entry.score or 0.0,) * 2))
    draw.line((x, high, x, low), color, THICK - 1)
    for end in (high, low):
        draw.line((x - MARK + 2, end, x + MARK - 2, end), color, THICK - 1)
    _shape(draw, (x, y), kind, color)
    return x - THICK, high, x + THICK, low


def _shape(draw: ImageDraw.ImageDraw, place: tuple[float, float], kind: Kind, color: str) -> None:
    """A circle for a scale factor, a square for a budget, a diamond for `auto`."""
    x, y = place
    if kind == "auto":
        reach = 1.3 * MARK
        draw.polygon([(x - reach, y), (x, y - reach), (x + reach, y), (x, y + reach)], color)
    else:
        (draw.rectangle if kind == "budget" else draw.ellipse)((x - MARK, y - MARK, x + MARK, y + MARK), color)


def _draw_label(
    draw: ImageDraw.ImageDraw,
    axes: _Axes,
    entry: ResultEntry,
    taken: list[tuple[float, float, float, float]],
    colors: Colors,
    font: Font,
) -> None:
    """Writes the plan's name beside its mark where there is room; the table has it anyway."""
    x, y = axes.place(entry)
    reach = MARK + GAP / 2
    for anchor, across, down in (("rs", -1, -1), ("lt", 1, 1), ("ls", 1, -1), ("rt", -1, 1), ("lm", 1, 0)):
        place = x + across * reach, y + down * reach * (0.4 if down else 0)
        left, top, right, bottom = draw.textbbox(place, entry.plan, font, anchor, stroke_width=HALO)
        is_inside = axes.left <= left and right <= WIDTH - SIDE and top >= TOP - 8 and bottom <= HEIGHT - BOTTOM
        if is_inside and not any(a < right and left < c and b < bottom and top < d for a, b, c, d in taken):
            draw.text(place, entry.plan, colors.ink, font, anchor, stroke_width=HALO, stroke_fill=colors.paper)
            taken.append((left, top, right, bottom))
            return


def _with_room(low: float, high: float, least: float) -> tuple[float, float]:
    """Limits with room on both sides; at least `least` from the middle."""
    reach = max((high - low) / 2 * (1 + 2 * ROOM), least)
    return (low + high) / 2 - reach, (low + high) / 2 + reach


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` round values between the limits."""
    unit = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(unit * digit for digit in (1, 2, 5, 10) if unit * digit * count >= high - low)
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round values between powers of ten."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if 10**low <= tick <= 10**high]
    return ticks if len(ticks) > 2 else _ticks(10**low, 10**high)


def _label(tick: float) -> str:
    return f"{tick:,.10g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

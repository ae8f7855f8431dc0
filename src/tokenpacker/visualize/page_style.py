"""Colours, sizes and lines of text that all drawn pages share; sizes in pixels. Pages are often shown at half size."""

from __future__ import annotations

from PIL.ImageFont import load_default

INK, FAINT_INK, PAPER, PADDING, RULE = "#1f2328", "#59636e", "#ffffff", "#d8dee4", "#afb8c1"
ACCENT = (194, 65, 12)  # tile borders, the chosen token and its attention, bars
MARGIN = 36
PANEL = 460  # side of the square that the picture of a panel is fitted into
SMALL, MEDIUM, LARGE = 18, 22, 28  # sizes of text; no text is smaller than SMALL, which can be read at half size
LEADING = 1.3  # height of a line, in sizes of its text


def wrap(text: str, size: int, width: float) -> list[str]:
    """Returns the text in lines of at most `width` pixels; words that are wider are cut."""
    font = load_default(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def shorten(text: str, size: int, width: float) -> str:
    """Returns the text in one line of at most `width` pixels; an end that does not fit becomes three dots."""
    first, *more = wrap(text, size, width)
    if not more:
        return first
    return wrap(f"{first} {more[0]}", size, width - load_default(size).getlength("..."))[0] + "..."

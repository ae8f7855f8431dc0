"""The page of `tokenpacker show`: an image's tiles, its packed tokens, and the attention of one token.

Shapes: H heads, s scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font

from tokenpacker.sequence import TokenSource
from tokenpacker.tiling import Box, TileView
from tokenpacker.visualize.packed_image import PackedImage
from tokenpacker.visualize.page_style import (
    ACCENT,
    FAINT_INK,
    INK,
    LARGE,
    LEADING,
    MARGIN,
    MEDIUM,
    PADDING,
    PANEL,
    PAPER,
    RULE,
    SMALL,
    shorten,
    wrap,
)

THUMBNAIL, THUMBNAIL_GAP = 96, 16
CAPTION_TOP = 136
BADGE = 28  # side of a tile's number
HEAD, HEAD_GAP, HEADS_PER_ROW = 48, 10, 8


def draw_page(
    packed: PackedImage, title: str, token: int | None = None, weights: np.ndarray | None = None
) -> Image.Image:
    """Returns the page of `tokenpacker show`: the image with its tiles, its tokens, and one token's attention.

    Args:
        token: index in the image's token sequence; not a separator.
        weights: (H, rows, cols), that token's attention over the patches of its window; None for no third panel.
    """
    grid, (tile_height, tile_width) = packed.layout.tile_grid, packed.tile_size
    panels = [
        ("Tiles", f"what the encoder reads, {tile_height} x {tile_width} pixels each", draw_tiles(packed)),
        ("Packed tokens", _explain_tokens(packed), draw_tokens(packed, token)),
    ]
    if packed.reasons is not None:
        panels.append(("Tokens by detail", "the mean difference of neighbouring pixels decides", draw_reasons(packed)))
    if weights is not None and token is not None:
        explanation = f"over its {weights.shape[1]} x {weights.shape[2]} patches: mean, then each head"
        panels.append((f"Attention of token {token}", explanation, draw_attention(packed, token, weights)))
    explanations = [wrap(explanation, SMALL, PANEL) for _, explanation, _ in panels]
    line = round(SMALL * LEADING)
    panel_top = CAPTION_TOP + 34 + max(map(len, explanations)) * line + 8
    height = panel_top + max(picture.height for *_, picture in panels) + MARGIN
    page = Image.new("RGB", (len(panels) * (PANEL + MARGIN) + MARGIN, height), PAPER)
    draw = ImageDraw.Draw(page)
    tiles = f"{grid.rows} x {grid.cols} tiles + thumbnail" if grid.has_thumbnail else "1 tile"
    cost = f"{packed.layout.num_tokens} tokens instead of {packed.num_full_tokens}"
    facts = f"{packed.image.height} x {packed.image.width} pixels, {tiles}: {cost}"
    draw.text((MARGIN, MARGIN), shorten(title, LARGE, page.width - 2 * MARGIN), INK, font(LARGE))
    draw.text((MARGIN, MARGIN + 40), facts, FAINT_INK, font(MEDIUM))
    for index, (caption, _, picture) in enumerate(panels):
        left = MARGIN + index * (PANEL + MARGIN)
        draw.text((left, CAPTION_TOP), caption, INK, font(MEDIUM))
        for number, text in enumerate(explanations[index]):
            draw.text((left, CAPTION_TOP + 34 + number * line), text, FAINT_INK, font(SMALL))
        page.paste(picture, (left, panel_top))
    return page


def _explain_tokens(packed: PackedImage) -> str:
    if packed.reasons is not None:
        return "each tile by its detail; grey is padding"
    (rows, cols), side = packed.layout.token_grid, packed.scale_factors[0]
    return f"{rows} x {cols} a tile, one for {side} x {side} patches; grey is padding"


def draw_reasons(packed: PackedImage) -> Image.Image:
    """Returns a panel with a line for each tile: its tokens, and why the router gave it so many."""
    lines, step = [], round(SMALL * LEADING)
    for tile, (count, reason) in enumerate(zip(packed.layout.tile_tokens, packed.reasons or (), strict=True)):
        is_thumbnail = packed.layout.tile_grid.has_thumbnail and tile == len(packed.views) - 1
        lines.append((f"{'thumbnail' if is_thumbnail else f'tile {tile + 1}'}: {count}", reason))
    panel = Image.new("RGB", (PANEL, step * len(lines)), PAPER)
    draw = ImageDraw.Draw(panel)
    for number, (name, reason) in enumerate(lines):
        draw.text((0, number * step), name, INK, font(SMALL))
        draw.text((PANEL // 3, number * step), shorten(reason, SMALL, PANEL * 2 // 3), FAINT_INK, font(SMALL))
    return panel


def draw_tiles(packed: PackedImage) -> Image.Image:
    """Returns the image with the borders and numbers of its tiles; the thumbnail below."""
    panel, frame, thumbnail_frame = _new_panel(packed)
    draw = ImageDraw.Draw(panel)
    has_thumbnail = packed.layout.tile_grid.has_thumbnail
    thumbnail = len(packed.views) - 1 if has_thumbnail else None
    for tile in range(len(packed.views)):
        place = thumbnail_frame if tile == thumbnail else frame
        top, left, bottom, right = place.box(packed.tile_box(tile))
        draw.rectangle((left, top, right - 1, bottom - 1), fill=PADDING)
        _paste(panel, packed.image, packed.tile_box(tile), (top, left, bottom, right))
        _frame(draw, (left, top, right - 1, bottom - 1), 2)
        if tile == thumbnail:
            draw.text((right + 12, top), "thumbnail", FAINT_INK, font(SMALL))
        elif has_thumbnail and min(bottom - top, right - left) > BADGE:
            draw.rectangle((left, top, left + BADGE, top + BADGE), fill=ACCENT)
            draw.text((left + BADGE / 2, top + BADGE / 2), str(tile + 1), PAPER, font(SMALL), anchor="mm")
    return panel


def draw_tokens(packed: PackedImage, chosen: int | None = None) -> Image.Image:
    """Returns a panel with each token as a square in the mean colour of its pixels; the chosen one is framed."""
    panel, frame, thumbnail_frame = _new_panel(packed)
    draw = ImageDraw.Draw(panel)
    shown = packed.image.copy()
    shown.thumbnail((1024, 1024))  # enough for mean colours, and quick for large photographs
    ratio = (shown.height / packed.image.height, shown.width / packed.image.width)
    chosen_frame = None
    for token in range(packed.layout.num_tokens):
        source = packed.source(token)
        if source is None:
            continue
        place = thumbnail_frame if source.is_thumbnail else frame
        top, left, bottom, right = place.box(packed.window_box(source.tile, source.row, source.col))
        gap = 1 if right - left > 5 and bottom - top > 5 else 0
        cell = (left, top, max(left, right - 1 - gap), max(top, bottom - 1 - gap))
        colour = PADDING if source.box is None else _mean_colour(shown, source.box, ratio)
        draw.rectangle(cell, fill=colour, outline=RULE if gap else None)
        if token == chosen:
            chosen_frame = (
                max(0, cell[0] - 3),
                max(0, cell[1] - 3),
                min(panel.width - 1, cell[2] + 3),
                min(panel.height - 1, cell[3] + 3),
            )
    if chosen_frame:
        _frame(draw, chosen_frame, 3)
    if packed.layout.tile_grid.has_thumbnail:
        top, _, _, right = thumbnail_frame.box(packed.tile_box(len(packed.views) - 1))
        count = packed.layout.tile_tokens[-1]
        more = f"thumbnail: {count} token{'' if count == 1 else 's'} more"
        draw.text((right + 12, top), more, FAINT_INK, font(SMALL))
    return panel


def draw_attention(packed: PackedImage, token: int, weights: np.ndarray) -> Image.Image:
    """Returns a panel with a token's window and its attention (H, rows, cols): the mean of the heads, then each head.

    Raises:
        ValueError: if the token is a separator, or if its window has another number of patches.
    """
    source = packed.source(token)
    if source is None:
        raise ValueError(f"token {token} is a separator and shows nothing; choose a neighbour")
    if weights.shape[1:] != packed.window_patches(source):
        (rows, cols), given = packed.window_patches(source), "x".join(map(str, weights.shape[1:]))
        raise ValueError(f"the weights are of {given} patches, but the window of token {token} has {rows}x{cols}")
    num_heads = len(weights)
    head_rows, step = -(-num_heads // HEADS_PER_ROW), HEAD + HEAD_GAP
    panel = Image.new("RGB", (PANEL, PANEL + 12 + head_rows * step - HEAD_GAP), PAPER)
    panel.paste(_window_with_surroundings(packed, source, weights.mean(axis=0)), (0, 0))
    for head in range(num_heads):
        row, col = divmod(head, HEADS_PER_ROW)
        size = tuple(max(1, HEAD * patches // packed.scale_factors[source.tile]) for patches in weights.shape[:0:-1])
        picture = _heat(Image.new("RGB", size, PADDING), weights[head])
        panel.paste(picture, (col * step, PANEL + 12 + row * step))
    return panel


def _window_with_surroundings(packed: PackedImage, source: TokenSource, weights: np.ndarray) -> Image.Image:
    """The window in the middle in grey, its patches labelled by weight (rows, cols), and pale picture around it.

    Half a window is around a whole one; more where the tile ends within it. If patches are too small for labels, only
    the one with the largest weight has one.
    """
    (height, width), view = packed.window_size(source.tile), packed.views[source.tile]
    top, left = source.row * height, source.col * width
    around = view.unclipped((top - height / 2, left - width / 2, top + height * 1.5, left + width * 1.5))
    picture = Image.new("RGB", (PANEL, PANEL), PADDING)
    _paste(picture, packed.image, around, (0, 0, PANEL, PANEL))
    start, cell = PANEL // 4, PANEL / 2 / packed.scale_factors[source.tile]
    rows, cols = weights.shape
    window = (
        picture.crop((start, start, start + round(cols * cell), start + round(rows * cell))).convert("L").convert("RGB")
    )
    picture = Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.55)
    picture.paste(_heat(window, weights), (start, start))
    draw = ImageDraw.Draw(picture)
    label = font(MEDIUM if cell > 80 else SMALL)
    width = 2 if cell > 8 else 1
    labelled = np.ones_like(weights, bool) if cell > label.getlength("100%") + 4 else weights == weights.max()
    for (row, col), _ in np.ndenumerate(weights):
        y, x = start + row * cell, start + col * cell
        draw.rectangle((x, y, x + cell, y + cell), outline=ACCENT, width=width)
    for row, col in np.argwhere(labelled)[: weights.size if labelled.all() else 1]:
        place, text = (start + (col + 0.5) * cell, start + (row + 0.5) * cell), f"{weights[row, col]:.0%}"
        draw.text(place, text, INK, label, "mm", stroke_width=3, stroke_fill=PAPER)
    return picture


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], width: int) -> None:
    """Draws a frame with a pale line inside, so that it stands out from an image of its colour."""
    left, top, right, bottom = box
    if min(right - left, bottom - top) > 4 * width:
        draw.rectangle((left + width, top + width, right - width, bottom - width), outline=PAPER)
    draw.rectangle(box, outline=ACCENT, width=width)


@dataclass(frozen=True)
class _Frame:
    """Maps image pixels to panel pixels: `corner` (top, left) of the image goes to `origin`, magnified by `scale`."""

    corner: tuple[float, float]
    scale: tuple[float, float]
    origin: tuple[int, int] = (0, 0)

    def box(self, box: Box) -> tuple[int, int, int, int]:
        """Returns an image box in panel pixels, at least one pixel wide and high."""
        top, bottom = (round((y - self.corner[0]) * self.scale[0]) + self.origin[0] for y in box[::2])
        left, right = (round((x - self.corner[1]) * self.scale[1]) + self.origin[1] for x in box[1::2])
        return top, left, max(bottom, top + 1), max(right, left + 1)


def _fit(box: Box, view: TileView, size: int, origin: tuple[int, int] = (0, 0)) -> _Frame:
    """The frame that fits an image box into a square, with the proportions that the encoder sees."""
    zoom = size / max((box[2] - box[0]) / view.scale[0], (box[3] - box[1]) / view.scale[1])
    return _Frame((box[0], box[1]), (zoom / view.scale[0], zoom / view.scale[1]), origin)


def _new_panel(packed: PackedImage) -> tuple[Image.Image, _Frame, _Frame]:
    """An empty panel, the frame of the slices and, below it, that of the thumbnail (the same if there is none)."""
    grid = packed.layout.tile_grid
    boxes = [packed.tile_box(tile) for tile in range(grid.rows * grid.cols)]
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    canvas = min(tops), min(lefts), max(bottoms), max(rights)
    frame = _fit(canvas, packed.views[0], PANEL)
    height = frame.box(canvas)[2]
    if not grid.has_thumbnail:
        return Image.new("RGB", (PANEL, height), PAPER), frame, frame
    below = _fit(packed.tile_box(len(boxes)), packed.views[-1], THUMBNAIL, (height + THUMBNAIL_GAP, 0))
    return Image.new("RGB", (PANEL, height + THUMBNAIL_GAP + THUMBNAIL), PAPER), frame, below


def _paste(panel: Image.Image, image: Image.Image, box: Box, place: tuple[int, int, int, int]) -> None:
    """Draws the part of the image within `box` so that `box` fills `place`; what lies beyond the image is left."""
    top, left, bottom, right = max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.height), min(box[3], image.width)
    if top >= bottom or left >= right:
        return
    scale = ((place[2] - place[0]) / (box[2] - box[0]), (place[3] - place[1]) / (box[3] - box[1]))
    frame = _Frame((box[0], box[1]), scale, (place[0], place[1]))
    y0, x0, y1, x1 = frame.box((top, left, bottom, right))
    enlarged = (y1 - y0) > (bottom - top)
    resample = Image.Resampling.NEAREST if enlarged and min(scale) > 4 else Image.Resampling.LANCZOS
    panel.paste(image.resize((x1 - x0, y1 - y0), resample, box=(left, top, right, bottom)), (x0, y0))


def _mean_colour(image: Image.Image, box: tuple[float, ...], ratio: tuple[float, float]) -> tuple[int, ...]:
    left, right = box[1] * ratio[1], min(box[3] * ratio[1], image.width)
    top, bottom = box[0] * ratio[0], min(box[2] * ratio[0], image.height)
    colour = image.resize((1, 1), Image.Resampling.BOX, box=(left, top, right, bottom)).getpixel((0, 0))
    return colour if isinstance(colour, tuple) else (int(colour or 0),) * 3


def _heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The image under a wash of the accent colour: faint at even attention (rows, cols), full at three times."""
    strength = (np.minimum(weights * weights.size / 3, 1) * 0.8 * 255).astype(np.uint8)
    mask = Image.fromarray(strength).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, ACCENT), image, mask)

"""Pictures of what the language model gets to see: the tiles, the packed tokens, and one token's attention.

Needs Pillow and NumPy on top of the core. Boxes are (top, left, bottom, right) in pixels of the original image unless
said otherwise; they may reach beyond the image, where tiles are padding.

Shapes: H heads, s scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokenpacker.projectors import config_from_dict
from tokenpacker.sequence import ImageLayout, TokenSource
from tokenpacker.tiling import TileView

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerProcessor

Box = tuple[float, float, float, float]

INK, FAINT_INK, PAPER, PADDING, RULE = "#1f2328", "#656d76", "#ffffff", "#eef0f3", "#d8dee4"
ACCENT = (217, 72, 15)  # tile borders, the chosen token and its attention
MARGIN = 36
PANEL = 460  # side of the square that each panel's picture is fitted into
THUMBNAIL = 96
PANEL_TOP = 180
HEAD, HEAD_GAP, HEADS_PER_ROW = 48, 10, 8


@dataclass(frozen=True)
class PackedImage:
    """An image and how it becomes tokens.

    Args:
        image: RGB, in its original size.
        layout: its token sequence.
        views: one per tile.
        tile_size: (height, width) of a tile in tile pixels.
        patch_grid: (rows, cols) of patches in a tile.
        scale_factor: patches per side behind one token.
    """

    image: Image.Image
    layout: ImageLayout
    views: list[TileView]
    tile_size: tuple[int, int]
    patch_grid: tuple[int, int]
    scale_factor: int

    @classmethod
    def plan(
        cls,
        processor: TokenPackerProcessor,
        image: Image.Image,
        *,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
    ) -> PackedImage:
        """What a processor makes of an RGB image. Raises ValueError as `TokenPackerProcessor.image_layout`."""
        size = (image.height, image.width)
        layout = processor.image_layout(size, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
        tile_height, tile_width = processor.image_processor.tile_size
        rows, cols = processor.patch_grid
        own_factor: int = getattr(config_from_dict(processor.projector_config), "scale_factor", 0)
        own_factor = own_factor or -(-rows // layout.token_grid[0])  # of one that names none, what its tokens stand for
        return cls(
            image=image,
            layout=layout,
            views=processor.image_processor.tile_views(size, layout.tile_grid),
            tile_size=(tile_height, tile_width),
            patch_grid=(rows, cols),
            scale_factor=own_factor if scale_factor is None else scale_factor,
        )

    @property
    def window_size(self) -> tuple[float, float]:
        """(height, width) in tile pixels of the window behind one token."""
        height, width = (self.tile_size[i] / self.patch_grid[i] * self.scale_factor for i in (0, 1))
        return height, width

    @property
    def num_full_tokens(self) -> int:
        """What the same tiles would cost at one token per patch, separators included."""
        patches = self.patch_grid[0] * self.patch_grid[1]
        return self.layout.tile_grid.num_tiles * (patches + self.layout.separators)

    def source(self, token: int) -> TokenSource | None:
        """What a token shows; None for a separator. Raises IndexError as `ImageLayout.source`."""
        size = (self.image.height, self.image.width)
        return self.layout.source(token, self.views, self.window_size, self.tile_size, size)

    def window_patches(self, source: TokenSource) -> tuple[int, int]:
        """(rows, cols) of the patches behind a token; fewer than s where the tile ends."""
        rows, cols = (
            min(self.scale_factor, patches - place * self.scale_factor)
            for patches, place in zip(self.patch_grid, (source.row, source.col), strict=True)
        )
        return rows, cols

    def window_box(self, tile: int, row: int, col: int) -> Box:
        """The box of one token's window, cut off where the tile ends."""
        (height, width), (tile_height, tile_width) = self.window_size, self.tile_size
        bottom, right = min((row + 1) * height, tile_height), min((col + 1) * width, tile_width)
        return _to_image(self.views[tile], (row * height, col * width, bottom, right))

    def tile_box(self, tile: int) -> Box:
        """The box of a whole tile."""
        return _to_image(self.views[tile], (0.0, 0.0, float(self.tile_size[0]), float(self.tile_size[1])))


def draw_page(
    packed: PackedImage, title: str, token: int | None = None, weights: np.ndarray | None = None
) -> Image.Image:
    """The page of `tokenpacker show`: the image with its tiles, its tokens, and the attention of one token.

    Args:
        token: index in the image's token sequence; not a separator.
        weights: (H, rows, cols), that token's attention over the patches of its window, when the projector attends.
    """
    grid, side = packed.layout.tile_grid, packed.scale_factor
    (tile_height, tile_width), (token_rows, token_cols) = packed.tile_size, packed.layout.token_grid
    panels = [
        ("Tiles", f"what the encoder reads, {tile_height} x {tile_width} pixels each", draw_tiles(packed)),
        (
            "Packed tokens",
            f"{token_rows} x {token_cols} a tile, one for {side} x {side} patches; grey is padding",
            draw_tokens(packed, token),
        ),
    ]
    if weights is not None and token is not None:
        explanation = f"over its {weights.shape[1]} x {weights.shape[2]} patches: mean of the heads, then each head"
        panels.append((f"Attention of token {token}", explanation, draw_attention(packed, token, weights)))
    height = PANEL_TOP + max(picture.height for *_, picture in panels) + MARGIN
    page = Image.new("RGB", (len(panels) * (PANEL + MARGIN) + MARGIN, height), PAPER)
    draw = ImageDraw.Draw(page)
    tiles = f"{grid.rows} x {grid.cols} tiles + thumbnail" if grid.has_thumbnail else "1 tile"
    cost = f"{packed.layout.num_tokens} tokens instead of {packed.num_full_tokens}"
    draw.text((MARGIN, MARGIN), title, INK, _font(26))
    draw.text(
        (MARGIN, MARGIN + 36),
        f"{packed.image.height} x {packed.image.width} pixels, {tiles}: {cost}",
        FAINT_INK,
        _font(18),
    )
    for index, (caption, explanation, picture) in enumerate(panels):
        left = MARGIN + index * (PANEL + MARGIN)
        draw.text((left, PANEL_TOP - 62), caption, INK, _font(20))
        draw.text((left, PANEL_TOP - 34), explanation, FAINT_INK, _font(15))
        page.paste(picture, (left, PANEL_TOP))
    return page


def draw_tiles(packed: PackedImage) -> Image.Image:
    """The image with the borders and numbers of its tiles; the thumbnail below."""
    panel, frame = _new_panel(packed)
    draw = ImageDraw.Draw(panel)
    many = packed.layout.tile_grid.has_thumbnail
    num_slices = len(packed.views) - many
    for tile, _ in enumerate(packed.views):
        top, left, bottom, right = (frame if tile < num_slices else _thumbnail_frame(packed)).box(packed.tile_box(tile))
        draw.rectangle((left, top, right - 1, bottom - 1), fill=PADDING)
        _paste(panel, packed.image, packed.tile_box(tile), (top, left, bottom, right))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=ACCENT, width=2)
        if many and tile < num_slices and min(bottom - top, right - left) > 24:
            draw.rectangle((left, top, left + 22, top + 20), fill=ACCENT)
            draw.text((left + 11, top + 10), str(tile + 1), PAPER, _font(14), anchor="mm")
        elif tile >= num_slices:
            draw.text((right + 12, top), "thumbnail", FAINT_INK, _font(15))
    return panel


def draw_tokens(packed: PackedImage, chosen: int | None = None) -> Image.Image:
    """Each token as a square in the mean colour of its pixels, in place; the chosen one framed."""
    panel, frame = _new_panel(packed)
    draw = ImageDraw.Draw(panel)
    small = _thumbnail_frame(packed) if packed.layout.tile_grid.has_thumbnail else frame
    shown = packed.image.copy()
    shown.thumbnail((1024, 1024))  # enough for mean colours, and quick for large photographs
    ratio = (shown.height / packed.image.height, shown.width / packed.image.width)
    chosen_frame = None
    for token in range(packed.layout.num_tokens):
        source = packed.source(token)
        if source is None:
            continue
        place = small if source.is_thumbnail else frame
        top, left, bottom, right = place.box(packed.window_box(source.tile, source.row, source.col))
        gap = 1 if right - left > 5 and bottom - top > 5 else 0
        cell = (left, top, max(left, right - 1 - gap), max(top, bottom - 1 - gap))
        colour = PADDING if source.box is None else _mean_colour(shown, source.box, ratio)
        draw.rectangle(cell, fill=colour, outline=RULE if gap else None)
        if token == chosen:
            chosen_frame = (cell[0] - 3, cell[1] - 3, cell[2] + 3, cell[3] + 3)
    if chosen_frame:
        draw.rectangle(chosen_frame, outline=ACCENT, width=3)
    if packed.layout.tile_grid.has_thumbnail:
        top, _, _, right = small.box(packed.tile_box(len(packed.views) - 1))
        draw.text((right + 12, top), f"thumbnail: {packed.layout.tile_tokens[-1]} tokens more", FAINT_INK, _font(15))
    return panel


def draw_attention(packed: PackedImage, token: int, weights: np.ndarray) -> Image.Image:
    """A token's window with its surroundings, and the attention (H, rows, cols) of its patches: all heads, then each.

    Raises:
        ValueError: for a separator, and for weights of another number of patches than the window has.
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
        size = tuple(max(1, HEAD * patches // packed.scale_factor) for patches in weights.shape[:0:-1])
        picture = _heat(Image.new("RGB", size, PADDING), weights[head])
        panel.paste(picture, (col * step, PANEL + 12 + row * step))
    return panel


def _window_with_surroundings(packed: PackedImage, source: TokenSource, weights: np.ndarray) -> Image.Image:
    """The window in the middle, its patches labelled by weight (rows, cols), and pale picture around it.

    Half a window is around a whole one; more where the tile ends within it.
    """
    (height, width), view = packed.window_size, packed.views[source.tile]
    top, left = source.row * height, source.col * width
    around = _to_image(view, (top - height / 2, left - width / 2, top + height * 1.5, left + width * 1.5))
    picture = Image.new("RGB", (PANEL, PANEL), PADDING)
    _paste(picture, packed.image, around, (0, 0, PANEL, PANEL))
    start, cell = PANEL // 4, PANEL / 2 / packed.scale_factor
    rows, cols = weights.shape
    window = picture.crop((start, start, start + round(cols * cell), start + round(rows * cell)))
    picture = Image.blend(picture, Image.new("RGB", picture.size, PAPER), 0.55)
    picture.paste(_heat(window, weights), (start, start))
    draw = ImageDraw.Draw(picture)
    font = _font(int(max(10, min(22, cell / 3))))
    for (row, col), weight in np.ndenumerate(weights):
        y, x = start + row * cell, start + col * cell
        draw.rectangle((x, y, x + cell, y + cell), outline=ACCENT, width=2)
        draw.text((x + cell / 2, y + cell / 2), f"{weight:.0%}", INK, font, "mm", stroke_width=2, stroke_fill=PAPER)
    return picture


@dataclass(frozen=True)
class _Frame:
    """Where a region of the image (top, left corner; pixels per image pixel) stands on a panel."""

    corner: tuple[float, float]
    scale: tuple[float, float]
    origin: tuple[int, int] = (0, 0)

    def box(self, box: Box) -> tuple[int, int, int, int]:
        """An image box in panel pixels, at least one pixel on each side."""
        top, bottom = (round((y - self.corner[0]) * self.scale[0]) + self.origin[0] for y in box[::2])
        left, right = (round((x - self.corner[1]) * self.scale[1]) + self.origin[1] for x in box[1::2])
        return top, left, max(bottom, top + 1), max(right, left + 1)


def _fit(region: Box, view: TileView, size: int, origin: tuple[int, int] = (0, 0)) -> _Frame:
    """The frame that fits a region into a square, with the proportions that the encoder sees."""
    zoom = size / max((region[2] - region[0]) / view.scale[0], (region[3] - region[1]) / view.scale[1])
    return _Frame((region[0], region[1]), (zoom / view.scale[0], zoom / view.scale[1]), origin)


def _canvas(packed: PackedImage) -> Box:
    """The smallest box around all tiles but the thumbnail."""
    grid = packed.layout.tile_grid
    boxes = [packed.tile_box(tile) for tile in range(grid.rows * grid.cols)]
    return (min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes))


def _new_panel(packed: PackedImage) -> tuple[Image.Image, _Frame]:
    """An empty panel with room for the canvas and, where there is one, the thumbnail below."""
    region = _canvas(packed)
    frame = _fit(region, packed.views[0], PANEL)
    height = frame.box(region)[2]
    height += 16 + THUMBNAIL if packed.layout.tile_grid.has_thumbnail else 0
    return Image.new("RGB", (PANEL, height), PAPER), frame


def _thumbnail_frame(packed: PackedImage) -> _Frame:
    region = _canvas(packed)
    below = _fit(region, packed.views[0], PANEL).box(region)[2] + 16
    return _fit(packed.tile_box(len(packed.views) - 1), packed.views[-1], THUMBNAIL, (below, 0))


def _to_image(view: TileView, box: Box) -> Box:
    """A tile box in image pixels, not clipped."""
    top, bottom = (y * view.scale[0] + view.offset[0] for y in box[::2])
    left, right = (x * view.scale[1] + view.offset[1] for x in box[1::2])
    return top, left, bottom, right


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


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)

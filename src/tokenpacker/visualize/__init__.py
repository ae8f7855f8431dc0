"""Pictures of what the language model reads: tiles, packed tokens, one token's attention, and marked regions.

`packed_image` says where tiles and tokens lie in an image, `packing_page` draws that, and `conversation_page` draws
images with regions and what is said about them. Needs Pillow and NumPy.
"""

from tokenpacker.visualize.conversation_page import draw_conversation, draw_regions
from tokenpacker.visualize.packed_image import Box, PackedImage
from tokenpacker.visualize.packing_page import draw_attention, draw_page, draw_tiles, draw_tokens
from tokenpacker.visualize.page_style import (
    ACCENT,
    FAINT_INK,
    INK,
    LARGE,
    MARGIN,
    MEDIUM,
    PADDING,
    PANEL,
    PAPER,
    RULE,
    SMALL,
    shorten,
)

__all__ = [
    "ACCENT",
    "FAINT_INK",
    "INK",
    "LARGE",
    "MARGIN",
    "MEDIUM",
    "PADDING",
    "PANEL",
    "PAPER",
    "RULE",
    "SMALL",
    "Box",
    "PackedImage",
    "draw_attention",
    "draw_conversation",
    "draw_page",
    "draw_regions",
    "draw_tiles",
    "draw_tokens",
    "shorten",
]

"""Colours and sizes that all pages share; sizes in pixels."""

INK, FAINT_INK, PAPER, PADDING, RULE = "#1f2328", "#656d76", "#ffffff", "#eef0f3", "#d8dee4"
ACCENT = (217, 72, 15)  # tile borders, the chosen token and its attention, bars
MARGIN = 36
PANEL = 460  # side of the square that the picture of a panel is fitted into

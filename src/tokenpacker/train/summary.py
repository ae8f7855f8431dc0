"""What a finished run leaves beside its model: a card, and a picture of the loss."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from tokenpacker.train.config import TrainingConfig

if TYPE_CHECKING:
    from tokenpacker.data.sources import Source

LIBRARIES = ("torch", "transformers", "accelerate", "tokenpacker")
CURVE = "loss.png"
WIDTH, HEIGHT, MARGIN = 720, 280, 44
INK, PALE, LINE = "#1f2933", "#d6dbe1", "#2563eb"


def write_report(
    folder: Path,
    config: TrainingConfig,
    source: Source,
    history: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Writes `README.md` and the curve into the model's folder; `seconds` of training, over all its starts."""
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in history]
    draw_curve(losses).save(folder / CURVE)
    used = {name: version(name) for name in LIBRARIES}
    steps = source.num_steps
    rate = steps / seconds if seconds else 0
    held, speed = "", f"{rate:.2f} steps"
    if source.samples_per_step is not None:
        held = f", of {source.samples_per_step:.1f} samples each on average"
        speed += f", {rate * source.samples_per_step:.2f} samples,"
    rows = [
        ("recipe", config.name),
        *source.facts.items(),
        ("steps", f"{steps:,}{held}"),
        ("time", f"{seconds:.0f} seconds, {speed} a second"),
        ("loss, first to last", " to ".join(f"{loss:.4f}" for _, loss in losses[:1] + losses[1:][-1:]) or "not logged"),
        ("versions", ", ".join(f"{name} {number}" for name, number in used.items())),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    text = f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {config.name}

| what | value |
|---|---|
{table}

![loss]({CURVE})

The whole config:

```json
{json.dumps(config.to_dict(), indent=2)}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be any bytes


def draw_curve(losses: list[tuple[int, float]]) -> Image.Image:
    """The loss over the steps, axes from 0."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    right, bottom = WIDTH - MARGIN // 2, HEIGHT - MARGIN
    draw.line([(MARGIN, MARGIN // 2), (MARGIN, bottom), (right, bottom)], fill=PALE, width=2)
    if not losses:
        return picture
    last, top = max(step for step, _ in losses), max(max(loss for _, loss in losses), 1e-9)
    points = [
        (MARGIN + (right - MARGIN) * step / max(1, last), bottom - (bottom - MARGIN // 2) * loss / top)
        for step, loss in losses
    ]
    if len(points) > 1:
        draw.line(points, fill=LINE, width=2)
    else:
        x, y = points[0]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINE)
    draw.text((4, MARGIN // 2), f"{top:.2f}", fill=INK)
    draw.text((4, bottom - 8), "0", fill=INK)
    draw.text((right - 60, bottom + 8), f"step {last}", fill=INK)
    draw.text((MARGIN, bottom + 8), "loss", fill=INK)
    return picture

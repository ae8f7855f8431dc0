"""What a finished run leaves: the model, its projector alone, the history, and a model card with the loss curve."""

from __future__ import annotations

import itertools
import json
import math
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.ImageFont import load_default
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME

from tokenpacker.data.sources import Source
from tokenpacker.hf.processing.processor import TokenPackerProcessor
from tokenpacker.train.assemble import merged_model, save_projector, whole_weights
from tokenpacker.train.config import TrainingConfig
from tokenpacker.train.run_folder import CheckpointError, RunFolder
from tokenpacker.train.trainer import PartTrainer
from tokenpacker.visualize import INK, MARGIN, RULE, SMALL

LIBRARIES = ("torch", "transformers", "accelerate", "tokenpacker")
CURVE = "loss.png"
WIDTH, HEIGHT, LINE = 720, 320, "#2563eb"


def finish(trainer: PartTrainer, folder: RunFolder, processor: TokenPackerProcessor, source: Source) -> Path:
    """Writes what a run leaves and returns the folder of the model. All processes call it.

    Raises:
        CheckpointError: if the model cannot be written, such as on a full disk.
    """
    part = folder.path / f"{folder.model.name}.part"
    if trainer.args.should_save and part.exists():
        shutil.rmtree(part)
    trainer.accelerator.wait_for_everyone()
    try:
        _write(trainer, folder, processor, source, part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)  # makes room on a full disk
        raise CheckpointError(
            f"model {folder.model} could not be written ({' '.join(str(error).split())}); the last checkpoint is"
            " whole: make room and call the run again"
        ) from error
    trainer.accelerator.wait_for_everyone()
    return folder.model


def _write(
    trainer: PartTrainer, folder: RunFolder, processor: TokenPackerProcessor, source: Source, part: Path
) -> None:
    """Writes the model into `part`, and moves that into its place when it is whole."""
    config = folder.config
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_sharded else None  # all take part
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # else nothing is written
    model = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is None:
        trainer.save_model(str(part))
    if not trainer.args.should_save:
        return
    if config.lora is not None:
        model.save_pretrained(folder.path / "adapter", state_dict=weights)
        found = dict(model.named_parameters()) if weights is None else weights
        learned = {name: found[name] for name, weight in model.named_parameters() if weight.requires_grad}
        with whole_weights(trainer.args):
            model, weights = merged_model(config, learned), None
        model.save_pretrained(part)
    (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; the config says the same
    processor.save_pretrained(part)
    save_projector(model, folder.path / "projector.safetensors", weights)
    steps = trainer.write_history(folder.history)
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in steps]
    draw_curve(losses).save(part / CURVE)
    card = _card(config, source, losses, trainer)
    (part / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # a path may be any bytes
    if folder.model.exists():
        shutil.rmtree(folder.model)
    part.replace(folder.model)


def _card(config: TrainingConfig, source: Source, losses: list[tuple[int, float]], trainer: PartTrainer) -> str:
    """The model card."""
    steps, seconds = trainer.state.global_step, trainer.stopwatch.seconds
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
        *trainer.card_rows(),
        ("versions", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
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


def draw_curve(losses: list[tuple[int, float]]) -> Image.Image:
    """A picture of the loss over the steps; both axes start at 0. A loss that is not a number leaves a gap."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), load_default(SMALL)
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    last, top = max((step for step, _ in losses), default=0), max([loss for _, loss in finite] + [1e-9])
    labels = ["0", f"{top:,.0f}" if 1000 <= top < 1e6 else f"{top:.3g}"] if finite else ["0"]
    left = MARGIN + round(max(map(font.getlength, labels)))
    right, bottom = WIDTH - MARGIN, HEIGHT - 2 * MARGIN
    draw.line([(left, MARGIN), (left, bottom), (right, bottom)], fill=RULE, width=2)
    for label, height in zip(labels, (bottom, MARGIN), strict=False):
        draw.text((left - 8, height), label, INK, font, "rm")
    draw.text((left, bottom + 10), "loss", INK, font, "lt")
    draw.text((right, bottom + 10), f"step {last:,}", INK, font, "rt")
    for is_finite, part in itertools.groupby(losses, key=lambda entry: math.isfinite(entry[1])):
        if not is_finite:
            continue
        across, down = (right - left) / max(1, last), (bottom - MARGIN) / top
        points = [(left + across * step, bottom - down * loss) for step, loss in part]
        if len(points) > 1:
            draw.line(points, fill=LINE, width=3)
        else:
            x, y = points[0]
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=LINE)
    return picture

"""How long one question takes, split into vision with projector and language model.

All settings are measured in one run, in turn on each image, so that whatever else the machine does hits them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.evaluation import Asker
from tokenpacker.progress import Progress
from tokenpacker.scenes import Sample

NUM_WARM_UP = 3  # the first calls pay for allocations that later ones do not


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model at a scale factor (None: its own), under the label that reports show."""

    label: str
    model: PreTrainedModel
    processor: ProcessorMixin
    scale_factor: int | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over images, one question each, batch 1.

    Args:
        image_tokens: mean number of image tokens of an image.
        vision_ms: tiles to packed tokens: vision tower and projector.
        language_ms: packed tokens to the end of the answer: prefill and decoding.
    """

    label: str
    num_questions: int
    image_tokens: float
    vision_ms: float
    language_ms: float

    @property
    def total_ms(self) -> float:
        """Tiles to the end of the answer."""
        return self.vision_ms + self.language_ms


def measure_speed(settings: Sequence[Setting], samples: Sequence[Sample], *, max_new_tokens: int = 8) -> list[Speed]:
    """One `Speed` per setting, from the first question of each sample; the first few samples only warm up.

    Raises:
        ValueError: when there are too few samples to leave any after warming up.
    """
    if len(samples) <= NUM_WARM_UP:
        raise ValueError(f"{len(samples)} samples are too few: {NUM_WARM_UP} warm up; pass more")
    askers = [Asker(each.model, each.processor, scale_factor=each.scale_factor) for each in settings]
    measured: list[list[tuple[int, float, float]]] = [[] for _ in settings]
    with Progress("times", len(samples)) as shown:
        for done, sample in enumerate(samples, start=1):
            for asker, rows in zip(askers, measured, strict=True):
                rows.append(_time_question(asker, sample, max_new_tokens))
            shown.update(done)
    speeds = []
    for setting, rows in zip(settings, measured, strict=True):
        tokens, vision, language = zip(*rows[NUM_WARM_UP:], strict=True)
        speeds.append(
            Speed(
                label=setting.label,
                num_questions=len(vision),
                image_tokens=statistics.mean(tokens),
                vision_ms=1000 * statistics.median(vision),
                language_ms=1000 * statistics.median(language),
            )
        )
    return speeds


@torch.inference_mode()
def _time_question(asker: Asker, sample: Sample, max_new_tokens: int) -> tuple[int, float, float]:
    """Image tokens, seconds of vision with projector, and seconds of the language model, for the first question."""
    prepared, model = asker.prepare(sample), asker.model
    pixel_values = prepared.pixel_values.to(model.device)
    input_ids = torch.tensor([prepared.prefix + prepared.tails[0]], device=model.device)
    vision_seconds, features = _timed(
        lambda: model.get_image_features(pixel_values, scale_factor=asker.scale_factor), model.device
    )
    language_seconds, _ = _timed(
        lambda: model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_encoder_outputs={"image": features},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=asker.pad_token_id,
        ),
        model.device,
    )
    return prepared.layout.num_tokens, vision_seconds, language_seconds


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has finished, and the call's result."""
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result

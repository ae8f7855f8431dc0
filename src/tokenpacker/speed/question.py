"""Split times of one question: vision with projector, and the language model.

All settings take turns on each image, so that other load on the machine affects them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.asker import Asker
from tokenpacker.evaluate.evaluation import group_of
from tokenpacker.progress import Progress
from tokenpacker.scenes import Sample
from tokenpacker.speed.stopwatch import Stopwatch, spread

NUM_WARM_UP = 3  # images; the first calls pay for allocations that later ones do not


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
    watches = [Stopwatch(each.model.device) for each in settings]
    with Progress("times", len(samples)) as shown:
        for done, sample in enumerate(samples, start=1):
            for asker, watch in zip(askers, watches, strict=True):
                _time_question(watch, asker, sample, max_new_tokens)
            shown.update(done)
    timed = samples[NUM_WARM_UP:]
    return [
        Speed(
            label=setting.label,
            num_questions=len(timed),
            image_tokens=statistics.mean(asker.layout(s.image).num_tokens for s in timed),
            vision_ms=spread(watch.wall["vision"][NUM_WARM_UP:])["median"],
            language_ms=spread(watch.wall["language"][NUM_WARM_UP:])["median"],
        )
        for setting, asker, watch in zip(settings, askers, watches, strict=True)
    ]


@torch.inference_mode()
def _time_question(watch: Stopwatch, asker: Asker, sample: Sample, max_new_tokens: int) -> None:
    prepared = asker.prepare([group_of(sample)])
    input_ids = torch.cat([prepared.prefix, torch.tensor(prepared.tails[:1], device=asker.model.device)], dim=1)
    images = watch.time("vision", lambda: asker.model.get_image_features(**prepared.images))
    generate = {"max_new_tokens": max_new_tokens, "mm_encoder_outputs": {"image": images}}
    mask = torch.ones_like(input_ids)
    watch.time("language", lambda: asker.generate(input_ids=input_ids, attention_mask=mask, **generate))

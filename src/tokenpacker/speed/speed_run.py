"""Measures an image and its answer, split into vision, projector, prefill and decoding, with the memory.

All projectors share one vision tower and one language model and take turns in every round. Images and text are noise,
as no time here depends on their content.

Shapes: B images in a batch, N tiles of all of them, T packed tokens per tile, D language width, S tokens of a prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tokenpacker import projectors
from tokenpacker.hf.outputs import CACHE, ImageFeatures
from tokenpacker.progress import Progress
from tokenpacker.projectors import Projector
from tokenpacker.sequence import ImageLayout
from tokenpacker.speed.machine import attention_kernels, describe_machine
from tokenpacker.speed.memory import PeakMemory, needed_memory
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_report import SpeedReport
from tokenpacker.speed.speed_rows import Counted, Protocol, SpeedRow
from tokenpacker.speed.stopwatch import Spread, Stopwatch, synchronize, take_turns


def measure(
    model: PreTrainedModel,
    shapes: Shapes,
    asked: Sequence[Candidate],
    protocol: Protocol,
    *,
    dtype: str,
    random_weights: bool = False,
) -> SpeedReport:
    """The report on a model of these shapes. Raises ValueError as `measure_rows`."""
    configs = {part: getattr(model.model, part).config for part in ("vision_tower", "language_model")}
    return SpeedReport(
        rows=tuple(measure_rows(model, shapes, asked, protocol)),
        name=shapes.name,
        random_weights=random_weights,
        dtype=dtype,
        protocol=protocol,
        image_size=protocol.image_size or shapes.config.tile_size,
        attention={part: config._attn_implementation for part, config in configs.items()}
        | {"kernels": attention_kernels(model)},
        machine=describe_machine(model.device),
        peak_kind=PeakMemory(model.device).kind,
        needed_bytes=needed_memory(shapes, asked, protocol, dtype).total,
    )


@torch.inference_mode()
def measure_rows(
    model: PreTrainedModel, shapes: Shapes, asked: Sequence[Candidate], protocol: Protocol
) -> list[SpeedRow]:
    """One row per batch size and projector, in the order in which they were given.

    Raises ValueError for image sizes and scale factors that do not fit.
    """
    layouts = {one: shapes.layout(one, protocol.image_size) for one in asked}
    modules = {one: make_projector(model, one) for one in asked}
    folded = {one: fold() for one in asked if (fold := getattr(modules[one], "fold", None))}
    rounds = protocol.warm_up + protocol.rounds
    rows, done = [], 0
    with Progress("speed", len(protocol.batch_sizes) * len(asked) * rounds) as shown:
        for batch_size in protocol.batch_sizes:
            runners = [
                Runner(model, modules[one], folded.get(one), one, layouts[one], protocol, batch_size) for one in asked
            ]
            for runner in take_turns(runners, rounds):
                runner.run()
                done += 1
                shown.update(done, f"{runner.candidate.name}, batch {batch_size}")
            rows += [runner.row(shapes) for runner in runners]
    return rows


def make_projector(model: PreTrainedModel, candidate: Candidate) -> Projector:
    """The model's own projector, or a fresh one on the same device and of the same type."""
    own = model.model.multi_modal_projector
    if candidate.trained:
        return own
    like = next(own.parameters())
    return projectors.build(candidate.config).to(like.device, like.dtype).eval()


class Runner:
    """One projector on one batch of noise; the first run counts, later ones warm up, then all are timed."""

    def __init__(
        self,
        model: PreTrainedModel,
        projector: Projector,
        folded: nn.Module | None,
        candidate: Candidate,
        layout: ImageLayout,
        protocol: Protocol,
        batch_size: int,
    ):
        self.model, self.projector, self.folded, self.candidate = model, projector, folded, candidate
        self.layout, self.protocol, self.batch_size = layout, protocol, batch_size
        self.device = model.device
        self.watch = Stopwatch(self.device)
        self.num_runs = 0
        # Two ids that are no image token: one stands for all text, one for all separators.
        self.text_id, self.separator_id, *_ = (id_ for id_ in range(3) if id_ != model.config.image_token_id)

    def run(self) -> None:
        """One run; the batch is there only for its time, as other runners make theirs."""
        self._make_batch()
        if self.num_runs == 0:
            self.counted = self._count()
        else:
            self._time_parts()
        self.num_runs += 1
        if self.num_runs == self.protocol.warm_up:
            self.watch = Stopwatch(self.device)
        del self.input_ids, self.pixel_values

    def row(self, shapes: Shapes) -> SpeedRow:
        """The result of all runs."""
        counted, batch = self.counted, self.batch_size
        lengths = (counted.tiles // batch, counted.prompt_tokens, counted.output_tokens)
        folded = self.watch.wall.get("folded")
        return SpeedRow(
            candidate=self.candidate,
            batch_size=batch,
            counted=counted,
            times=spreads(self.watch.wall, counted.output_tokens),
            folded=None if folded is None else Spread.of(folded),
            flops=shapes.table.of(self.candidate, *lengths).times(batch),
        )

    def _make_batch(self) -> None:
        image = self.layout.token_ids(self.model.config.image_token_id, self.separator_id, self.separator_id)
        before = self.protocol.text_tokens // 2
        prompt = [self.text_id] * before + image + [self.text_id] * (self.protocol.text_tokens - before)
        self.input_ids = torch.tensor([prompt] * self.batch_size, device=self.device)  # (B, S)
        num_tiles = self.batch_size * self.layout.tile_grid.num_tiles
        dtype = self.model.model.vision_tower.dtype
        tiles = (num_tiles, 3, *self.model.config.tile_size)
        self.pixel_values = torch.randn(tiles, device=self.device, dtype=dtype)

    def _vision(self) -> Any:
        return self.model.model.vision_features(self.pixel_values)

    def _project(self, projector: nn.Module, features: Any) -> Tensor:
        """(N, T, D)."""
        features = features.to(next(self.projector.parameters()).device)
        return projector(features, self.candidate.scale_factor)

    def _generate(self, packed: Tensor, num_tokens: int, *criteria: StoppingCriteria) -> Any:
        """An answer of exactly `num_tokens` tokens."""
        return self.model.generate(
            input_ids=self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            mm_encoder_outputs={"image": ImageFeatures(pooler_output=packed)},
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.text_id,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList(criteria),
        )

    def _count(self) -> Counted:
        """Runs all parts, counts their tensors and measures the peak memory."""
        peak = PeakMemory(self.device)
        can_tell = peak.start()
        packed = self._project(self.projector, self._vision())
        long = self._generate(packed, self.protocol.output_tokens)
        synchronize(self.device)
        peak_bytes = peak.stop() if can_tell else None
        short = self._generate(packed, 1)
        return Counted(
            tiles=packed.shape[0],
            tokens_per_tile=packed.shape[1],
            image_tokens=int((self.input_ids[0] != self.text_id).sum()),
            prompt_tokens=self.input_ids.shape[1],
            output_tokens=long.sequences.shape[1] - self.input_ids.shape[1],
            cache_bytes=_cache_bytes(short[CACHE]),
            full_cache_bytes=_cache_bytes(long[CACHE]),
            peak_bytes=peak_bytes,
        )

    def _time_parts(self) -> None:
        timed, output_tokens = self.watch.time, self.protocol.output_tokens
        features = timed("vision", self._vision)
        packed = timed("projector", lambda: self._project(self.projector, features))
        if (folded := self.folded) is not None:
            timed("folded", lambda: self._project(folded, features))
        timed("prefill", lambda: self._generate(packed, 1))
        if output_tokens > 1:
            first = _FirstToken(self.device)
            timed("answer", lambda: self._generate(packed, output_tokens, first))
            self.watch.wall["decode"].append(time.perf_counter() - first.seen_at)


def spreads(seconds: dict[str, list[float]], output_tokens: int) -> dict[str, Spread | None]:
    """Summarizes the seconds of each round as the times of a `SpeedRow`.

    Args:
        seconds: of vision, projector and prefill; for an answer of several tokens also of `answer`, the language
            model's whole time, and `decode`, its part after the first token.
    """
    rounds = {part: np.asarray(values) for part, values in seconds.items()}
    seen = rounds["vision"] + rounds["projector"]
    return {
        "vision": Spread.of(rounds["vision"]),
        "projector": Spread.of(rounds["projector"]),
        "prefill": Spread.of(rounds["prefill"]),
        "first_token": Spread.of(seen + rounds["prefill"]),
        "per_output_token": Spread.of(rounds["decode"] / (output_tokens - 1)) if output_tokens > 1 else None,
        "total": Spread.of(seen + rounds["answer" if output_tokens > 1 else "prefill"]),
    }


class _FirstToken(StoppingCriteria):
    """Notes the time of an answer's first token; stops nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seen_at = math.nan  # on the clock of `time.perf_counter`

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if math.isnan(self.seen_at):
            synchronize(self.device)
            self.seen_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # (B,)


def _cache_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

"""How long an image and its answer take, split into vision, projector, prefill and decoding, and how much memory.

All projectors share one vision tower and one language model, and take turns in every round, so that whatever else the
machine does hits them alike. What they are given is noise: no time here depends on what an image shows or a token says.

Shapes: B images in a batch, N tiles of all of them, T packed tokens per tile, S tokens of a prompt.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tokenpacker import projectors
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE
from tokenpacker.projectors import Projector
from tokenpacker.sequence import ImageLayout
from tokenpacker.speed.flops import Flops, FlopTable
from tokenpacker.speed.machine import PeakMemory, synchronize
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_rows import Counted, Protocol, SpeedRow, Times

OnProgress = Callable[[int, int, str], None]


class FirstToken(StoppingCriteria):
    """Notes when an answer's first token is there, and stops nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seen_at = math.nan  # on the clock of `time.perf_counter`

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,), nowhere True."""
        if math.isnan(self.seen_at):
            synchronize(self.device)
            self.seen_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Runner:
    """One projector's calls on one batch of noise."""

    def __init__(
        self, model: PreTrainedModel, projector: Projector, candidate: Candidate, layout: ImageLayout, batch_size: int
    ):
        self.model, self.projector, self.candidate = model, projector, candidate
        self.tile_size = model.config.tile_size
        self.layout, self.batch_size = layout, batch_size
        self.device = model.device
        self.times = Times()

    @property
    def other_ids(self) -> tuple[int, int]:
        """Two ids that are no image token: one stands for all text, one for all separators."""
        first, second, *_ = (index for index in range(3) if index != self.model.config.image_token_id)
        return first, second

    def prepare(self, text_tokens: int) -> None:
        """Makes the batch; only one needs to be there at a time."""
        text_id, separator_id = self.other_ids
        image = self.layout.token_ids(self.model.config.image_token_id, separator_id, separator_id)
        before = text_tokens // 2
        prompt = [text_id] * before + image + [text_id] * (text_tokens - before)
        self.input_ids = torch.tensor([prompt] * self.batch_size, device=self.device)  # (B, S)
        num_tiles = self.batch_size * self.layout.tile_grid.num_tiles
        dtype = self.model.model.vision_tower.dtype
        self.pixel_values = torch.randn(num_tiles, 3, *self.tile_size, device=self.device, dtype=dtype)

    def drop(self) -> None:
        """Frees the batch."""
        del self.input_ids, self.pixel_values

    def vision(self) -> Any:
        """Vision features of all tiles."""
        return self.model.model.vision_features(self.pixel_values)

    def project(self, features: Any) -> Tensor:
        """(N, T, D)."""
        features = features.to(next(self.projector.parameters()).device)
        return self.projector(features, self.candidate.scale_factor)

    def generate(self, packed: Tensor, num_tokens: int, *criteria: StoppingCriteria) -> Any:
        """An answer of exactly so many tokens: ending it earlier is forbidden, and later it does not get."""
        return self.model.generate(
            input_ids=self.input_ids,
            attention_mask=torch.ones_like(self.input_ids),
            mm_encoder_outputs={"image": ImageFeatures(pooler_output=packed)},
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.other_ids[0],
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList(criteria),
        )

    def count(self, output_tokens: int) -> Counted:
        """One run of everything, its tensors counted and its peak memory noted."""
        peak = PeakMemory(self.device)
        can_tell = peak.start()
        packed = self.project(self.vision())
        long = self.generate(packed, output_tokens)
        synchronize(self.device)
        peak_bytes = peak.stop() if can_tell else None
        short = self.generate(packed, 1)
        return Counted(
            tiles=packed.shape[0],
            tokens_per_tile=packed.shape[1],
            image_tokens=int((self.input_ids[0] != self.other_ids[0]).sum()),
            prompt_tokens=self.input_ids.shape[1],
            output_tokens=long.sequences.shape[1] - self.input_ids.shape[1],
            cache_bytes=cache_bytes(short[CACHE]),
            full_cache_bytes=cache_bytes(long[CACHE]),
            peak_bytes=peak_bytes,
        )

    def add_round(self, output_tokens: int) -> None:
        """Adds one round to the times."""
        seconds, features = self._timed(self.vision)
        self.times.vision.append(seconds)
        seconds, packed = self._timed(lambda: self.project(features))
        self.times.projector.append(seconds)
        seconds, _ = self._timed(lambda: self.generate(packed, 1))
        self.times.prefill.append(seconds)
        if output_tokens > 1:
            first = FirstToken(self.device)
            seconds, _ = self._timed(lambda: self.generate(packed, output_tokens, first))
            self.times.decode.append(time.perf_counter() - first.seen_at)
        self.times.answer.append(seconds)

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds until the device has finished, and the call's result."""
        synchronize(self.device)
        start = time.perf_counter()
        result = call()
        synchronize(self.device)
        return time.perf_counter() - start, result


def measure_rows(
    model: PreTrainedModel,
    shapes: Shapes,
    asked: Sequence[Candidate],
    protocol: Protocol,
    on_progress: OnProgress | None = None,
) -> list[SpeedRow]:
    """One row per batch size and projector, in the order in which they were given.

    Args:
        on_progress: told after each step how many are done, how many there are, and what was done.

    Raises:
        ValueError: for images and scale factors that cannot be.
    """
    modules = {one: make_projector(model, one) for one in asked}
    layouts = {one: shapes.layout(one, protocol.image_size) for one in asked}
    table = FlopTable(shapes.config)
    total = len(protocol.batch_sizes) * len(asked) * (protocol.warm_up + protocol.rounds)
    steps = itertools.count(1)

    def step_done(runner: Runner) -> None:
        if on_progress is not None:
            on_progress(next(steps), total, f"{runner.candidate.name}, batch {runner.batch_size}")

    rows = []
    for batch_size in protocol.batch_sizes:
        runners = [Runner(model, modules[one], one, layouts[one], batch_size) for one in asked]
        counts = _run_rounds(runners, protocol, step_done)
        rows += [_row(runner, counted, table) for runner, counted in zip(runners, counts, strict=True)]
    return rows


def make_projector(model: PreTrainedModel, candidate: Candidate) -> Projector:
    """The model's own projector, or a fresh one beside it on its device and of its type."""
    own = model.model.multi_modal_projector
    if candidate.trained:
        return own
    like = next(own.parameters())
    return projectors.build(candidate.config).to(like.device, like.dtype).eval()


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache of transformers."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@torch.inference_mode()
def _run_rounds(runners: Sequence[Runner], protocol: Protocol, step_done: Callable[[Runner], None]) -> list[Counted]:
    """Warms up, then times all runners in turn; what was counted in the first run of each."""
    counts: list[Counted] = []
    for round_number in range(protocol.warm_up + protocol.rounds):
        for runner in runners:
            runner.prepare(protocol.text_tokens)
            if round_number == 0:
                counts.append(runner.count(protocol.output_tokens))
            else:
                runner.add_round(protocol.output_tokens)
            if round_number < protocol.warm_up:
                runner.times = Times()
            runner.drop()
            step_done(runner)
    return counts


def _row(runner: Runner, counted: Counted, table: FlopTable) -> SpeedRow:
    batch = runner.batch_size
    flops = table.of(runner.candidate, counted.tiles // batch, counted.prompt_tokens)
    whole = Flops(
        vision=batch * flops.vision,
        projector=batch * flops.projector,
        language=batch * flops.language,
        head=batch * flops.head,
    )
    spreads: Any = runner.times.spreads(counted.output_tokens)
    decode = batch * table.language.decode(counted.prompt_tokens, counted.output_tokens)
    return SpeedRow(
        candidate=runner.candidate, batch_size=batch, counted=counted, flops=whole, decode_flops=decode, **spreads
    )

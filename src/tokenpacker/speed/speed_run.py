"""Measures an image and its answer, split into vision, projector, prefill and decoding, with the memory.

All projectors share one vision tower and one language model and take turns in every round. Images and text are noise,
as no time here depends on their content.

Shapes: B images in a batch, N tiles of all of them, T packed tokens per tile, D language width, S tokens of a prompt.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tokenpacker import projectors
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE
from tokenpacker.progress import Progress
from tokenpacker.projectors import Projector, TokenPacker
from tokenpacker.sequence import ImageLayout
from tokenpacker.speed.machine import attention_kernels, describe_machine
from tokenpacker.speed.memory import PeakMemory, random_model, require_memory
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_report import Protocol, Row, SpeedReport
from tokenpacker.speed.stopwatch import Stopwatch, spread, synchronize, take_turns


def measure(
    shapes: Shapes,
    asked: Sequence[Candidate],
    protocol: Protocol,
    device: torch.device,
    dtype: str | None = None,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
) -> SpeedReport:
    """Measures the projectors in a stored model, or in one of random weights.

    Args:
        device: whose memory is measured.
        dtype: of the weights, or `4bit` for a stored model; None takes the stored type, and for random weights float32
            on a CPU and bfloat16 elsewhere.
        load: returns the stored model; None makes random weights.

    Raises:
        ValueError: for image sizes and scale factors that do not fit, and for a device with too little memory, before
            anything is allocated.
    """
    if dtype is None:
        stored = getattr(shapes.config, "dtype", None) if load else None
        dtype = str(stored or (torch.float32 if device.type == "cpu" else torch.bfloat16)).removeprefix("torch.")
    needed = require_memory(shapes, asked, protocol, dtype, device)
    model = load() if load else random_model(shapes.config, getattr(torch, dtype), device)
    rows = measure_rows(model, shapes, asked, protocol)
    parts = {part: getattr(model.model, part).config for part in ("vision_tower", "language_model")}
    return SpeedReport(
        name=shapes.name,
        random_weights=load is None,
        dtype=dtype,
        protocol=protocol,
        image_size=protocol.image_size or shapes.config.tile_size,
        attention={part: config._attn_implementation for part, config in parts.items()}
        | {"kernels": attention_kernels(model)},
        machine=describe_machine(device),
        peak_kind=PeakMemory(device).kind,
        needed_bytes=needed.total,
        rows=rows,
    )


@torch.inference_mode()
def measure_rows(model: PreTrainedModel, shapes: Shapes, asked: Sequence[Candidate], protocol: Protocol) -> list[Row]:
    """One row per batch size and projector, in the order in which they were given; see `speed_report`.

    Raises ValueError for image sizes and scale factors that do not fit.
    """
    layouts = {one: shapes.layout(one, protocol.image_size) for one in asked}
    modules = {one: make_projector(model, one) for one in asked}
    rounds = protocol.warm_up + protocol.rounds
    rows, done = [], 0
    with Progress("speed", len(protocol.batch_sizes) * len(asked) * rounds) as shown:
        for batch_size in protocol.batch_sizes:
            runners = [Runner(model, modules[one], one, layouts[one], protocol, batch_size) for one in asked]
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


def _fold(projector: nn.Module) -> nn.Module | None:
    """The projector's form for inference; None if it has none, or cannot be folded as it is, such as in four bits."""
    with contextlib.suppress(ValueError):
        return projector.fold() if isinstance(projector, TokenPacker) else None
    return None


class Runner:
    """One projector on one batch of noise; the first run counts, later ones warm up, then all are timed."""

    def __init__(
        self,
        model: PreTrainedModel,
        projector: Projector,
        candidate: Candidate,
        layout: ImageLayout,
        protocol: Protocol,
        batch_size: int,
    ):
        self.model, self.projector, self.candidate = model, projector, candidate
        self.layout, self.protocol, self.batch_size = layout, protocol, batch_size
        self.device = model.device
        self.watch = Stopwatch(self.device)
        self.num_runs = 0
        # Two ids that are no image token: one stands for all text, one for all separators.
        self.text_id, self.separator_id, *_ = (id_ for id_ in range(3) if id_ != model.config.image_token_id)

    def run(self) -> None:
        """One run; its batch is freed at the end, before other runners make theirs."""
        image = self.layout.token_ids(self.model.config.image_token_id, self.separator_id, self.separator_id)
        before = self.protocol.text_tokens // 2
        prompt = [self.text_id] * before + image + [self.text_id] * (self.protocol.text_tokens - before)
        self.input_ids = torch.tensor([prompt] * self.batch_size, device=self.device)  # (B, S)
        tiles = (self.batch_size * self.layout.tile_grid.num_tiles, 3, *self.model.config.tile_size)
        self.pixel_values = torch.randn(tiles, device=self.device, dtype=self.model.model.vision_tower.dtype)
        if self.num_runs == 0:
            self.counted = self._count()
            self.folded = _fold(self.projector)  # after the memory was measured
        else:
            self._time_parts()
        self.num_runs += 1
        if self.num_runs == self.protocol.warm_up:
            self.watch = Stopwatch(self.device)
        del self.input_ids, self.pixel_values

    def row(self, shapes: Shapes) -> Row:
        """The result of all runs."""
        counted, folded = self.counted, self.watch.wall.get("folded")
        return {
            "projector": self.candidate.name,
            "scale_factor": self.candidate.packs,
            "trained": self.candidate.trained,
            "batch_size": self.batch_size,
            "counted": counted,
            "milliseconds": summarize(self.watch.wall, counted["output_tokens"]),
            "folded_projector_milliseconds": folded and spread(folded),
            "flops": shapes.table.of(
                self.candidate.config,
                self.candidate.scale_factor,
                num_tiles=self.layout.tile_grid.num_tiles,
                num_prompt=counted["prompt_tokens"],
                num_output=counted["output_tokens"],
                batch_size=self.batch_size,
            ),
        }

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

    def _count(self) -> dict[str, Any]:
        """Runs all parts, counts their tensors and measures the peak memory."""
        peak = PeakMemory(self.device)
        can_tell = peak.start()
        packed = self._project(self.projector, self._vision())
        long = self._generate(packed, self.protocol.output_tokens)
        synchronize(self.device)
        peak_bytes = peak.stop() if can_tell else None
        short = self._generate(packed, 1)
        return {
            "tiles": packed.shape[0],
            "tokens_per_tile": packed.shape[1],
            "image_tokens": int((self.input_ids[0] != self.text_id).sum()),
            "prompt_tokens": self.input_ids.shape[1],
            "output_tokens": long.sequences.shape[1] - self.input_ids.shape[1],
            "cache_bytes": _cache_bytes(short[CACHE]),
            "full_cache_bytes": _cache_bytes(long[CACHE]),
            "peak_bytes": peak_bytes,
        }

    def _time_parts(self) -> None:
        timed, num_output, folded = self.watch.time, self.protocol.output_tokens, self.folded
        features = timed("vision", self._vision)
        packed = timed("projector", lambda: self._project(self.projector, features))
        if folded is not None:
            timed("folded", lambda: self._project(folded, features))
        timed("prefill", lambda: self._generate(packed, 1))
        if num_output > 1:
            first = _FirstToken(self.device)
            timed("answer", lambda: self._generate(packed, num_output, first))
            self.watch.wall["decode"].append(time.perf_counter() - first.seen_at)


def summarize(seconds: dict[str, list[float]], num_output: int) -> dict[str, dict[str, float] | None]:
    """Summarizes the seconds of all rounds as the `milliseconds` of a row.

    Args:
        seconds: of vision, projector and prefill; for an answer of several tokens also of `answer`, the language
            model's whole time, and `decode`, its part after the first token.
    """
    rounds = {part: np.asarray(values) for part, values in seconds.items()}
    packed = rounds["vision"] + rounds["projector"]
    return {
        "vision": spread(rounds["vision"]),
        "projector": spread(rounds["projector"]),
        "prefill": spread(rounds["prefill"]),
        "first_token": spread(packed + rounds["prefill"]),
        "per_output_token": spread(rounds["decode"] / (num_output - 1)) if num_output > 1 else None,
        "total": spread(packed + rounds["answer" if num_output > 1 else "prefill"]),
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

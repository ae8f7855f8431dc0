"""One model measured: placed on a device, checked against its memory, timed, and reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from tokenpacker.speed.machine import PeakMemory, attention_kernels, describe_machine
from tokenpacker.speed.memory import random_model, require_memory
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_report import SpeedReport
from tokenpacker.speed.speed_rows import Protocol
from tokenpacker.speed.speed_run import OnProgress, measure_rows


def measure_model(
    sizes: Shapes,
    asked: Sequence[Candidate],
    protocol: Protocol,
    device: str,
    dtype: str | None = None,
    *,
    load: Callable[[], PreTrainedModel] | None = None,
    on_progress: OnProgress | None = None,
) -> SpeedReport:
    """Measures the projectors in a stored model, or in one of random weights.

    Args:
        device: as in `from_pretrained`; `auto` for a stored model only.
        dtype: of the weights, or `4bit` for a stored model; None takes the stored type, and for random weights float32
            on a CPU and bfloat16 elsewhere.
        load: gives the stored model; None makes random weights.

    Raises:
        ValueError: if the device has too little memory, before anything is allocated.
    """
    stored = load is not None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if dtype is None:
        own = getattr(sizes.config, "dtype", None) if stored else None
        dtype = str(own or (torch.float32 if device == "cpu" else torch.bfloat16)).removeprefix("torch.")
    needed = require_memory(sizes, asked, protocol, dtype, place)
    model = random_model(sizes.config, getattr(torch, dtype), place) if load is None else load()
    rows = measure_rows(model, sizes, asked, protocol, on_progress)
    attention = {
        "vision_tower": model.model.vision_tower.config._attn_implementation,
        "language_model": model.model.language_model.config._attn_implementation,
        "kernels": attention_kernels(model),
    }
    return SpeedReport(
        name=sizes.name,
        random_weights=not stored,
        dtype=dtype,
        protocol=protocol,
        image_size=protocol.image_size or sizes.config.tile_size,
        attention=attention,
        machine=describe_machine(place),
        peak_kind=PeakMemory(place).kind,
        needed_bytes=needed.total,
        rows=tuple(rows),
    )

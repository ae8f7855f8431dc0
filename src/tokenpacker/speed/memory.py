"""Memory of a measurement: the peak of a call, and an estimate before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # comes with accelerate
import torch
from torch import nn

from tokenpacker import projectors
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_report import Protocol

GIBI = 2**30
FOUR_BIT = "4bit"
FOUR_BIT_BYTES = 0.5 + 4 / 64  # per weight: half a byte, and a float32 for each block of 64
REMEDY = "plan it with --plan, or take --batch-sizes 1, --dtype bfloat16, a smaller image, or a larger --device"
PROCESS_STATUS, PROCESS_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # resets the peak of a process when written to `clear_refs`, see proc(5)


class PeakMemory:
    """The most memory in use since `start`; `kind` says which memory.

    psutil knows a process's peak on Windows alone. On Linux the kernel's own peak is read, which can be reset.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def kind(self) -> str:
        """What is measured."""
        if self.device.type == "cuda":
            return "allocated by torch on the device, weights included"
        return "resident memory of the whole process, libraries and weights included"

    def start(self) -> bool:
        """Forgets earlier peaks; False where the system cannot."""
        if self.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
            return True
        try:
            PROCESS_RESET.write_text(RESET_PEAK)
        except OSError:
            return False
        return True

    @property
    def current(self) -> int:
        """Bytes in use now."""
        if self.device.type == "cuda":
            return sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
        return psutil.Process().memory_info().rss

    def stop(self) -> int | None:
        """Bytes at the peak; None where neither CUDA nor Linux tells."""
        if self.device.type == "cuda":
            return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if not PROCESS_STATUS.is_file():
            return None
        lines = PROCESS_STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass(frozen=True)
class Needed:
    """Bytes that a measurement needs at its largest batch, estimated from sizes.

    Args:
        weights: the tower, the language model and all compared projectors.
        cache: keys and values, twice: each further token copies them to a larger place.
        working: the larger of what the language model and the vision tower hold at once, and the features.
    """

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.working


def needed_memory(shapes: Shapes, asked: Sequence[Candidate], protocol: Protocol, dtype: str) -> Needed:
    """Estimates for weights of this type. Attention is taken to be fused, without a square of scores."""
    config = shapes.config
    size = 2 if dtype == FOUR_BIT else getattr(torch, dtype).itemsize  # bytes of a number that is not in four bits
    text, vision = config.text_config, config.vision_config
    batch = max(protocol.batch_sizes)
    layouts = [shapes.layout(one, protocol.image_size) for one in asked]
    prompt = max(layout.num_tokens for layout in layouts) + protocol.text_tokens
    tiles = batch * max(layout.tile_grid.num_tiles for layout in layouts)
    patches = config.patch_grid[0] * config.patch_grid[1] + 1
    cache = batch * shapes.table.language.cache_bytes(prompt + protocol.output_tokens, size)
    language = batch * prompt * (8 * text.hidden_size + 4 * getattr(text, "intermediate_size", 0))  # of one layer
    features = tiles * patches * vision.hidden_size * (len(config.vision_levels) + 1)
    at_once = min(tiles, TokenPackerModel.vision_chunk_tiles or tiles)
    tower = at_once * patches * (6 * vision.hidden_size + 2 * getattr(vision, "intermediate_size", 0))
    return Needed(
        weights=_weights(config, asked, dtype, size),
        cache=2 * cache,
        working=size * (max(language, tower) + features),
    )


def require_memory(
    shapes: Shapes, asked: Sequence[Candidate], protocol: Protocol, dtype: str, device: torch.device
) -> Needed:
    """The estimate. Raises ValueError with a remedy when the device has less memory free."""
    needed, free = needed_memory(shapes, asked, protocol, dtype), free_memory(device)
    if needed.total > free:
        raise ValueError(
            f"model {shapes.name} in {dtype} at batch {max(protocol.batch_sizes)} needs about"
            f" {needed.total / GIBI:.1f} GiB ({needed.weights / GIBI:.1f} of weights) but {device} has"
            f" {free / GIBI:.1f} GiB free; {REMEDY}"
        )
    return needed


def random_model(
    config: TokenPackerConfig, dtype: torch.dtype, device: torch.device
) -> TokenPackerForConditionalGeneration:
    """A model of random weights, made on its device and in its final type, so that no second copy exists."""
    for part in (config.vision_config, config.text_config):
        part.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return TokenPackerForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def _weights(config: TokenPackerConfig, asked: Sequence[Candidate], dtype: str, size: int) -> int:
    """Bytes of all weights, counted on the meta device, which allocates nothing."""
    with torch.device("meta"):
        model = TokenPackerForConditionalGeneration(config)
        fresh = nn.ModuleList(projectors.build(one.config) for one in asked if not one.trained)
    whole = sum(weight.numel() for weight in (*model.parameters(), *fresh.parameters()))
    if dtype != FOUR_BIT:
        return size * whole
    layers = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    packed = sum(layer.weight.numel() for layer in layers)
    return size * (whole - packed) + round(FOUR_BIT_BYTES * packed)

"""What a measurement will need of a device's memory, told before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tokenpacker import projectors
from tokenpacker.hf.backbone import TokenPackerModel
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.model import TokenPackerForConditionalGeneration
from tokenpacker.speed.flops import LanguageSizes
from tokenpacker.speed.machine import free_memory
from tokenpacker.speed.model_sizes import Candidate, Shapes
from tokenpacker.speed.speed_rows import Protocol

GIBI = 2**30
FOUR_BIT = "4bit"
FOUR_BIT_BYTES = 0.5 + 4 / 64  # of a weight: half a byte, and a float32 for each block of 64
REMEDY = "plan it with --plan, or take --batch-sizes 1, --dtype bfloat16, a smaller image, or a larger --device"


@dataclass(frozen=True)
class Needed:
    """Bytes that a measurement needs at its largest batch, estimated from sizes.

    Args:
        weights: of tower, language model, and all projectors that are compared.
        cache: keys and values, twice: each token has them copied to a larger place, and allocators leave holes.
        working: what the language model or the vision tower has in hand at once, whichever is more, and features.
    """

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.working


def needed_memory(shapes: Shapes, asked: Sequence[Candidate], protocol: Protocol, dtype: str) -> Needed:
    """The estimate, for weights of this type; attention is taken to be fused, so that no square of scores exists."""
    config = shapes.config
    size = 2 if dtype == FOUR_BIT else getattr(torch, dtype).itemsize  # of what is not in four bits
    sizes, vision = LanguageSizes.of(config.text_config), config.vision_config
    batch = max(protocol.batch_sizes)
    layouts = [shapes.layout(one, protocol.image_size) for one in asked]
    prompt = max(layout.num_tokens for layout in layouts) + protocol.text_tokens
    tiles = batch * max(layout.tile_grid.num_tiles for layout in layouts)
    patches = config.patch_grid[0] * config.patch_grid[1] + 1
    cache = batch * sizes.cache_bytes(prompt + protocol.output_tokens, size)
    language = batch * prompt * (8 * sizes.width + 4 * sizes.mlp_width)  # what a layer has in hand
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
    """The estimate. Raises ValueError when the device has less memory free, with what to do."""
    needed, free = needed_memory(shapes, asked, protocol, dtype), free_memory(device)
    if free is not None and needed.total > free:
        raise ValueError(
            f"model {shapes.name} in {dtype} at batch {max(protocol.batch_sizes)} needs about"
            f" {needed.total / GIBI:.1f} GiB ({needed.weights / GIBI:.1f} of weights) but {device} has"
            f" {free / GIBI:.1f} GiB free; {REMEDY}"
        )
    return needed


def random_model(
    config: TokenPackerConfig, dtype: torch.dtype, device: torch.device
) -> TokenPackerForConditionalGeneration:
    """A model of random weights, made where it will run and in its final type, so that it is never there twice."""
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
    """Bytes of all weights; counted on the meta device, which has shapes and no memory."""
    with torch.device("meta"):
        model = TokenPackerForConditionalGeneration(config)
        fresh = nn.ModuleList(projectors.build(one.config) for one in asked if not one.trained)
    whole = sum(weight.numel() for weight in (*model.parameters(), *fresh.parameters()))
    if dtype != FOUR_BIT:
        return size * whole
    layers = [module for module in model.model.language_model.modules() if isinstance(module, nn.Linear)]
    packed = sum(layer.weight.numel() for layer in layers)
    return size * (whole - packed) + round(FOUR_BIT_BYTES * packed)

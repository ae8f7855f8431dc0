"""Tiles to vision features, through any transformers ViT: only the needed layers run, only the needed levels are kept.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, P leading tokens that are no patches (CLS, registers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from tokenpacker.features import VisionFeatures
from tokenpacker.hf.config import TokenPackerConfig


def build_vision_tower(config: TokenPackerConfig) -> PreTrainedModel:
    """A freshly initialised vision tower that ends at the last level that is used."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers = config.num_vision_layers
    if hasattr(vision_config, "vision_use_head"):
        vision_config.vision_use_head = False  # SigLIP's pooling head: nothing here reads it
    return AutoModel.from_config(vision_config)


def build_spare_layers(config: TokenPackerConfig) -> nn.ModuleList:
    """The freshly initialised layers above the last level that is used, frozen."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers -= config.num_vision_layers
    return encoder_layers(AutoModel.from_config(vision_config)).requires_grad_(False)


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The tower's transformer layers in order.

    Raises:
        ValueError: when it cannot be told which modules these are.
    """
    candidates = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not candidates:
        raise ValueError(f"{type(tower).__name__} has no list of layers; use a transformers vision transformer")
    return max(candidates, key=len)


def encode_tiles(
    tower: nn.Module,
    pixel_values: Tensor,
    patch_grid: tuple[int, int],
    levels: Sequence[int],
    query_level: int,
    max_tiles: int | None = None,
) -> VisionFeatures:
    """Vision features of tiles (N, 3, h, w); P leading tokens are dropped.

    Where neither the tower nor the pixels are differentiated, nothing of the tower is kept for a backward pass, and at
    most `max_tiles` pass through it at a time: its peak memory does not grow with N. None takes all at once.

    Raises:
        ValueError: when the tower gives fewer tokens than the patch grid has.
    """
    learns = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    if learns and torch.is_grad_enabled():
        return _encode(tower, pixel_values, patch_grid, levels, query_level)
    chunks = (pixel_values,)
    if max_tiles is not None and pixel_values.shape[0] > max_tiles:
        chunks = pixel_values.split(max_tiles)
    with torch.no_grad():
        parts = [_encode(tower, chunk, patch_grid, levels, query_level) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        query = torch.cat([part.query for part in parts])  # (N, L, C)
        return VisionFeatures(query, torch.cat([part.levels for part in parts]), patch_grid)


def _encode(
    tower: nn.Module, pixel_values: Tensor, patch_grid: tuple[int, int], levels: Sequence[int], query_level: int
) -> VisionFeatures:
    """One pass through the tower.

    Levels are caught as the layers give them, so the other hidden states are freed at once. They are what
    `output_hidden_states=True` would put at these indices.
    """
    layers = encoder_layers(tower)
    caught: dict[int, Tensor] = {}

    def catcher(level: int):
        def catch(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            caught[level] = output[0] if isinstance(output, tuple) else output  # (N, P + L, C)

        return catch

    wanted = sorted({*levels, query_level})
    hooks = [layers[level - 1].register_forward_hook(catcher(level)) for level in wanted]
    try:
        tower(pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
    hidden_states = [caught[level] for level in wanted]
    return VisionFeatures.from_hidden_states(
        hidden_states, patch_grid, [wanted.index(level) for level in levels], wanted.index(query_level)
    )

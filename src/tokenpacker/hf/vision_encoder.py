"""Tiles to vision features, through any transformers ViT: only the needed layers run.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, P leading tokens that are no patches (CLS, registers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import transformers
from packaging import version
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig

SELECTS_HIDDEN_STATES = version.parse(transformers.__version__) >= version.parse("5.24")
"""Whether `output_hidden_states` takes indices. Older versions count them otherwise, or keep all states anyway."""

TOWER_STATES = ("output_hidden_states", "output_attentions")
"""What of a vision tower can be asked for besides its features."""

PREFIX_TOKENS = ("class_embedding", "cls_token", "distillation_token")


def build_vision_tower(config: TokenPackerConfig) -> PreTrainedModel:
    """A freshly initialised vision tower that ends at the last level that is used."""
    return cut_tower(AutoModel.from_config(config.vision_config), config.num_vision_layers)


def cut_tower(tower: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The vision tower itself, without the layers above the last level that is used and without a pooling head.

    Raises:
        ValueError: when the tower has fewer layers than its config says, and than are needed.
    """
    layers = encoder_layers(tower)
    if len(layers) < num_layers:
        raise ValueError(
            f"{type(tower).__name__} has {len(layers)} layers but level {num_layers} is needed; another model may have"
            " taken it over, so load it anew"
        )
    del layers[num_layers:]
    for module in list(tower.modules()):
        if getattr(module, "use_head", False):  # SigLIP's
            module.use_head = False
            del module.head
    maybe_install_capturing_hooks(tower)  # otherwise at the first call, which could then not be compiled
    return tower


def build_spare_layers(config: TokenPackerConfig) -> nn.ModuleList:
    """The freshly initialised layers above the last level that is used, frozen."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers -= config.num_vision_layers
    return encoder_layers(AutoModel.from_config(vision_config)).requires_grad_(False)


def count_prefix_tokens(tower: nn.Module) -> int:
    """How many tokens come before a tower's patches: CLS, the distillation token, registers, where it has them.

    They are told by the names that transformers' vision transformers give to the weights of these tokens.
    """
    tokens = {name.rpartition(".")[2]: weight for name, weight in tower.named_parameters() if "layers." not in name}
    registers = tokens.get("register_tokens")
    return sum(name in tokens for name in PREFIX_TOKENS) + (0 if registers is None else registers.shape[-2])


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
    tower: PreTrainedModel,
    pixel_values: Tensor,
    patch_grid: tuple[int, int],
    levels: Sequence[int],
    query_level: int,
    max_tiles: int | None = None,
    **kwargs: bool,
) -> tuple[VisionFeatures, BaseModelOutput]:
    """Vision features of tiles (N, 3, h, w), and the tower's `hidden_states` and `attentions` if asked for.

    The levels are the tower's `hidden_states`, asked for by index: transformers 5.24 keeps only those, older versions
    keep all until the call ends. Where neither the tower nor the pixels are differentiated, nothing of the tower is
    kept for a backward pass, and at most `max_tiles` pass through it at a time: its peak memory does not grow with N.

    Args:
        max_tiles: None takes all tiles at once, as does a call for the tower's attentions or hidden states.
        kwargs: those of `TOWER_STATES` that are asked for.

    Raises:
        ValueError: when the tower gives fewer tokens than the patch grid has.
    """
    learns = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    chunks = (pixel_values,)
    if max_tiles is not None and pixel_values.shape[0] > max_tiles and not learns and not any(kwargs.values()):
        chunks = pixel_values.split(max_tiles)
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        parts = [_encode(tower, chunk, patch_grid, levels, query_level, **kwargs) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        query = torch.cat([features.query for features, _ in parts])  # (N, L, C)
        all_levels = torch.cat([features.levels for features, _ in parts])  # (N, L, M*C)
        return VisionFeatures(query, all_levels, patch_grid), parts[0][1]


def _encode(
    tower: PreTrainedModel,
    pixel_values: Tensor,
    patch_grid: tuple[int, int],
    levels: Sequence[int],
    query_level: int,
    **kwargs: bool,
) -> tuple[VisionFeatures, BaseModelOutput]:
    """One pass through the tower. Tokens before the patches, such as CLS and registers, are dropped."""
    asked = kwargs.pop("output_hidden_states", False)
    wanted = True if asked or not SELECTS_HIDDEN_STATES else sorted({*levels, query_level})
    output = tower(pixel_values, output_hidden_states=wanted, return_dict=True, **kwargs)
    hidden_states = output.hidden_states
    num_prefix = count_prefix_tokens(tower)
    features = VisionFeatures.from_hidden_states(hidden_states, patch_grid, levels, query_level, num_prefix)
    states = hidden_states if asked else None
    return features, BaseModelOutput(hidden_states=states, attentions=output.attentions)

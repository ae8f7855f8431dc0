"""Tiles to vision features, through any transformers ViT. Only the needed layers run.

Shapes: N tiles, (h, w) patch grid, L = h*w, C vision width, P leading tokens that are no patches (CLS, registers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from tokenpacker.features import VisionFeatures
from tokenpacker.hf.configuration import TokenPackerConfig
from tokenpacker.hf.versions import SELECTS_HIDDEN_STATES

TOWER_STATES = ("output_hidden_states", "output_attentions")
"""What a call may ask of the vision tower besides features."""

PREFIX_TOKENS = ("class_embedding", "cls_token", "distillation_token")


def build_vision_tower(config: TokenPackerConfig) -> PreTrainedModel:
    """A freshly initialised vision tower that ends at the last level that is used."""
    return cut_tower(AutoModel.from_config(config.vision_config), config.num_vision_layers)


def cut_tower(tower: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The same vision tower without the layers above the last level that is used, and without a pooling head.

    Raises:
        ValueError: if the tower has fewer layers than are needed.
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
    # transformers would do this in the first call, which could then not be compiled; it has no public way to ask for it
    maybe_install_capturing_hooks(tower)
    return tower


def build_spare_layers(config: TokenPackerConfig) -> nn.ModuleList:
    """The tower's layers above the last level that is used, freshly initialised and frozen."""
    vision_config = copy.deepcopy(config.vision_config)
    vision_config.num_hidden_layers -= config.num_vision_layers
    return encoder_layers(AutoModel.from_config(vision_config)).requires_grad_(False)


def count_prefix_tokens(tower: nn.Module) -> int:
    """The number of tokens before a tower's patches: CLS, distillation token, registers.

    Vision transformers of transformers have the same names for the weights of these tokens.
    """
    tokens = {name.rpartition(".")[2]: weight for name, weight in tower.named_parameters() if "layers." not in name}
    registers = tokens.get("register_tokens")
    return sum(name in tokens for name in PREFIX_TOKENS) + (0 if registers is None else registers.shape[-2])


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The tower's transformer layers in order.

    Raises:
        ValueError: if the tower has no list of layers.
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

    Tokens before the patches, such as CLS, are dropped. Of the hidden states, transformers 5.24 keeps only the levels
    that are asked for; older versions keep all until the call ends. If neither the tower nor the pixels need
    gradients, nothing is kept for a backward pass, and at most `max_tiles` pass the tower at a time, so that its peak
    memory does not grow with N.

    Args:
        max_tiles: None takes all tiles at once, as does a call for the tower's attentions or hidden states.
        kwargs: those of `TOWER_STATES` that are asked for.

    Raises:
        ValueError: if the tower gives another number of tokens than the patch grid has.
    """
    num_prefix = count_prefix_tokens(tower)
    all_states = kwargs.pop("output_hidden_states", False)
    wanted = True if all_states or not SELECTS_HIDDEN_STATES else sorted({*levels, query_level})
    one_pass = max_tiles is None or pixel_values.shape[0] <= max_tiles or all_states or any(kwargs.values())
    learns = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
    chunks = (pixel_values,) if one_pass or learns else pixel_values.split(max_tiles)
    parts = []
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        for chunk in chunks:
            output = tower(chunk, output_hidden_states=wanted, return_dict=True, **kwargs)
            states = output.hidden_states
            parts.append(VisionFeatures.from_hidden_states(states, patch_grid, levels, query_level, num_prefix))
        features = parts[0]
        if len(parts) > 1:
            query = torch.cat([part.query for part in parts])  # (N, L, C)
            features = VisionFeatures(query, torch.cat([part.levels for part in parts]), patch_grid)  # (N, L, M*C)
    return features, BaseModelOutput(hidden_states=states if all_states else None, attentions=output.attentions)

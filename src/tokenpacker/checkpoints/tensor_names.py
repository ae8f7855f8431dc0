"""The names of a released model's tensors, there and here; in both directions, one tensor at a time.

Released: `model.*` and `lm_head` of a LLaMA, `model.mm_projector.*`, the CLIP tower below a doubled prefix, and beside
`model` the `mask_extractor.*` of a model with regions.
Here: `model.language_model.*`, `lm_head`, `model.multi_modal_projector.*`, `model.vision_tower.*`,
`model.region_encoder.*`.
The attention's query, key and value projections are one matrix there and three here.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

RELEASED_TOWER = "model.vision_tower.vision_tower."
RELEASED_PROJECTOR = "model.mm_projector."
RELEASED_REGIONS = "mask_extractor."
TOWER, PROJECTOR, LANGUAGE_MODEL = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
REGIONS = "model.region_encoder."
SPARE_LAYERS = "model.spare_vision_layers."  # kept for the way back, never run

_PROJECTOR_MODULES = {
    "q_proj_1": "query_proj",
    "k_proj_1": "key_mlp",
    "v_proj_1": "value_mlp",
    "ln_q_1": "query_norm",
    "ln_k_1": "key_norm",
    "ln_v_1": "value_norm",
    "clip_attn.out_proj": "attention.output_proj",
    "mlp": "output_mlp",
}
_REGION_MODULES = {"res_layers": "level_projs", "feat_linear": "output_proj"}
_IN_PROJECTION = {"clip_attn.in_proj_weight": "weight", "clip_attn.in_proj_bias": "bias"}
_IN_PARTS = ("query_proj", "key_proj", "value_proj")  # in the order of their rows

# Buffers that follow from the config; what is needed to write them back is kept in ours.
ROTARY_FREQUENCIES = re.compile(r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
POSITION_IDS = re.compile(re.escape(RELEASED_TOWER) + r"vision_model\.embeddings\.position_ids")
# What a file of a complete CLIP holds beside its vision tower.
OTHER_CLIP_PARTS = re.compile(r"(text_model\.|text_projection|visual_projection|logit_scale)")


def from_released(name: str, num_layers: int) -> tuple[str, ...] | None:
    """Our names for a released tensor, three for a joined one; None for a name that no released model has.

    Args:
        num_layers: layers of our vision tower; those above are spare.
    """
    if name.startswith(RELEASED_TOWER):
        return (_from_tower(name.removeprefix(RELEASED_TOWER), num_layers),)
    if name.startswith(RELEASED_PROJECTOR):
        tail = name.removeprefix(RELEASED_PROJECTOR)
        if tail in _IN_PROJECTION:
            return tuple(f"{PROJECTOR}attention.{part}.{_IN_PROJECTION[tail]}" for part in _IN_PARTS)
        module = next((module for module in _PROJECTOR_MODULES if tail.startswith(f"{module}.")), None)
        return None if module is None else (f"{PROJECTOR}{_PROJECTOR_MODULES[module]}{tail.removeprefix(module)}",)
    if name.startswith(RELEASED_REGIONS):
        module, _, tail = name.removeprefix(RELEASED_REGIONS).partition(".")
        return (f"{REGIONS}{_REGION_MODULES[module]}.{tail}",) if module in _REGION_MODULES else None
    if name == "lm_head.weight":
        return (name,)
    if name.startswith("model."):
        return (LANGUAGE_MODEL + name.removeprefix("model."),)
    return None


def to_released(name: str, num_layers: int) -> str | None:
    """The released name of a tensor of ours; the parts of a joined one share theirs. None where there is none."""
    if name.startswith(SPARE_LAYERS):
        index, tail = name.removeprefix(SPARE_LAYERS).split(".", 1)
        return f"{RELEASED_TOWER}vision_model.encoder.layers.{num_layers + int(index)}.{tail}"
    if name.startswith(TOWER):
        return f"{RELEASED_TOWER}vision_model.{name.removeprefix(TOWER)}"
    if name.startswith(PROJECTOR):
        tail = name.removeprefix(PROJECTOR)
        for joined, kind in _IN_PROJECTION.items():
            if tail in (f"attention.{part}.{kind}" for part in _IN_PARTS):
                return RELEASED_PROJECTOR + joined
        module = next((ours for ours in _PROJECTOR_MODULES.values() if tail.startswith(f"{ours}.")), None)
        released = next((theirs for theirs, ours in _PROJECTOR_MODULES.items() if ours == module), None)
        return None if module is None else f"{RELEASED_PROJECTOR}{released}{tail.removeprefix(module)}"
    if name.startswith(REGIONS):
        module, _, tail = name.removeprefix(REGIONS).partition(".")
        released = next((theirs for theirs, ours in _REGION_MODULES.items() if ours == module), None)
        return None if released is None else f"{RELEASED_REGIONS}{released}.{tail}"
    if name.startswith(LANGUAGE_MODEL):
        return "model." + name.removeprefix(LANGUAGE_MODEL)
    return name if name == "lm_head.weight" else None


def is_derived(name: str) -> bool:
    """Whether a released tensor follows from the config, so that no model needs it."""
    return ROTARY_FREQUENCIES.fullmatch(name) is not None or POSITION_IDS.fullmatch(name) is not None


def first_layer_name(name: str) -> tuple[int, str] | None:
    """For one of our spare layers' tensors, how many layers it is above the last that runs, and its sister's name."""
    match = re.fullmatch(re.escape(SPARE_LAYERS) + r"(\d+)\.(.+)", name)
    return None if match is None else (int(match[1]), f"{TOWER}encoder.layers.0.{match[2]}")


def split(tensor: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """The parts that `from_released` names, along the rows."""
    return tensor.chunk(num_parts) if num_parts > 1 else (tensor,)


def join(parts: dict[str, Tensor]) -> Tensor:
    """One released tensor from our parts of it by name, in the order of the rows."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    by_module = {name.rsplit(".", 2)[1]: tensor for name, tensor in parts.items()}
    return torch.cat([by_module[part] for part in _IN_PARTS])


def num_parts(released_name: str) -> int:
    """How many tensors of ours make up a released one."""
    return len(_IN_PARTS) if released_name.removeprefix(RELEASED_PROJECTOR) in _IN_PROJECTION else 1


def _from_tower(tail: str, num_layers: int) -> str:
    tail = tail.removeprefix("vision_model.")
    layer = re.match(r"encoder\.layers\.(\d+)\.(.*)", tail)
    if layer is not None and int(layer[1]) >= num_layers:
        return f"{SPARE_LAYERS}{int(layer[1]) - num_layers}.{layer[2]}"
    return TOWER + tail

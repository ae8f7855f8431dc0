"""Names of a released model's tensors and of ours, in both directions.

Released models have `model.*` and `lm_head` of a LLaMA, `model.mm_projector.*`, the CLIP tower below a doubled prefix,
and beside `model` the `mask_extractor.*` of models with regions. Ours are `model.language_model.*`, `lm_head`,
`model.multi_modal_projector.*`, `model.vision_tower.*` and `model.region_encoder.*`.

The released attention stores its query, key and value projections as one matrix; ours stores three.

transformers' `WeightRenaming` and `WeightConverter` could express this table, but they work only inside
`from_pretrained` and `save_pretrained`: unknown tensors are a warning there, all `.bin` files are in memory at once,
and the way back starts from a whole model in memory.
"""

from __future__ import annotations

import re

RELEASED_TOWER = "model.vision_tower.vision_tower."
RELEASED_PROJECTOR = "model.mm_projector."
RELEASED_REGIONS = "mask_extractor."
TOWER, PROJECTOR, LANGUAGE_MODEL = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
REGIONS = "model.region_encoder."
SPARE_LAYERS = "model.spare_vision_layers."  # layers above the last that runs, kept to be written back

# (prefix of the released name, prefix of our name); the first that fits counts.
_PREFIXES = (
    (f"{RELEASED_TOWER}vision_model.", TOWER),
    (RELEASED_TOWER, TOWER),  # as newer libraries save a CLIP
    (f"{RELEASED_PROJECTOR}q_proj_1.", f"{PROJECTOR}query_proj."),
    (f"{RELEASED_PROJECTOR}k_proj_1.", f"{PROJECTOR}key_mlp."),
    (f"{RELEASED_PROJECTOR}v_proj_1.", f"{PROJECTOR}value_mlp."),
    (f"{RELEASED_PROJECTOR}ln_q_1.", f"{PROJECTOR}query_norm."),
    (f"{RELEASED_PROJECTOR}ln_k_1.", f"{PROJECTOR}key_norm."),
    (f"{RELEASED_PROJECTOR}ln_v_1.", f"{PROJECTOR}value_norm."),
    (f"{RELEASED_PROJECTOR}clip_attn.out_proj.", f"{PROJECTOR}attention.output_proj."),
    (f"{RELEASED_PROJECTOR}mlp.", f"{PROJECTOR}output_mlp."),
    (f"{RELEASED_REGIONS}res_layers.", f"{REGIONS}level_projs."),
    (f"{RELEASED_REGIONS}feat_linear.", f"{REGIONS}output_proj."),
    ("lm_head.", "lm_head."),
    ("model.", LANGUAGE_MODEL),
)
# Released tensors that are three of ours, stacked along their rows.
_STACKED = {
    f"{RELEASED_PROJECTOR}clip_attn.in_proj_{kind}": tuple(
        f"{PROJECTOR}attention.{part}_proj.{kind}" for part in ("query", "key", "value")
    )
    for kind in ("weight", "bias")
}
_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.(.+)")
_SPARE_LAYER = re.compile(re.escape(SPARE_LAYERS) + r"(\d+)\.(.+)")

# Buffers that follow from the config; our config keeps what is needed to write them back.
ROTARY_FREQUENCIES = re.compile(r"model\.layers\.(\d+)\.self_attn\.rotary_emb\.inv_freq")
POSITION_IDS = re.compile(re.escape(RELEASED_TOWER) + r"vision_model\.embeddings\.position_ids")
# What a file of a complete CLIP holds beside its vision tower.
OTHER_CLIP_PARTS = re.compile(r"(text_model\.|text_projection|visual_projection|logit_scale)")


def from_released(name: str, num_layers: int) -> tuple[str, ...]:
    """Our names for a released tensor: three for a stacked one, none for a name that no released model has.

    Args:
        num_layers: layers of our vision tower; those above are spare.
    """
    if name in _STACKED:
        return _STACKED[name]
    ours = next((ours + name.removeprefix(theirs) for theirs, ours in _PREFIXES if name.startswith(theirs)), None)
    if ours is None:
        return ()
    layer = _LAYER.fullmatch(ours)
    if layer is not None and int(layer[1]) >= num_layers:
        return (f"{SPARE_LAYERS}{int(layer[1]) - num_layers}.{layer[2]}",)
    return (ours,)


def to_released(name: str, num_layers: int) -> str | None:
    """The released name of our tensor, which tensors of a stacked one share; None if there is none."""
    stacked = next((theirs for theirs, ours in _STACKED.items() if name in ours), None)
    if stacked is not None:
        return stacked
    spare = _SPARE_LAYER.fullmatch(name)
    if spare is not None:
        name = f"{TOWER}encoder.layers.{num_layers + int(spare[1])}.{spare[2]}"
    return next((theirs + name.removeprefix(ours) for theirs, ours in _PREFIXES if name.startswith(ours)), None)


def is_derived(name: str) -> bool:
    """Whether a released tensor follows from the config, so that no model needs it."""
    return ROTARY_FREQUENCIES.fullmatch(name) is not None or POSITION_IDS.fullmatch(name) is not None


def spare_layer(name: str) -> tuple[int, str] | None:
    """For a tensor of a spare layer: the layer's index, and the name of the same tensor in the tower's first layer."""
    match = _SPARE_LAYER.fullmatch(name)
    return None if match is None else (int(match[1]), f"{TOWER}encoder.layers.0.{match[2]}")
